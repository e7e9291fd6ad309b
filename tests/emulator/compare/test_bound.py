"""The cost with perfect knowledge."""

from __future__ import annotations

from emulator.compare.bound import oracle_optimal
from emulator.report.result import FlushCount
from emulator.scenario.costs import load_costs
from native import COUNTER_NAMES
from tests.emulator.canned import snapshot

COSTS = load_costs()


def counters(**changes: int) -> dict[str, int]:
    return {**dict.fromkeys(COUNTER_NAMES, 0), **changes}


def test_only_necessary_flushes_at_the_narrowest_scope() -> None:
    flushes = (
        FlushCount(0, "invept_global", "migration", 100, 7),
        FlushCount(1, "invept_single", "root_load", 20, 1),
        FlushCount(1, "invvpid_single", "migration", 50, 3),
        FlushCount(1, "invept_global", "remote_zap", 9, 0),
    )
    bound = oracle_optimal(snapshot(counters=counters(), flushes=flushes), COSTS)
    assert (bound.invept_single, bound.invvpid_address, bound.flushes) == (8, 3, 11)
    assert bound.cycles == 8 * COSTS.invept_single.cycles + 3 * COSTS.invvpid_address.cycles


def test_only_interruptions_that_a_necessary_flush_needed() -> None:
    some = counters(interruptions=50, necessary_interruptions=4, ipis_sent=90, ipis_received=90)
    bound = oracle_optimal(snapshot(counters=some, flushes=()), COSTS)
    each = COSTS.ipi_send.cycles + COSTS.ipi_receive.cycles + COSTS.vm_exit_entry.cycles
    assert bound.interruptions == 4
    assert bound.cycles == 4 * each


def test_two_flushes_of_one_interruption_need_one() -> None:
    some = counters(interruptions=3, necessary_interruptions=5)
    assert oracle_optimal(snapshot(counters=some, flushes=()), COSTS).interruptions == 3


def test_only_stale_entries_are_filled_again() -> None:
    some = counters(refills=1000, averted=10, l2_misses=2000, walk_references=8000)
    bound = oracle_optimal(snapshot(counters=some, flushes=()), COSTS)
    assert bound.refills == 10
    assert bound.cycles == 10 * 4 * COSTS.walk_reference.cycles


def test_a_run_without_anything_costs_nothing() -> None:
    assert oracle_optimal(snapshot(counters=counters(), flushes=()), COSTS).cycles == 0
