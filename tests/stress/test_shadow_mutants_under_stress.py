"""Mutants of the shadow MMU are caught on real threads, where guests edit their tables all the time.

Each needs another part of the guest OS: batches that it invalidates by a switch or by INVPCID, entries that
lose a right, SMM, 2 MiB pages that are logged, tables of each process for the kernel's pages, interrupts that
are off.  A run ends at its first violation.  The clean runs are in tests/emulator/test_scenarios.py.
"""

from __future__ import annotations

import threading

import pytest

from emulator.job.job import Job
from emulator.policy import preset
from emulator.scenario.config import load_scenario

SECONDS = 20.0
SEEDS = range(1, 9)


@pytest.mark.stress
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("scenario", "mutant", "kind", "precondition"),
    [
        ("table-churn", "shadow-switch-without-sync", "guest-stale", "guest_switches"),
        ("table-churn", "shadow-invpcid-retains-roots", "guest-stale", "guest_invalidations"),
        ("table-churn", "shadow-sync-keeps-rights", "guest-stale", "guest_invalidations"),
        ("table-churn", "shadow-smm-keeps-paging", "guest-stale", "vm_entries"),
        ("huge-churn", "shadow-log-skips-huge", "lost-dirty", "guest_invalidations"),
        ("table-churn", "shadow-invlpg-current-only", "guest-stale", "guest_switches"),
        ("late-threads", "shadow-invlpg-without-flush", "use-after-free", "guest_invalidations"),
        ("log-toggles", "shadow-recover-without-flush", "stale-after-revoke", "frames_freed"),
    ],
)
def test_mutant_is_caught(scenario: str, mutant: str, kind: str, precondition: str) -> None:
    is_caught(scenario, mutant, kind, precondition)


@pytest.mark.stress
@pytest.mark.timeout(300)
def test_a_sync_without_its_flush_is_caught_where_kvm_is_slow() -> None:
    """Another vCPU must use a page between the flush that protects its table and the sync that drops its
    SPTE: some microseconds, without delays."""
    is_caught("late-threads", "shadow-sync-without-flush", "use-after-free", "guest_invalidations", chaos=30)


def is_caught(scenario: str, mutant: str, kind: str, precondition: str, chaos: int = 0) -> None:
    # Real races on a machine that others may use: a run that met none gets another seed.
    for seed in SEEDS:
        job = Job(
            load_scenario(scenario),
            preset(f"mutant:{mutant}"),
            seed=seed,
            duration=SECONDS,
            stop_at_violation=True,
            chaos=chaos,
        )
        result = job.run(lambda snapshot: None, threading.Event())
        if result.verdict == "violations":
            break
    assert result.failure == ""
    assert result.verdict == "violations"
    assert kind in {kind for report in result.reports for kind in report.kinds}
    assert result.snapshot.counters[precondition] > 0
