"""Range walks over SPTEs."""

from __future__ import annotations

import pytest

from native import ffi, lib
from native.types import ReportNumber
from tests.native.memory_rig import (
    ACCESSED,
    CPU,
    HUGE,
    HUGE_GFN,
    MMU_WRITABLE,
    PRESENT,
    WRITABLE,
    Rig,
    map_huge,
    map_page,
)


def test_zap_root_in_passes(rig: Rig) -> None:
    """tdp_mmu_zap_root(): each pass removes the SPTEs of its level and leaves those above."""
    map_huge(rig)
    for gfn in (1, 2, 1030):
        map_page(rig, gfn)
    passes = []
    for level in (1, 2, 3, rig.root_level):
        passes.append(rig.zap(rig.chunk(lib.TDP_ZAP_LEVEL, 0, 1 << 60, level=level, shared=1)))
    assert passes == [(3, 3, 0), (3, 512, 2), (1, 0, 1), (1, 0, rig.root_level - 3)]
    assert {rig.right(gfn) for gfn in range(2048)} == {0}


def test_zap_range_takes_whole_tables(rig: Rig) -> None:
    """zap_gfn_range() up to 5.17."""
    for gfn in (510, 511, 512, 1023, 1024, 1025):
        map_page(rig, gfn)
    assert rig.zap(rig.chunk(lib.TDP_ZAP_RANGE, 511, 1025)) == (3, 4, 1)
    assert [gfn for gfn in range(2048) if rig.right(gfn)] == [510, 1025]


def test_the_link_of_a_zapped_table_may_stay_frozen(rig: Rig) -> None:
    """tdp_mmu_zap_spte_atomic() to 6.12."""
    map_page(rig, 512)
    chunk = rig.step(rig.chunk(lib.TDP_ZAP_RANGE, 512, 1024, shared=1, freeze=1))
    assert (chunk.changed, chunk.pages, chunk.found_level, chunk.found_gfn) == (1, 0, 2, 512)
    assert lib.spte_read(rig.m, chunk.found_table, chunk.found_index) == lib.FROZEN_SPTE
    assert rig.right(512) == 3, "until the table is taken apart"


@pytest.mark.parametrize("shared", [0, 1])
def test_access_tracking(rig: Rig, shared: int) -> None:
    """mark_spte_for_access_track(): absent for the CPU, present for KVM; only W is gone for good."""
    spte = map_page(rig, 5)
    chunk = rig.step(rig.chunk(lib.TDP_ACCESS_TRACK, shared=1))
    assert (chunk.changed, chunk.flush) == (1, 0)
    table, level, tracked = rig.walk(5)
    assert level == 1
    assert not tracked & (PRESENT | WRITABLE)
    assert tracked >> lib.SPTE_ACC_TRACK_SAVED_SHIFT & 7 == lib.SPTE_READABLE | lib.SPTE_EXECUTABLE
    assert rig.right(5) == 1, "nobody was promised anything about reads"
    assert rig.step(rig.chunk(lib.TDP_ACCESS_TRACK, shared=1)).changed == 0
    chunk = rig.step(rig.chunk(lib.TDP_WRPROT, shared=shared))
    assert (chunk.changed, chunk.already) == (0, 1)
    assert rig.set_atomic(table, 1, 5, tracked, spte) == 0, "a fast page fault restores it"
    assert rig.right(5) == 3
    rig.step(rig.chunk(lib.TDP_ACCESS_TRACK, shared=1))
    chunk = rig.step(rig.chunk(lib.TDP_ZAP_LEAFS, shared=shared))
    assert (chunk.changed, chunk.flush) == (1, 1)
    assert rig.right(5) == 0


def test_the_changed_sptes_are_told_as_they_were(rig: Rig) -> None:
    """tdp_iter's old_spte: by a policy that flushes for some SPTEs only."""
    writable, read_only = map_page(rig, 1), map_page(rig, 2, writable=False)
    rig.step(rig.chunk(lib.TDP_AGE, 1, 2, shared=1))
    aged = writable & ~ACCESSED
    chunk = rig.chunk(lib.TDP_ZAP_LEAFS, 1, 3, most_changed=1)
    assert [rig.step(chunk).old_spte, rig.step(chunk).old_spte] == [aged, read_only]
    map_page(rig, 1)
    map_page(rig, 2, writable=False)
    both = rig.step(rig.chunk(lib.TDP_ZAP_LEAFS, 1, 3)).old_spte
    assert both & ACCESSED
    assert both & WRITABLE
    assert rig.step(rig.chunk(lib.TDP_ZAP_LEAFS, 1, 3)).old_spte == 0


def test_partial_zap_of_a_huge_page_takes_it_whole(rig: Rig) -> None:
    map_huge(rig)
    chunk = rig.step(rig.chunk(lib.TDP_ZAP_LEAFS, HUGE_GFN + 100, HUGE_GFN + 101))
    assert (chunk.changed, chunk.pages, chunk.done) == (1, 512, 1)
    assert rig.right(HUGE_GFN) == 0


def test_write_protection_counts(rig: Rig) -> None:
    for gfn in range(10):
        map_page(rig, gfn, writable=gfn % 2 == 0)
    chunk = rig.step(rig.chunk(lib.TDP_WRPROT, shared=1))
    assert (chunk.changed, chunk.flush, chunk.already) == (5, 5, 5)
    chunk = rig.step(rig.chunk(lib.TDP_WRPROT, shared=1))
    assert (chunk.changed, chunk.flush, chunk.already) == (0, 0, 10)
    assert {rig.right(gfn) for gfn in range(10)} == {1}
    assert rig.walk(0)[2] & MMU_WRITABLE, "so that a fast page fault can give it back"


