"""Bugs that KVM had, each as a mutant: a shipped test refutes it with a readable story, and
proves nothing wrong without it."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import FAILED, VIOLATIONS
from emulator.policy import MUTANTS, preset

pytestmark = pytest.mark.slow

CAUGHT = Plan(executions=1500)
CLEAN = Plan(executions=250)


class Bug(NamedTuple):
    """A mutant, the test that catches it, its violation, and a part of its report."""

    mutant: str
    test: str
    kind: str
    story: str


BUGS = (
    # 52ac8b358b0c (5.15): the update waits while an invalidation is between its start and its end.
    Bug(
        "slot-update-unawaited",
        "slot-waits-fault",
        "deadlock",
        "v0 in handle_ept_violation() waits for a change of mmu_invalidate_seq",
    ),
    # The follow-up of 527d5cd7eece (5.18): previous roots were freed iff the current one was obsolete.
    Bug(
        "previous-root-outlives",
        "root-previous-obsolete",
        "leak",
        "as its previous root 1: the root is obsolete, and no request to free it is pending",
    ),
    # 82d811ff5665: the sample was sign-extended when it was compared.
    Bug(
        "sequence-in-int",
        "fault-seq-wraps",
        "deadlock",
        "v0 in handle_ept_violation() waits for a change of mmu_invalidate_seq",
    ),
    # edb298c663fc (5.15), 6d3085e4d89a (6.1)
    Bug("zap-range-not-counted", "zap-range-fault", "stale-after-revoke", "kvm_zap_gfn_range returned"),
    # The processor refuses the descriptor: VMfail, and nothing is invalidated.
    Bug("invept-of-root-address", "root-recycled", "foreign-root", "INVEPT single of 0x1000"),
)


@pytest.mark.parametrize("bug", BUGS, ids=[bug.mutant for bug in BUGS])
def test_the_bug_is_caught(bug: Bug) -> None:
    found = explore_verdict(load_test(bug.test), named_policy(f"mutant:{bug.mutant}"), CAUGHT)
    assert (found.verdict, found.kinds[:1]) == (VIOLATIONS, (bug.kind,))
    assert found.counterexample is not None
    assert found.counterexample.violation is not None
    assert bug.story in found.counterexample.violation["text"]
    assert MUTANTS[bug.mutant].expected == (bug.kind,)


@pytest.mark.parametrize("bug", BUGS, ids=[bug.mutant for bug in BUGS])
def test_without_the_bug_nothing_is_found(bug: Bug) -> None:
    mutant = MUTANTS[bug.mutant]
    policy = preset(mutant.base).with_settings(mutant.settings)
    found = explore_verdict(load_test(bug.test), policy, CLEAN)
    assert found.verdict not in (VIOLATIONS, FAILED)
    assert found.met
