"""Mutants of the shadow MMU are caught on real threads, where guests edit their tables all the time.

shadow_storms.py says by which scenario.  Each scenario has another part of the guest OS: batches that it
invalidates by a switch or by INVPCID, entries that lose a right, SMM, 2 MiB pages that are logged, tables of
each process for the kernel's pages, interrupts that are off.  A run ends at its first violation.  The clean
runs are in tests/emulator/test_scenarios.py.

    pytest tests/stress/test_shadow_mutants_under_stress.py -vv --durations=0

lists how long each mutant took.
"""

from __future__ import annotations

import threading

import pytest

from emulator.job.job import Job
from emulator.policy import MUTANTS, preset
from emulator.scenario.config import load_scenario
from tests.stress.shadow_storms import ARGUED, MISSED, RARE, STORMS

# Of the translations that a missing flush or sync leaves behind, chance uses one first: its page may be taken
# away by the guest or by the host, or may be a page table by now.
STALE = {"guest-stale", "missed-guest-write", "stale-after-revoke", "use-after-free", "walk-after-free"}
SECONDS = 60.0
SEEDS = range(1, 5)


def test_each_mutant_of_the_shadow_mmu_has_a_scenario_or_a_reason() -> None:
    mutants = {name for name in MUTANTS if name.startswith(("shadow-", "reader-"))}
    assert sorted([*STORMS, *RARE, *ARGUED, *MISSED]) == sorted(mutants)


@pytest.mark.stress
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutant", STORMS)
def test_mutant_is_caught(mutant: str) -> None:
    storm = STORMS[mutant]
    # Real races on a machine that others may use: a run that met none gets another seed.
    for seed in SEEDS:
        job = Job(
            load_scenario(storm.scenario),
            preset(f"mutant:{mutant}"),
            seed=seed,
            duration=SECONDS,
            stop_at_violation=True,
            chaos=storm.chaos,
        )
        result = job.run(lambda snapshot: None, threading.Event())
        if result.verdict == "violations":
            break
    assert result.failure == ""
    again = f"flushlab run {storm.scenario} --policy mutant:{mutant} --chaos {storm.chaos} --duration 60s"
    assert result.verdict == "violations", again
    found = {kind for report in result.reports for kind in report.kinds}
    expected = set(MUTANTS[mutant].expected)
    assert found & (expected | (STALE if expected & STALE else set())), f"{found}: {again} --seed {seed}"
    assert result.snapshot.counters[storm.precondition] > 0
