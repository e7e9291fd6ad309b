"""Bugs that KVM had, each as a patch of emulator/kvm: a shipped test refutes it with a readable story, and
proves nothing wrong without it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from emulator.explore.results.verdict import Plan, Verdict, explore_verdict
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import FAILED, VIOLATIONS
from tests.emulator.policy.patch.edits import edited, written

pytestmark = pytest.mark.slow

CAUGHT = Plan(executions=1500)
CLEAN = Plan(executions=250)


class Bug(NamedTuple):
    """A bug, the test that catches it, and a part of its report.

    edits: the texts before and after; none if `policy` has the bug.  story: in the report or in the failure.
    """

    test: str
    edits: tuple[tuple[str, str], ...]
    kind: str
    story: str
    policy: str = "linux-7.3"


BUGS = {
    # 52ac8b358b0c (5.15): the update waits while an invalidation is between its start and its end.
    "memslot update amid an invalidation": Bug(
        "slot-waits",
        (
            (
                """            if kvm.mn_active_invalidate_count:
                cpu.stat(kvm.id, lib.STAT_SLOT_WAITS)
                kvm.mn_memslots_update = (install, cpu.id)
            else:
                install()
""",
                "            install()\n",
            ),
        ),
        FAILED,
        "v0: 'read 0x10' is refused for ever",
    ),
    # The follow-up of 527d5cd7eece (5.18): previous roots were freed iff the current one was obsolete.
    "obsolete previous root": Bug(
        "root-previous-obsolete",
        (
            (
                "        kvm_mmu_free_roots(cpu, vcpu.kvm, mmu, is_obsolete_root)\n",
                """        obsolete = mmu.root is not None and is_obsolete_root(mmu.root)
        kvm_mmu_free_roots(cpu, vcpu.kvm, mmu, lambda root: obsolete)
""",
            ),
        ),
        "leak",
        "as its previous root 1: the root is obsolete, and no request to free it is pending",
        "linux-7.3+role_change=keep-roots",
    ),
    # 82d811ff566f: the sample was sign-extended when it was compared.
    "mmu_invalidate_seq in an int": Bug(
        "fault-seq-wraps",
        (
            (
                "    fault.mmu_seq = lib.mmu_invalidate_seq(cpu.m, kvm.id)\n    if slot is None:\n",
                """    sample = lib.mmu_invalidate_seq(cpu.m, kvm.id) & 0xFFFFFFFF
    fault.mmu_seq = sample | (0xFFFFFFFF00000000 if sample >> 31 else 0)
    if slot is None:
""",
            ),
        ),
        "deadlock",
        "v0 in handle_ept_violation() waits for a change of mmu_invalidate_seq",
    ),
    # edb298c663fc (5.15), 6d3085e4d89a (6.1)
    "kvm_zap_gfn_range() without the sequence bump": Bug(
        "zap-range-fault", (), "stale-after-revoke", "kvm_zap_gfn_range returned", "mutant:Z1"
    ),
    # The processor refuses a descriptor without the number of levels: VMfail, and nothing is invalidated.
    "INVEPT fails": Bug(
        "root-recycled",
        (("VMX_EPTP_MT_WB | levels | VMX", "VMX_EPTP_MT_WB | VMX"),),
        "foreign-root",
        "root 0x1 is freed",
    ),
}


def explored(bug: Bug, policy: str, plan: Plan) -> Verdict:
    return explore_verdict(load_test(bug.test), named_policy(policy), plan)


@pytest.mark.parametrize("name", BUGS)
def test_the_bug_is_caught(name: str, tmp_path: Path) -> None:
    bug = BUGS[name]
    policy = bug.policy
    if bug.edits:
        policy += "+" + written(tmp_path, edited(*bug.edits))
    found = explored(bug, policy, CAUGHT)
    if bug.kind == FAILED:
        assert (found.verdict, bug.story in found.failure) == (FAILED, True)
        return
    assert (found.verdict, found.kinds[:1]) == (VIOLATIONS, (bug.kind,))
    assert found.counterexample is not None
    assert found.counterexample.violation is not None
    assert bug.story in found.counterexample.violation["text"]


@pytest.mark.parametrize("name", BUGS)
def test_without_the_bug_nothing_is_found(name: str) -> None:
    bug = BUGS[name]
    found = explored(bug, bug.policy if bug.edits else "linux-7.3", CLEAN)
    assert found.verdict not in (VIOLATIONS, FAILED)
    assert found.met
