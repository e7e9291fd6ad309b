"""Mutants of nested VMX are caught on real threads, where L1 edits its EPTs and changes VPIDs all the time.

A run ends at its first violation.  The clean runs are in tests/emulator/test_nested_scenarios.py.
"""

from __future__ import annotations

import threading

import pytest

from emulator.job.job import Job
from emulator.policy import MUTANTS, preset
from emulator.scenario.config import load_scenario

SECONDS = 60.0
SEEDS = range(1, 5)
# Of the translations that a missing flush leaves behind, chance uses one first: its page may be freed, only
# zapped, or write-protected, L1 may have taken it away, or its VPID may be another nested guest's by then.
STALE = {
    "cross-guest",
    "guest-stale",
    "l1-stale",
    "missed-guest-write",
    "stale-after-revoke",
    "use-after-free",
}


# Mutant: scenario, kind, and a statistic that shows that its code has run.  Where no vCPU moves and L1 has no
# EPT, no flush of a migration and no tag of another EPT hides a missing one (nested-kinds).
CAUGHT: dict[str, tuple[str, str, str]] = {
    "nested-invept-ignored": ("nested-switch", "l1-stale", "nested_invept"),
    "nested-eptp-switch-keeps-root": ("nested-switch", "l1-stale", "cached_roots"),
    "nested-run-with-wrong-vpid": ("nested-switch", "cross-guest", "nested_run"),
    "nested-table-left-writable": ("nested-switch", "missed-guest-write", "mmu_cache_miss"),
    "nested-zap-forgets-flush": ("nested-switch", "stale-after-revoke", "zaps"),
    "nested-unmap-forgets-flush": ("nested-overcommit", "use-after-free", "nested_run"),
    "nested-move-judged-by-vcpu": ("nested-overcommit", "guest-stale", "migrations"),
    "nested-move-flushes-one-mmu": ("nested-overcommit", "guest-stale", "migrations"),
    "nested-ignores-new-vpid": ("nested-kinds", "cross-guest", "nested_run"),
    "nested-transition-without-flush": ("nested-kinds", "cross-guest", "nested_run"),
    "nested-flush-before-switch": ("nested-kinds", "cross-guest", "nested_transition_flushes"),
    "nested-flush-of-wrong-vpid": ("nested-kinds", "cross-guest", "nested_transition_flushes"),
    "nested-invvpid-ignored": ("nested-kinds", "l1-stale", "nested_invvpid"),
    "nested-address-under-wrong-vpid": ("nested-kinds", "l1-stale", "nested_invvpid"),
    "nested-invvpid-by-invept": ("nested-kinds", "l1-stale", "nested_invvpid"),
    "nested-invept-compares-flags": ("nested-kinds", "l1-stale", "nested_invept"),
    "nested-role-without-guest-mode": ("nested-kinds", "apic-stale", "nested_run"),
    "nested-without-rmaps": ("nested-kinds", "stale-after-revoke", "nested_run"),
}
_NO_VMFUNC = "no nested guest executes VMFUNC"
_NO_FAILURE = "no VM entry of L1's fails"
_NO_CLEANING = "L1 clears no flags of its EPT"
_NO_SECOND_EPTP = "L1 has one EPTP for each EPT"
_NO_APIC = "the scenarios with nested guests have no APIC of L1's own"
# Mutants that only litmus tests find, and what the scenarios lack.
MISSED: dict[str, str] = {
    "nested-apic-page-mapped": _NO_APIC,
    "nested-apic-reload-wrong-vmcs": _NO_APIC,
    "nested-failed-entry-keeps-request": _NO_FAILURE,
    "nested-failed-entry-without-flush": _NO_FAILURE,
    "nested-flush-of-source-root": "no L1 has EPTs for its guests without VPIDs",
    "nested-guest-request-left": _NO_FAILURE,
    "nested-sync-ignores-accessed": _NO_CLEANING,
    "nested-sync-ignores-dirty": _NO_CLEANING,
    "nested-invept-current-only": "L1 changes only the EPT in use, and invalidates that one",
    "nested-violation-current-only": _NO_SECOND_EPTP,
    "nested-violation-without-sync": "L1 gives no page of its guests another frame without INVEPT",
    "nested-vmfunc-keeps-root": _NO_VMFUNC,
    "nested-invvpid-keeps-roots": "KVM has EPT in all of them",
    "nested-invvpid-on-wrong-pcpu": "a migration of linux-7.3 flushes all contexts",
    "nested-last-vpid-outlives-vmxoff": "without a flush for migrations other uses go wrong first",
    "nested-obsolete-roots-stay": "no memslot of nested guests is deleted",
    "nested-store-not-tracked": "L1 unlinks no table of an EPT",
    "nested-transition-syncs-one-root": "KVM has EPT in all of them",
}


def test_each_nested_mutant_is_caught_or_has_a_reason() -> None:
    assert not CAUGHT.keys() & MISSED.keys()
    assert CAUGHT.keys() | MISSED.keys() == {name for name in MUTANTS if name.startswith("nested-")}


@pytest.mark.stress
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutant", CAUGHT)
def test_mutant_is_caught(mutant: str) -> None:
    scenario, kind, precondition = CAUGHT[mutant]
    # Real races on a machine that others may use: a run that met none gets another seed.
    for seed in SEEDS:
        job = Job(
            load_scenario(scenario),
            preset(f"mutant:{mutant}"),
            seed=seed,
            duration=SECONDS,
            stop_at_violation=True,
        )
        result = job.run(lambda snapshot: None, threading.Event())
        if result.verdict == "violations":
            break
    assert result.failure == ""
    assert result.verdict == "violations"
    found = {kind for report in result.reports for kind in report.kinds}
    assert found & ({kind, *MUTANTS[mutant].expected} | (STALE if kind in STALE else set())), found
    assert result.snapshot.kvm(precondition) > 0