def test_write_protection_of_huge_pages_only(rig: Rig) -> None:
    map_huge(rig)
    map_page(rig, 5)
    chunk = rig.step(rig.chunk(lib.TDP_WRPROT, level=2))
    assert (chunk.changed, chunk.pages) == (1, 512)
    assert (rig.right(5), rig.right(HUGE_GFN)) == (3, 1)


@pytest.mark.parametrize("walk", [lib.TDP_ZAP_LEAFS, lib.TDP_WRPROT])
def test_a_walk_by_single_changes(rig: Rig, walk: int) -> None:
    for gfn in (3, 4, 700):
        map_page(rig, gfn)
    chunk = rig.chunk(walk, most_changed=1)
    seen = []
    while not chunk.done:
        rig.step(chunk)
        seen.append((chunk.changed, chunk.next_gfn))
    assert seen == [(1, 4), (1, 5), (1, 701), (0, rig.gfns)]


def test_sptes_looked_at_are_counted(rig: Rig) -> None:
    map_page(rig, 3)
    chunk = rig.chunk(lib.TDP_ZAP_LEAFS, 0, 100, most_changed=1)
    assert [rig.step(chunk).looked_at for _ in range(2)] == [4, 96]


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_clear_dirty_masked(rig: Rig, most: int) -> None:
    for gfn in range(60, 140):
        map_page(rig, gfn)
    chunk = rig.chunk(lib.TDP_CLEAR_DIRTY, 64, 128, mask=1 << 63 | 0b1011)
    changed = 0
    while not chunk.done:
        changed += rig.step(chunk, most).changed
    assert changed == 4
    assert [gfn for gfn in range(60, 140) if rig.right(gfn) == 1] == [64, 65, 67, 127]


def test_age(rig: Rig) -> None:
    map_page(rig, 5)
    map_page(rig, 7)
    for young in (2, 0):
        chunk = rig.step(rig.chunk(lib.TDP_AGE, shared=1))
        assert (chunk.changed, chunk.young) == (young, young)
    assert (rig.right(5), rig.walk(5)[2] & ACCESSED) == (3, 0)


def test_frozen_sptes_end_a_shared_chunk(rig: Rig) -> None:
    for gfn in (3, 4, 5):
        map_page(rig, gfn)
    table, _, spte = rig.walk(4)
    rig.set(table, 1, 4, lib.FROZEN_SPTE)
    chunk = rig.step(rig.chunk(lib.TDP_ZAP_LEAFS, shared=1))
    assert (chunk.changed, chunk.next_gfn, chunk.done) == (1, 4, 0)
    assert (rig.step(chunk).changed, chunk.done) == (0, 0)
    assert rig.step(rig.chunk(lib.TDP_AGE, shared=1)).done, "aging passes over it"
    assert rig.walk(4)[2] == lib.FROZEN_SPTE
    rig.set(table, 1, 4, spte)
    assert (rig.step(chunk).changed, chunk.done) == (2, 1)


def test_find(rig: Rig) -> None:
    map_page(rig, 5)
    spte = map_huge(rig)
    chunk = rig.step(rig.chunk(lib.TDP_FIND_HUGE))
    assert (chunk.found_level, chunk.found_gfn, chunk.found_spte) == (2, HUGE_GFN, spte)
    assert lib.spte_read(rig.m, chunk.found_table, chunk.found_index) == spte
    assert (chunk.next_gfn, chunk.done) == (HUGE_GFN + 512, 0)
    assert (rig.step(chunk).found_level, chunk.done) == (0, 1)
    chunk = rig.step(rig.chunk(lib.TDP_FIND_TABLE))
    assert (chunk.found_level, chunk.found_gfn) == (2, 0)
    assert chunk.found_spte & PRESENT
    assert not chunk.found_spte & HUGE
    assert (rig.step(chunk).found_level, chunk.done) == (0, 1)


def test_walk_through_a_freed_table_is_reported(rig: Rig) -> None:
    """Only a mutant frees a table that is linked; a software walk must say so and go no further."""
    map_page(rig, 5)
    table, _, _ = rig.walk(5)
    lib.ept_table_free(rig.m, CPU, table)
    chunk = rig.step(rig.chunk(lib.TDP_ZAP_LEAFS))
    assert (chunk.changed, chunk.done) == (0, 1)
    reports = ffi.new("struct violation_report[]", 4)
    assert lib.oracle_reports(rig.m, ReportNumber(0), reports, 4) == 1
    assert reports[0].kinds == 1 << lib.VIOLATION_WALK_AFTER_FREE
    assert reports[0].hfn == table


def test_a_walk_in_a_freed_root_is_reported(rig: Rig) -> None:
    map_page(rig, 5)
    link = lib.make_nonleaf_spte(rig.m, rig.root)
    assert rig.step(rig.chunk(lib.TDP_COUNT, root_link=link)).changed == 1
    lib.ept_table_free(rig.m, CPU, rig.root)
    chunk = rig.step(rig.chunk(lib.TDP_COUNT, root_link=link))
    assert (chunk.changed, chunk.done) == (0, 1)
    counts = ffi.new("uint64_t[]", lib.VIOLATIONS)
    lib.oracle_counts(rig.m, counts)
    assert counts[lib.VIOLATION_WALK_AFTER_FREE] == 1
