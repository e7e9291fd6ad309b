"""Changes that a policy's file makes to KVM's code hold for that policy alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import emulator.kvm.vmx.vmx as vmx
import emulator.kvm.x86 as x86
from emulator.cli.main import main
from emulator.policy import UserPolicyError, load_user_policy

CLASS = """
from emulator.policy import Policy
class Mine(Policy):
    def zap_scope(self, cpu, kvm):
        return super().zap_scope(cpu, kvm)
"""
# vmx_flush_tlb_all() that does nothing, as a name where it is called, and in place.
BY_NAME = "import emulator.kvm.vmx.vmx as vmx\nvmx.vmx_flush_tlb_all = lambda cpu, vcpu, reason: None\n"
BY_IMPORT = "import emulator.kvm.x86 as x\nx.vmx_flush_tlb_all = lambda cpu, vcpu, reason: None\n"
IN_PLACE = """
import emulator.kvm.vmx.vmx as vmx
vmx.vmx_flush_tlb_all.__code__ = (lambda cpu, vcpu, reason: None).__code__
"""
BUGS = {"name": BY_NAME + BY_IMPORT, "code": IN_PLACE}


def written(directory: Path, text: str, name: str = "mine.py") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def verdicts(command: str, jobs: int, policies: list[str], capsys: pytest.CaptureFixture[str]) -> list[bool]:
    """Whether each policy violates, in the order given."""
    arguments = [f"--policy={policy}" for policy in policies]
    tests = ["return-zap", "stale-until-flush"] if jobs > 1 else ["return-zap"]
    main([command, *tests, "--jobs", str(jobs), "--json", *arguments])
    document = json.loads(capsys.readouterr().out)
    found = document["explored" if command == "explore" else "outcomes"]
    return [any(one["policy"] == policy and one["violations"] for one in found) for policy in policies]


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize(("command", "jobs"), [("explore", 1), ("explore", 2), ("litmus", 1), ("litmus", 2)])
def test_other_policies_of_the_command_meet_kvms_own_code(
    command: str, jobs: int, bug: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = str(written(tmp_path, BUGS[bug] + CLASS))
    good = str(written(tmp_path, CLASS, "good.py"))
    orders = [("linux-7.3", bad, good), (bad, good, "linux-7.3")] if jobs == 1 else [(bad, "linux-7.3", good)]
    for order in orders:
        assert verdicts(command, jobs, list(order), capsys) == [policy == bad for policy in order]


def test_compare_runs_each_with_its_own_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = written(tmp_path, BUGS["name"] + CLASS, "bad.py")
    arguments = ["--policy", str(bad), "--policy", "linux-7.3", "--duration", "2s", "--json"]
    assert main(["compare", "migration-storm", *arguments]) == 1
    document = json.loads(capsys.readouterr().out)
    found = {policy["name"]: policy["verdict"] for policy in document["policies"]}
    assert found == {"bad": "violations", "linux-7.3": "clean"}


@pytest.mark.parametrize("bug", BUGS)
def test_changes_are_in_place_while_a_machine_runs_only(bug: str, tmp_path: Path) -> None:
    kept = [(vmx.vmx_flush_tlb_all, vmx.vmx_flush_tlb_all.__code__), vars(x86)["vmx_flush_tlb_all"]]
    policy = load_user_policy(written(tmp_path, BUGS[bug] + CLASS))

    def now() -> object:
        return [(vmx.vmx_flush_tlb_all, vmx.vmx_flush_tlb_all.__code__), vars(x86)["vmx_flush_tlb_all"]]

    assert now() == kept
    with policy.confined():
        mine = now()
        assert mine != kept
        again = policy.fresh()
        assert now() != kept
        assert (now() == mine) == (bug == "code")  # functions of the module that was executed again
    assert now() == kept
    with again.confined():
        assert now() != kept
    assert now() == kept


def test_a_new_name_goes_as_well(tmp_path: Path) -> None:
    policy = load_user_policy(
        written(tmp_path, f"import emulator.kvm.vmx.vmx\nemulator.kvm.vmx.vmx.mine = 1\n{CLASS}")
    )
    assert not hasattr(vmx, "mine")
    with policy.confined():
        assert vmx.mine == 1  # type: ignore[attr-defined]
    assert not hasattr(vmx, "mine")


@pytest.mark.parametrize(
    "change",
    [
        "import emulator.litmus.verdict as v\nv.differs = None",
        "import emulator.litmus.verdict as v\nv.differs.__code__ = (lambda *a: None).__code__",
        "import emulator.report.result as r\nr.Result.verdict = 'clean'",
        "import native\nnative.VIOLATION_KINDS = ()",
        "import metrics\nmetrics.Endpoint = None",
        "import json\njson.dumps = None",
        "import emulator.policy.presets as p\np.PRESETS.clear()",
        "import importlib\nimportlib.import_module('emulator.litmus.verdict').differs = None",
    ],
)
def test_what_judges_policies_is_not_theirs_to_change(change: str, tmp_path: Path) -> None:
    path = written(tmp_path, change + CLASS)
    with pytest.raises(
        UserPolicyError, match=rf"{path}:[12]: changes [a-z.]+.*; expected changes of emulator.kvm only"
    ):
        load_user_policy(path)
    load_user_policy(written(tmp_path, CLASS, "good.py"))


def test_a_change_when_asked_is_told(tmp_path: Path) -> None:
    policy = load_user_policy(written(tmp_path, CLASS))
    before = vmx.vmx_flush_tlb_all
    with (
        pytest.raises(
            UserPolicyError, match=r"changes emulator\.kvm\.vmx\.vmx\.vmx_flush_tlb_all when it is asked"
        ),
        policy.confined(),
    ):
        vmx.vmx_flush_tlb_all = None  # type: ignore[assignment]
    assert vmx.vmx_flush_tlb_all is before
