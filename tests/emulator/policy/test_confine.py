"""Changes that a policy's file makes to KVM's code hold for that policy alone."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import emulator.kvm.vmx.vmx as vmx
from emulator.cli.main import main
from emulator.policy import UserPolicyError, load_user_policy

CLASS = """
from emulator.policy import Policy
class Mine(Policy):
    def zap_scope(self, cpu, kvm):
        return super().zap_scope(cpu, kvm)
"""
# vmx_flush_tlb_all() that does nothing, by name and in place; request_tlb_flush(), where vmx.py imports it.
BY_NAME = "import emulator.kvm.vmx.vmx as vmx\nvmx.vmx_flush_tlb_all = lambda cpu, vcpu, reason: None\n"
BY_IMPORT = "import emulator.kvm.vmx.vmx as vmx\nvmx.request_tlb_flush = lambda cpu, vcpu, reason: None\n"
IN_PLACE = """
import emulator.kvm.vmx.vmx as vmx
vmx.vmx_flush_tlb_all.__code__ = (lambda cpu, vcpu, reason: None).__code__
"""
BUGS = {"name": BY_NAME, "import": BY_IMPORT, "code": IN_PLACE}


def written(directory: Path, text: str, name: str = "mine.py") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def verdicts(command: str, jobs: int, policies: list[str], capsys: pytest.CaptureFixture[str]) -> list[bool]:
    """Whether each policy violates, in the order given."""
    arguments = [f"--policy={policy}" for policy in policies]
    tests = ["return-zap", "guest-pge"] if jobs > 1 else ["return-zap"]
    more = ["--iterations", "10", "--seed", "1"] if command == "litmus" else []
    main([command, *tests, "--jobs", str(jobs), "--json", *more, *arguments])
    document = json.loads(capsys.readouterr().out)
    found = document["explored" if command == "explore" else "outcomes"]
    return [any(one["policy"] == policy and one["violations"] for one in found) for policy in policies]


@pytest.mark.slow
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


@pytest.mark.slow
def test_compare_runs_each_with_its_own_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = written(tmp_path, BUGS["name"] + CLASS, "bad.py")
    arguments = ["--policy", str(bad), "--policy", "linux-7.3", "--duration", "2s", "--json"]
    assert main(["compare", "migration-storm", *arguments]) == 1
    document = json.loads(capsys.readouterr().out)
    found = {policy["name"]: policy["verdict"] for policy in document["policies"]}
    assert found == {"bad": "violations", "linux-7.3": "clean"}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_changes_are_in_place_while_a_machine_runs_only(bug: str, tmp_path: Path) -> None:
    kept = [(vmx.vmx_flush_tlb_all, vmx.vmx_flush_tlb_all.__code__), vars(vmx)["request_tlb_flush"]]
    policy = load_user_policy(written(tmp_path, BUGS[bug] + CLASS))

    def now() -> object:
        return [(vmx.vmx_flush_tlb_all, vmx.vmx_flush_tlb_all.__code__), vars(vmx)["request_tlb_flush"]]

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


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("emulator.kvm.vmx.vmx.kvm_inject_smi = None", r"emulator\.kvm\.smm\.kvm_inject_smi$"),
        ("emulator.kvm.vmx.vmx.vmx_flush_tlb_al = None", r".*\(did you mean vmx_flush_tlb_all\?\)$"),
        ("emulator.kvm.structs.Kvm.mine = None", "a name that KVM has$"),
    ],
)
def test_a_name_that_kvm_has_not_is_refused(change: str, expected: str, tmp_path: Path) -> None:
    """Nothing asks for it, and the policy would be judged without its author's change."""
    path = written(tmp_path, f"import emulator.kvm.vmx.vmx\nimport emulator.kvm.structs\n{change}\n{CLASS}")
    name = change.partition(" ")[0]
    with pytest.raises(
        UserPolicyError, match=f"^{path}:3: sets {name}, which does not exist; expected {expected}"
    ):
        load_user_policy(path)
    assert not hasattr(vmx, name.rpartition(".")[2])


@pytest.mark.slow
def test_a_replaced_function_calls_the_former_one(tmp_path: Path) -> None:
    """It replaces the function where that is used, not in the file's own module."""
    text = """
import emulator.kvm.vmx.vmx as vmx
from emulator.kvm.vmx.vmx import vmx_flush_tlb_all
def flush(cpu, vcpu, reason):
    return vmx_flush_tlb_all(cpu, vcpu, reason)
vmx.vmx_flush_tlb_all = flush
"""
    path = str(written(tmp_path, text + CLASS))
    assert main(["litmus", "return-zap", "--iterations", "5", "--policy", path]) == 0


@pytest.mark.slow
def test_a_constant_is_replaced_wherever_it_was_imported(tmp_path: Path) -> None:
    importer = vars(importlib.import_module("emulator.litmus.kvm_ops"))
    text = "import emulator.kvm.kvm_host as host\nhost.KVM_MEM_LOG_DIRTY_PAGES = 1 << 9\n"
    policy = load_user_policy(written(tmp_path, text + CLASS))
    assert importer["KVM_MEM_LOG_DIRTY_PAGES"] == 1
    with policy.confined():
        assert importer["KVM_MEM_LOG_DIRTY_PAGES"] == 1 << 9
    assert importer["KVM_MEM_LOG_DIRTY_PAGES"] == 1


IN_MMU = "import emulator.kvm.mmu as mmu\nmmu.kvm_arch_mmu_enable_log_dirty_pt_masked "
FORGETS = "= lambda cpu, kvm, slot, offset, mask: 0\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "replaced",
    [
        "import emulator.kvm.dirty_log as dl\ndl.kvm_arch_mmu_enable_log_dirty_pt_masked ",
        "import emulator.kvm.dirty_log\nemulator.kvm.dirty_log.kvm_arch_mmu_enable_log_dirty_pt_masked ",
        "from emulator.kvm import dirty_log\ndirty_log.kvm_arch_mmu_enable_log_dirty_pt_masked ",
        IN_MMU,
        "from emulator.kvm.mmu import kvm_arch_mmu_enable_log_dirty_pt_masked\n" + IN_MMU,
    ],
)
def test_files_that_name_former_modules(
    replaced: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """KVM_GET_DIRTY_LOG that does not write-protect the reported pages, as files were written before KVM's
    modules had folders."""
    path = str(written(tmp_path, replaced + FORGETS + CLASS))
    assert main(["explore", "log-get", "--policy", path, "--policy", "linux-7.3", "--json"]) == 1
    found = {one["policy"]: one["violations"] for one in json.loads(capsys.readouterr().out)["explored"]}
    assert found == {path: ["lost-dirty"], "linux-7.3": []}
    package = importlib.import_module("emulator.kvm.mmu")
    assert type(package) is ModuleType
    assert "emulator.kvm.dirty_log" not in sys.modules
    assert not hasattr(importlib.import_module("emulator.kvm"), "dirty_log")


def test_a_module_that_never_was(tmp_path: Path) -> None:
    path = written(tmp_path, f"import emulator.kvm.dirty_lgo\n{CLASS}")
    with pytest.raises(UserPolicyError, match=rf"^{path}:1: ModuleNotFoundError"):
        load_user_policy(path)


@pytest.mark.slow
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
