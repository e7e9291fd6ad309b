"""Patches may touch the proposals as they may touch KVM: in memory, apart from others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.litmus.loader import load_test
from emulator.policy import preset, spelled_policy
from emulator.policy.patch import PatchError
from emulator.policy.patch.code import SHIPPED
from emulator.policy.proposals import PROPOSALS
from tests.emulator.policy.patch.edits import diff_of, written

PATH = "emulator/policy/proposals/root_tlb_gen.py"
MOVES_ON = "            self.tlb_gen(root).inc_return(cpu)\n"


def patch(directory: Path, old: str, new: str, name: str = "idea.patch", base: str = "root-tlb-gen") -> str:
    source = SHIPPED.sources[PATH]
    assert source.count(old) == 1
    body = diff_of(PATH, source, source.replace(old, new)).replace(f"emulator/kvm/{PATH}", PATH)
    return written(directory, f"Flushlab-Base: {base}\n\n{body}", name)


@pytest.mark.slow
def test_the_patched_class_decides_while_the_patch_lives(tmp_path: Path) -> None:
    policy = spelled_policy(patch(tmp_path, MOVES_ON, "            pass\n"))
    before = dict(PROPOSALS)
    with policy.confined():
        from emulator.policy.proposals import PROPOSALS as LIVE

        assert LIVE.keys() == before.keys()
        assert not any(LIVE[name] is before[name] for name in before)
    from emulator.policy.proposals import PROPOSALS as AFTERWARDS

    assert before == AFTERWARDS


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0)])
def test_policies_of_one_command_do_not_meet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], order: tuple[int, ...]
) -> None:
    named = "root-tlb-gen", patch(tmp_path, MOVES_ON, "            pass\n")
    policies = [word for i in order for word in ("--policy", named[i])]
    assert main(["explore", "return-zap", *policies, "--json"]) == 1
    found = {one["policy"]: one["verdict"] for one in json.loads(capsys.readouterr().out)["explored"]}
    assert found == {named[0]: "safe", named[1]: "violations"}


@pytest.mark.slow
def test_state_without_an_ordering_point_is_named(tmp_path: Path) -> None:
    """A plain attribute of the proposal's class: the search does not know who else uses it."""
    text = "            self.count = getattr(self, 'count', 0) + 1\n" + MOVES_ON
    policy = spelled_policy(patch(tmp_path, MOVES_ON, text))
    verdict = explore_verdict(load_test("return-zap"), policy, Plan(executions=60, minimize=False))
    assert not verdict.complete
    (sentence,) = verdict.unwatched
    assert sentence.endswith("RootTlbGen.count is kept in the policy, not in a state of its own")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (MOVES_ON, "            nonsense(\n", rf"idea\.patch: {PATH}:\d+: SyntaxError"),
        ("class RootTlbGen(Policy):\n", "class Renamed(Policy):\n", "cannot import name 'RootTlbGen'"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        spelled_policy(patch(tmp_path, old, new))


def test_a_hunk_that_does_not_apply_names_the_file(tmp_path: Path) -> None:
    path = patch(tmp_path, MOVES_ON, "            pass\n")
    damaged = Path(path).read_text().replace("inc_return", "inc_Return")
    with pytest.raises(PatchError, match=rf"hunk 1 of {PATH}: "):
        spelled_policy(written(tmp_path, damaged, "damaged.patch"))


def test_other_parts_of_the_policies_cannot_change(tmp_path: Path) -> None:
    source = "x = 1\n"
    body = diff_of("x", source, "x = 2\n").replace("emulator/kvm/x", "emulator/policy/policy.py")
    expected = r"expected changes of \.py files in emulator/kvm/ or emulator/policy/proposals/ only"
    with pytest.raises(PatchError, match=f"touches emulator/policy/policy.py; {expected}"):
        spelled_policy(written(tmp_path, body, "idea.patch"))


@pytest.mark.slow
def test_an_error_of_patched_code_is_the_users(tmp_path: Path) -> None:
    policy = spelled_policy(patch(tmp_path, MOVES_ON, "            raise KeyError('mine')\n"))
    with pytest.raises(PatchError, match=rf"idea\.patch: {PATH}:\d+, in remote_flush_due\(\): KeyError"):
        explore_verdict(load_test("return-zap"), policy, Plan(executions=20, minimize=False))


def test_a_mutant_of_a_proposal_is_shown_in_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "mutant:generation-not-checked"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert PATH in lines
    assert any(line.startswith("-    def before_entry(") for line in lines)


def test_the_base_is_the_policy_that_the_patch_is_about(tmp_path: Path) -> None:
    policy = spelled_policy(patch(tmp_path, MOVES_ON, "            pass\n"))
    assert policy.answers() == preset("root-tlb-gen").answers()
