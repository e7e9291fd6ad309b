"""Mutants of nested VMX are caught on real threads, where L1 edits its EPTs and changes VPIDs all the time.

A run ends at its first violation.  The clean runs are in tests/emulator/test_nested_scenarios.py.
"""

from __future__ import annotations

import threading

import pytest

from emulator.job.job import Job
from emulator.policy import preset
from emulator.scenario.config import load_scenario

SECONDS = 60.0


# Mutant: scenario, kind, and a statistic that shows that its code has run.  Where no vCPU moves and L1 has no
# EPT, no flush of a migration and no tag of another EPT hides a missing one (nested-kinds).
CAUGHT: dict[str, tuple[str, str, str]] = {
    "nested-invept-ignored": ("nested-switch", "l1-stale", "nested_invept"),
    "nested-eptp-switch-keeps-root": ("nested-switch", "l1-stale", "cached_roots"),
    "nested-run-with-wrong-vpid": ("nested-switch", "cross-guest", "nested_run"),
    "nested-table-left-writable": ("nested-switch", "missed-guest-write", "mmu_cache_miss"),
    "nested-ignores-new-vpid": ("nested-kinds", "cross-guest", "nested_run"),
    "nested-transition-without-flush": ("nested-kinds", "cross-guest", "nested_run"),
    "nested-flush-before-switch": ("nested-kinds", "cross-guest", "nested_transition_flushes"),
    "nested-flush-of-wrong-vpid": ("nested-kinds", "cross-guest", "nested_transition_flushes"),
    "nested-invvpid-ignored": ("nested-kinds", "l1-stale", "nested_invvpid"),
    "nested-role-without-guest-mode": ("nested-kinds", "apic-stale", "nested_run"),
}


@pytest.mark.stress
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutant", CAUGHT)
def test_mutant_is_caught(mutant: str) -> None:
    scenario, kind, precondition = CAUGHT[mutant]
    job = Job(
        load_scenario(scenario),
        preset(f"mutant:{mutant}"),
        seed=1,
        duration=SECONDS,
        stop_at_violation=True,
    )
    result = job.run(lambda snapshot: None, threading.Event())
    assert result.failure == ""
    assert result.verdict == "violations"
    assert kind in {kind for report in result.reports for kind in report.kinds}
    assert result.snapshot.kvm(precondition) > 0
