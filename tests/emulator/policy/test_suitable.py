"""Policies suit a host on which their answers are asked for."""

from __future__ import annotations

import pytest

from emulator.cli.main import main
from emulator.errors import BadInput
from emulator.litmus.loader import load_tests
from emulator.litmus.policies import pairs_of, policies_for
from emulator.policy import PRESETS, Policy
from emulator.policy.suitable import check_suits, unasked_answer

EVERYWHERE = [
    "linux-7.3",
    "linux-6.12",
    "linux-6.1",
    "linux-5.18",
    "linux-5.14",
    "lkml-2022-keep-roots",
    "lkml-2022-merged",
]


def test_without_ept_kernels_are_left_and_the_patch_for_both_mmus() -> None:
    left = [name for name, policy in PRESETS.items() if unasked_answer(policy, ept=False) is None]
    assert left == EVERYWHERE
    left = [name for name, policy in PRESETS.items() if unasked_answer(policy, ept=True)]
    assert left == ["lkml-2025-hyperv-flush"]
    assert not [name for name, policy in PRESETS.items() if unasked_answer(policy, ept=True, hyperv=True)]


@pytest.mark.parametrize("answers", [{"hv_remote_flush": "requests"}, {"hv_local_flush": "hypercall"}])
def test_an_answer_about_hyperv_is_asked_on_hyperv_alone(answers: dict[str, str]) -> None:
    ((point, answer),) = answers.items()
    assert unasked_answer(Policy(**answers), ept=True) == f"{point}={answer}"
    assert unasked_answer(Policy(**answers), ept=True, hyperv=True) is None
    with pytest.raises(BadInput) as caught:
        check_suits(Policy(**answers), "main", ept=True)
    assert "no guest of Hyper-V" in str(caught.value)
    assert "machine.hyperv = true" in str(caught.value)


@pytest.mark.parametrize(
    "answers", [{"notifier_flush": "none"}, {"role_change": "keep-roots"}, {"kick_wait": "no-wait"}]
)
def test_what_both_mmus_ask_may_be_answered_everywhere(answers: dict[str, str]) -> None:
    assert unasked_answer(Policy(**answers), ept=False) is None
    assert unasked_answer(Policy(**answers), ept=True) is None


def test_an_answer_of_one_mmu_alone_suits_that_one() -> None:
    assert unasked_answer(Policy(zap="flush-per-table"), ept=False) == "zap=flush-per-table"
    assert unasked_answer(Policy(pcide_on="keep"), ept=True) == "pcide_on=keep"
    assert unasked_answer(Policy(zap="flush-per-table"), ept=True) is None
    assert unasked_answer(Policy(pcide_on="keep"), ept=False) is None


def test_an_ept_of_a_guests_asks_both_mmus() -> None:
    assert unasked_answer(Policy(commit_zap="none"), ept=True, nested_ept=True) is None
    assert unasked_answer(Policy(zap="flush-per-table"), ept=True, nested_ept=True) is None
    assert unasked_answer(Policy(pcide_on="keep"), ept=True, nested_ept=True) == "pcide_on=keep"
    tests = load_tests(["nested-ept-table", "nested-unmap"])
    assert pairs_of(tests, ["commit_zap=none"], named=False) == [(tests[0], "commit_zap=none")]


def test_a_kernel_with_one_answer_of_the_other_mmu_suits_no_more() -> None:
    older = PRESETS["linux-5.14"]
    assert unasked_answer(older.with_settings({"notifier_flush": "none"}), ept=False) is None
    assert unasked_answer(older.with_settings({"zap": "rcu-proxy"}), ept=False) is not None


def test_a_class_that_decides_about_ept_is_refused() -> None:
    class Mine(Policy):
        def zap(self, cpu: object, kvm: object) -> str:  # type: ignore[override]
            return "rcu-proxy"

    with pytest.raises(BadInput, match="its host has no EPT"):
        check_suits(Mine(), "shadow-unmap", ept=False)


def test_tests_that_a_policy_does_not_suit_are_left_out_or_refused() -> None:
    tests = load_tests(["shadow-unmap", "return-zap"])
    assert policies_for(tests[0], [], all_mutants=False)[: len(EVERYWHERE)] == EVERYWHERE
    pairs = pairs_of(tests, ["linux-7.3", "root-tlb-gen", "pcide_on=keep"], named=False)
    assert [(test.name, name) for test, name in pairs] == [
        ("shadow-unmap", "linux-7.3"), ("shadow-unmap", "pcide_on=keep"),
        ("return-zap", "linux-7.3"), ("return-zap", "root-tlb-gen"),
    ]  # fmt: skip
    with pytest.raises(BadInput, match=r"shadow-unmap: its host has no EPT, and policy root-tlb-gen answers"):
        pairs_of(tests, ["root-tlb-gen"], named=True)
    with pytest.raises(BadInput, match=r"return-zap: its host has EPT, and policy pcide_on=keep answers"):
        pairs_of(tests, ["pcide_on=keep"], named=True)


@pytest.mark.parametrize(
    ("command", "host"),
    [
        (["litmus", "shadow-unmap", "--policy", "root-tlb-gen"], "no EPT"),
        (["explore", "shadow-unmap", "--policy", "root-tlb-gen"], "no EPT"),
        (["run", "shadow", "--policy", "lkml-2021-batch-list", "--duration", "1s"], "no EPT"),
        (["compare", "shadow", "--policy", "lkml-2025-active-roots", "--duration", "1s"], "no EPT"),
        (["run", "--policy", "linux-7.3", "--set", "pcide_on=keep", "--duration", "1s"], "EPT"),
        (["run", "main", "--no-ept", "--policy", "root-tlb-gen", "--duration", "1s"], "no EPT"),
        (["compare", "balloon", "--no-ept", "--policy", "root-tlb-gen", "--duration", "1s"], "no EPT"),
        (["litmus", "return-zap", "--policy", "noflush_root=sync"], "EPT"),
    ],
)
def test_commands_say_so_in_one_line(
    command: list[str], host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"its host has {host}" in error
