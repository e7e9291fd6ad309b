"""The account at the end of an execution: each kind of leak, explored and on real threads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy
from emulator.litmus.runner import run_test
from emulator.litmus.verdict import VIOLATIONS
from tests.emulator.policy.patch.edits import edited, written

pytestmark = pytest.mark.slow

FREE_TABLE = """    cpu.point("call_rcu", table, "write")
    cpu.check(lib.ept_table_free_rcu(cpu.m, cpu.id, table))
"""
FREE_ROOT = """    cpu.point("call_rcu", root.hfn, "write")
    cpu.check(lib.ept_table_free_rcu(cpu.m, cpu.id, root.hfn))
"""
PUT_PREVIOUS = """    if prev is not None:
        kvm_tdp_mmu_put_root(cpu, kvm, prev)
    return found
"""
ZAP_ALL = """    kvm_mmu_zap_all_fast_front(cpu, kvm)
    kvm_mmu_zap_all_fast_back(cpu, kvm)
"""
TAKE_VPID = "        return machine.vmx_vpids.pop()\n"
# The edit of KVM's code, and a part of the report.
LEAKS = {
    "a reference that is never put": (
        (PUT_PREVIOUS, "    return found\n"),
        "has 2 references, 0 of them accounted for",
    ),
    "a root that is never zapped": (
        (ZAP_ALL, "    kvm_mmu_zap_all_fast_front(cpu, kvm)\n"),
        "was invalidated and never zapped",
    ),
    "tables that are never freed": (
        (FREE_TABLE, "    del cpu, table\n"),
        "table pages are in use, 3 of them accounted for",
    ),
    "a root page that is never freed": (
        (FREE_ROOT, ""),
        "2 root pages are in use, and the VMs have 1 roots",
    ),
    "a VPID that is taken and forgotten": (
        (TAKE_VPID, f"        machine.vmx_vpids.pop()\n{TAKE_VPID}"),
        "VPIDs",
    ),
}
TEXT = """
doc = "All roots are replaced, and the vCPU uses the new one."
source = "here"
init = ["v0: read 0x10"]
final = ["v0: read 0x10"]
[threads.v0]
vcpu = 0
ops = []
[threads.k]
ops = ["zap 0x10", "zap-all"]
[expect]
needs = "nothing"
"""


@pytest.fixture
def test_file(tmp_path: Path) -> str:
    path = tmp_path / "replaced.toml"
    path.write_text(TEXT)
    return str(path)


def test_nothing_is_left_over(test_file: str) -> None:
    test = load_test(test_file)
    assert explore_verdict(test, named_policy("linux-7.3")).complete
    assert not run_test(test, named_policy("linux-7.3"), 5).kinds


@pytest.mark.parametrize("name", LEAKS)
def test_each_leak_is_found(name: str, test_file: str, tmp_path: Path) -> None:
    edit, text = LEAKS[name]
    policy = named_policy(written(tmp_path, edited(edit)))
    found = explore_verdict(load_test(test_file), policy, Plan(executions=50))
    assert (found.verdict, found.kinds) == (VIOLATIONS, ("leak",))
    assert found.counterexample is not None
    assert found.counterexample.violation is not None
    assert text in found.counterexample.violation["text"]


def test_a_leak_is_found_on_real_threads(test_file: str, tmp_path: Path) -> None:
    edit, text = LEAKS["tables that are never freed"]
    outcome = run_test(load_test(test_file), named_policy(written(tmp_path, edited(edit))), 2, stop_at=1)
    assert outcome.kinds == {"leak": 1}
    assert text in outcome.reports[0].text


def test_a_leak_is_no_other_policys(
    test_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pages stay in use when the VMs are gone, so the next policy gets a machine of its own."""
    edit, _ = LEAKS["tables that are never freed"]
    bad, good = written(tmp_path, edited(edit)), "linux-7.3"
    for order in ([bad, good], [good, bad, "root-tlb-gen"]):
        policies = [f"--policy={policy}" for policy in order]
        assert main(["litmus", test_file, "--iterations", "3", "--jobs", "1", "--json", *policies]) == 1
        found = {one["policy"]: one["violations"] for one in json.loads(capsys.readouterr().out)["outcomes"]}
        assert [name for name in order if found[name]] == [bad]


def test_a_leak_can_be_expected_replayed_and_explained(
    test_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, text = LEAKS["a reference that is never put"]
    policy = written(tmp_path, edited(edit))
    assert main(["explore", test_file, "--policy", policy, "--output", str(tmp_path / "found")]) == 1
    (path,) = (tmp_path / "found").iterdir()
    assert json.loads(path.read_text())["violation"]["kinds"] == ["leak"]
    capsys.readouterr()
    assert main(["explore", "--replay", str(path)]) == 1
    assert text in capsys.readouterr().out
    assert main(["explain", str(path)]) == 0
    assert text in " ".join(capsys.readouterr().out.split())
    Path(test_file).write_text(TEXT + '"slot_delete=zap-slot-leafs" = ["leak"]\n')
    assert load_test(test_file).expect.policies == {"slot_delete=zap-slot-leafs": ("leak",)}
