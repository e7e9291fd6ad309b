"""Figures of a run, and the rows that show them."""

from __future__ import annotations

from typing import get_args

import pytest

from emulator.compare.measure import NESTED_STATS, SHADOW_STATS, measure
from emulator.compare.rows import Row, sections, spread_of, text_of
from emulator.compare.table import better, change
from emulator.report.result import FlushCount
from emulator.scenario.config import load_scenario
from emulator.scenario.sections import CostUnit
from tests.emulator.canned import snapshot
from tests.emulator.compare.figures import comparison, partitioned, run_of


def test_figures_are_per_million_accesses_and_per_unit() -> None:
    seen = snapshot(flushes=(FlushCount(0, "invept_global", "migration", 100, 7),))
    counters = {**seen.counters, "accesses": 2_000_000, "ipis_sent": 70, "ipis_vmclear": 20}
    vms = tuple({**vm, "roots_allocated": 5} for vm in seen.vms)
    values = measure(
        run_of("p", now=snapshot(counters=counters, vms=vms, flushes=seen.flushes)), partitioned()
    ).values
    assert values["flushes/M"] == 50
    assert values["scope invept_global/M"] == values["reason migration/M"] == 50
    assert values["necessary share"] == 0.07
    assert values["units"] == 10
    assert values["flushes/unit"] == 10
    assert values["IPIs sent/unit"] == 5, "a migration needs its VMCLEAR under any policy"
    assert values["uninvolved/M"] == 15
    assert values["uninvolved/unit"] == 3
    assert values["received tenants/M"] == 20


def test_flushing_is_apart_from_other_work() -> None:
    run = run_of("p")
    values = measure(run, partitioned()).values
    flush = sum(line.cycles for line in run.cycles if line.group == "flush")
    work = sum(line.cycles for line in run.cycles if line.group == "work")
    million = 1e6 / run.snapshot.counters["accesses"]
    assert values["flush cycles/M"] == pytest.approx(flush * million)
    assert values["work cycles/M"] == pytest.approx(work * million)
    parts = [value for key, value in values.items() if key.startswith("cycles ")]
    assert sum(parts) == pytest.approx(flush * million)


@pytest.mark.parametrize("unit", [*get_args(CostUnit), None])
def test_every_unit_can_be_counted(unit: str | None) -> None:
    values = measure(run_of("p"), load_scenario("migration-storm").changed(unit=unit)).values
    assert ("units" in values) == (unit is not None)


def test_spread_is_over_repetitions() -> None:
    runs = comparison().measurements["linux-7.3"]
    spread = spread_of(runs, "wall seconds")
    assert spread is not None
    assert (spread.least, spread.median, spread.most) == (1.0, 2.0, 3.0)
    assert spread_of(runs, "nonsense") is None


def test_rows_are_those_that_occurred_and_uninvolved_ones_even_if_nobody_was_interrupted() -> None:
    quiet = {"uninvolved/M": 0.0, "uninvolved/unit": 0.0, "scope invept_single/M": 2.0, "reason guest/M": 0.0}
    runs = [measure(run_of("p"), partitioned())]
    runs[0].values.clear()
    runs[0].values.update(quiet)
    keys = [row.key for section in sections([runs], "root allocations") for row in section.rows]
    assert "scope invept_single/M" in keys
    assert "reason guest/M" not in keys
    assert {"uninvolved/M", "uninvolved/unit"} <= set(keys)


def rows_of(title: str, stats: dict[str, int]) -> dict[str, float]:
    """Return the rows of a section for two VMs that have these statistics of paging and nested guests."""
    seen = snapshot()
    counters = {**seen.counters, "accesses": 2_000_000}
    unmoved = dict.fromkeys(SHADOW_STATS + NESTED_STATS, 0)
    vms = tuple({**vm, **unmoved, **stats} for vm in seen.vms)
    runs = [measure(run_of("p", now=snapshot(counters=counters, vms=vms)), partitioned())]
    every = {section.title: section for section in sections([runs], "root allocations")}
    section = every.get(f"{title}, per million guest accesses")
    return {row.key: runs[0].values[row.key] for row in section.rows} if section else {}


def test_rows_of_nested_guests_are_those_that_moved_and_none_without_round_trips() -> None:
    assert rows_of("nested guests", {"nested_invept": 3}) == {}
    found = rows_of("nested guests", {"nested_run": 8, "nested_invept": 3, "nested_roots_freed": 2})
    assert found == {"nested_run/M": 8, "nested_invept/M": 3, "nested_roots_freed/M": 2}


def test_rows_of_shadow_paging_are_those_that_moved_and_none_with_ept() -> None:
    def keys(**stats: int) -> dict[str, float]:
        return rows_of("shadow paging", stats)

    assert keys(mmu_load=7, cached_roots=3) == {}, "SMM switches roots, too"
    found = keys(mmu_cache_miss=4, mmu_pte_write=2, mmu_synced=6, mmu_load=1, cached_roots=9, mmu_recycled=5)
    assert found == {
        "mmu_pte_write/M": 2,
        "mmu_synced/M": 6,
        "mmu_cache_miss/M": 4,
        "mmu_recycled/M": 5,
        "mmu_load/M": 1,
        "cached_roots/M": 9,
    }


@pytest.mark.parametrize(
    ("now", "before", "text"),
    [
        (112, 100, "+12%"),
        (97, 100, "-3%"),
        (420, 100, "x4.2"),
        (100, 100, "="),
        (100.1, 100, "="),
        (5, 0, "new"),
    ],
)
def test_changes_read_at_a_glance(now: float, before: float, text: str) -> None:
    assert change(now, before) == text


def test_better_depends_on_the_row() -> None:
    less, more, neither = Row("k", "l"), Row("k", "l", less=False), Row("k", "l", less=None)
    assert [better(row, 50, 100) for row in (less, more, neither)] == [True, False, None]
    assert better(less, 99, 100) is None, "within what repetitions differ by"


def test_texts() -> None:
    assert text_of(Row("k", "l", "share"), 0.0521) == "5.21 %"
    assert text_of(Row("k", "l", "duration"), 0.0021) == "2.1 ms"
    assert text_of(Row("k", "l", "times"), 43.47) == "43.5 x"
    assert text_of(Row("k", "l"), 12345) == "12.3k"
