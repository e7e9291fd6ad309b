"""A check for a retry reads the end of an invalidation, unless that end cannot change its result.

Threads of samples, checks and invalidations, without mmu_lock, have the results of all interleavings also in
the reduced search, and steps that it calls independent commute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from emulator.explore.audit.independence import IndependenceCheck
from emulator.explore.engine.scheduler import Execution
from emulator.explore.machine import footprints
from emulator.explore.machine.control import Control
from emulator.explore.machine.lib import instrument
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.search import Found, Limits, search
from native import lib
from native.types import Gfn, InvalidateSeq, VmId
from tests.emulator.explore.test_planted_states import VM0, Script, Scripted, World

CHECK = "mmu_invalidate_retry_gfn"


class Told(Scripted):
    """The outcome is all that the threads have found."""

    def start(self, execution: Execution) -> None:
        self.told: dict[int, list[int]] = {}
        super().start(execution)

    def finish(self, execution: Execution) -> str:
        self.control.execution = None
        return f"{sorted(self.told.items())} {lib.mmu_invalidate_in_progress(self.machine.m, VM0)}"


def tell(world: World, value: int) -> None:
    program = world.program
    assert isinstance(program, Told)
    program.told.setdefault(int(world.cpu), []).append(value)


def faults(gfn: int, checks: int = 2, *, ahead: int = 0) -> Script:
    """ahead: added to the sample, as no code of KVM's does."""

    def script(world: World) -> None:
        seq = InvalidateSeq(world.lib.mmu_invalidate_seq(world.m, VM0) + ahead)
        for _ in range(checks):
            tell(world, int(world.lib.mmu_invalidate_retry_gfn(world.m, VM0, seq, Gfn(gfn))))

    return script


def invalidates(start: int, end: int, *, looks: bool = True) -> Script:
    """looks: whether an earlier invalidation overlaps."""

    def script(world: World) -> None:
        world.lib.mmu_invalidate_begin(world.m, VM0)
        if looks:
            tell(world, int(world.lib.mmu_invalidate_overlaps(world.m, VM0, Gfn(start), Gfn(end))))
        world.lib.mmu_invalidate_range_add(world.m, VM0, Gfn(start), Gfn(end))
        world.lib.mmu_invalidate_end(world.m, VM0)

    return script


def counts(world: World) -> None:
    tell(world, int(world.lib.mmu_invalidate_in_progress(world.m, VM0)))


def prefetches(world: World) -> None:
    seq = world.lib.mmu_invalidate_seq(world.m, VM0)
    tell(world, int(world.lib.mmu_invalidate_retry_range(world.m, VM0, seq, Gfn(0), Gfn(8))))


PROGRAMS: dict[str, tuple[Script, ...]] = {
    "inside": (faults(5), invalidates(4, 6)),
    "beside": (faults(8), invalidates(4, 6)),
    "ahead": (faults(5, checks=1, ahead=1), invalidates(4, 6)),
    "inside of one of two": (faults(5), invalidates(4, 6), invalidates(8, 9)),
    "merged": (faults(5, checks=1), *(invalidates(*one, looks=False) for one in ((4, 6), (8, 9)))),
    "between two": (faults(7, checks=1), invalidates(4, 6), invalidates(8, 9)),
    "two faults": (faults(5, checks=1), faults(8, checks=1), invalidates(4, 6)),
    "counted": (faults(5, checks=1), counts, invalidates(4, 6)),
    "prefetched": (prefetches, invalidates(4, 6), invalidates(8, 9)),
}


def searched(scripts: tuple[Script, ...], *, reduce: bool = True) -> Found:
    program = Told(*scripts)
    try:
        with instrument(program.control):
            strategy = Exhaustive(program.objects, reduce=reduce)
            found = search(program, program.objects, strategy, Limits(first_only=False), lambda _: False)
    finally:
        program.close()
    assert found.complete
    return found


def swapped(scripts: tuple[Script, ...]) -> int:
    """Return the number of differences that swaps of independent neighbours make."""
    program = Told(*scripts)
    check = IndependenceCheck(program, program.objects, seed=1)
    try:
        with instrument(program.control):
            check.run(60, 4)
    finally:
        program.close()
    return check.findings.total()


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_reduced_search_has_all_results(name: str) -> None:
    every, reduced = searched(PROGRAMS[name], reduce=False), searched(PROGRAMS[name])
    assert set(reduced.outcomes) == set(every.outcomes)
    assert len(every.outcomes) > 1
    assert not swapped(PROGRAMS[name])


def test_an_end_that_changes_no_result_is_not_reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = searched(PROGRAMS["inside"]).executions
    monkeypatch.setitem(footprints.FOOTPRINTS, CHECK, footprints.FOOTPRINTS["mmu_invalidate_retry_range"])
    assert narrow < searched(PROGRAMS["inside"]).executions


Plant = Callable[[pytest.MonkeyPatch], None]


def forget(*calls: str, **without: Any) -> Plant:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        for call in calls:
            known = footprints.FOOTPRINTS[call]
            monkeypatch.setitem(footprints.FOOTPRINTS, call, replace(known, **without))

    return plant


def no_sample_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The range alone decides."""

    def end(control: Control, vm: VmId, seq: InvalidateSeq, gfn: Gfn) -> int:
        stays = lib.mmu_invalidate_retry_stays(control.machine.m, vm, InvalidateSeq(0), gfn)
        return 0 if stays else control.bit("mmu_invalidate_seq", vm)

    monkeypatch.setattr(footprints, "COMPUTED", {**footprints.COMPUTED, "invalidate_end": end})


def no_end_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = {**footprints.COMPUTED, "invalidate_end": lambda *_: 0}
    monkeypatch.setattr(footprints, "COMPUTED", computed)


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (no_end_matters, "beside"),
        (no_sample_is_ahead, "ahead"),
        (forget(CHECK, late=()), "beside"),
        (forget("mmu_invalidate_begin", "mmu_invalidate_range_add", reads=()), "merged"),
        (forget("mmu_invalidate_in_progress", reads=()), "counted"),
        (forget("mmu_invalidate_retry_range", reads=()), "prefetched"),
        (forget("mmu_invalidate_end", writes=()), "inside"),
    ],
)
def test_a_footprint_that_is_too_fine_is_found(
    plant: Plant, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert swapped(PROGRAMS[name])
