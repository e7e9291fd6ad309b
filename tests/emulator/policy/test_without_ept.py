"""Policies that answer about EPT have nothing to say where there is none."""

from __future__ import annotations

import pytest

from emulator.cli.main import main
from emulator.errors import BadInput
from emulator.litmus.loader import load_tests
from emulator.litmus.policies import pairs_of, policies_for
from emulator.policy import PRESETS, Policy
from emulator.policy.without_ept import answer_about_ept, check_without_ept


def test_of_the_presets_only_the_modelled_kernel_is_left() -> None:
    assert [name for name, policy in PRESETS.items() if answer_about_ept(policy) is None] == ["linux-7.3"]


@pytest.mark.parametrize(
    "answers", [{"notifier_flush": "none"}, {"role_change": "keep-roots"}, {"kick_wait": "no-wait"}]
)
def test_what_the_shadow_mmu_asks_may_be_answered(answers: dict[str, str]) -> None:
    assert answer_about_ept(Policy(**answers)) is None


def test_a_class_that_decides_about_ept_is_refused() -> None:
    class Mine(Policy):
        def zap(self, cpu: object, kvm: object) -> str:  # type: ignore[override]
            return "rcu-proxy"

    with pytest.raises(BadInput, match="its host has no EPT"):
        check_without_ept(Mine(), "shadow-unmap")


def test_tests_without_ept_are_left_out_or_refused() -> None:
    tests = load_tests(["shadow-unmap", "return-zap"])
    assert policies_for(tests[0], [], all_mutants=False)[0] == "linux-7.3"
    pairs = pairs_of(tests, ["linux-7.3", "linux-5.14"], named=False)
    assert [(test.name, name) for test, name in pairs] == [
        ("shadow-unmap", "linux-7.3"), ("return-zap", "linux-7.3"), ("return-zap", "linux-5.14"),
    ]  # fmt: skip
    with pytest.raises(BadInput, match=r"shadow-unmap: its host has no EPT, and policy linux-5\.14 answers"):
        pairs_of(tests, ["linux-5.14"], named=True)


@pytest.mark.parametrize(
    "command",
    [
        ["litmus", "shadow-unmap", "--policy", "linux-5.14"],
        ["explore", "shadow-unmap", "--policy", "root-tlb-gen"],
        ["run", "shadow", "--policy", "linux-5.18", "--duration", "1s"],
        ["compare", "shadow", "--policy", "linux-6.12", "--duration", "1s"],
        ["run", "main", "--no-ept", "--policy", "linux-5.18", "--duration", "1s"],
        ["compare", "balloon", "--no-ept", "--policy", "linux-6.12", "--duration", "1s"],
    ],
)
def test_commands_say_so_in_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "its host has no EPT" in error
