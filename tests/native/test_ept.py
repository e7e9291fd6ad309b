"""SPTEs, tables and range walks: single cases, and random programs against a plain dict."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from memory_rig import (
    ACCESSED,
    CPU,
    CUSTODY_MASK,
    DIRTY,
    HUGE,
    MMU_WRITABLE,
    PRESENT,
    RCU_CPU,
    WRITABLE,
    Rig,
    index_of,
    map_page,
)

from native import ffi, lib

HUGE_GFN = 512  # a 2M range of the rig's 2048 gfns that tests map huge


@pytest.fixture(params=[4, 5])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with Rig(root_level=request.param) as machine:
        yield machine


def map_huge(rig: Rig, gfn: int = HUGE_GFN) -> int:
    rig.fault(gfn)
    assert lib.mm_collapse(rig.m, CPU, 0, gfn) == 0
    page = rig.fault(gfn)
    table, old = rig.link(gfn, 2)
    spte = int(lib.make_spte(page.hfn, page.tag, 2, 1, 1))
    assert rig.set_atomic(table, 2, gfn, old, spte) == 0
    return spte


def test_make_spte() -> None:
    spte = lib.make_spte(0xABCDEF, 0x7ABC, 1, 1, 1)
    assert spte >> lib.SPTE_HFN_SHIFT & 0xFFFFFF == 0xABCDEF
    assert (spte & CUSTODY_MASK) >> lib.SPTE_CUSTODY_SHIFT == 0x7ABC
    assert spte & (WRITABLE | ACCESSED | DIRTY | HUGE) == WRITABLE | ACCESSED | DIRTY
    assert lib.make_spte(1, 0, 2, 1, 1) & HUGE
    for writable, host_writable in ((0, 1), (1, 0)):
        spte = lib.make_spte(1, 0, 1, writable, host_writable)
        assert not spte & (WRITABLE | DIRTY | MMU_WRITABLE)
        assert spte >> lib.SPTE_HOST_WRITABLE_BIT & 1 == host_writable
    assert not lib.FROZEN_SPTE & PRESENT


def test_nonleaf_carries_the_tag_of_its_table(rig: Rig) -> None:
    table = rig.table()
    lib.ept_table_free(rig.m, CPU, table)
    assert rig.table() == table
    spte = lib.make_nonleaf_spte(rig.m, table)
    assert (spte & CUSTODY_MASK) >> lib.SPTE_CUSTODY_SHIFT == lib.frame_tag_of(rig.m, table) == 1
    assert spte & PRESENT == PRESENT
    assert not spte & HUGE


def test_rights_come_and_go_with_the_spte(rig: Rig) -> None:
    spte = map_page(rig, 5)
    table, _, _ = rig.walk(5)
    hfn = rig.fault(5).hfn
    tag = lib.frame_tag_of(rig.m, hfn)
    assert (rig.right(5), rig.hfn(5)) == (3, hfn)
    assert rig.set_atomic(table, 1, 5, spte, spte & ~WRITABLE) == 0
    assert rig.right(5) == 1
    assert lib.frame_tag_of(rig.m, hfn) == tag + 1
    assert rig.set_atomic(table, 1, 5, spte & ~WRITABLE, spte) == 0, "fast page fault"
    assert rig.right(5) == 3
    assert lib.frame_tag_of(rig.m, hfn) == tag + 1, "nothing was lost"
    assert rig.set_atomic(table, 1, 5, 0, spte) == lib.MACHINE_AGAIN
    assert rig.right(5) == 3
    assert rig.set_atomic(table, 1, 5, spte, lib.FROZEN_SPTE) == 0
    assert rig.right(5) == 0
    assert lib.frame_tag_of(rig.m, hfn) == tag + 2
    assert rig.count(lib.COUNT_SPTES_MAPPED) == rig.count(lib.COUNT_SPTES_ZAPPED) == 1
    kinds = [kind for kind, gfn, _ in rig.events() if gfn == 5]
    assert kinds == [lib.EVENT_MAP, lib.EVENT_PROTECT, lib.EVENT_ZAP]


def test_exclusive_step_returns_what_was_there(rig: Rig) -> None:
    spte = map_page(rig, 5)
    table, _, _ = rig.walk(5)
    assert rig.set(table, 1, 5, spte & ~WRITABLE) == spte
    assert rig.set(table, 1, 5, 0) == spte & ~WRITABLE
    assert rig.right(5) == 0


def test_wrong_arguments_are_refused(rig: Rig) -> None:
    spte = map_page(rig, 5)
    table, _, _ = rig.walk(5)
    other = lib.make_spte(rig.fault(6).hfn, 0, 1, 1, 1)
    for arguments, text in (
        ((table, 1, 5, spte, other), "another frame"),
        ((rig.fault(5).hfn, 1, 5, 0, other), "not a table"),
        ((table, 6, 5, 0, other), "level"),
        ((table, 1, 1 << 20, 0, other), "beyond guest memory"),
        ((table, 1, 6, 0, lib.make_spte(table, 0, 1, 1, 1)), "no guest frame"),
        ((table, 2, 6, 0, lib.make_spte(rig.fault(6).hfn, 0, 1, 1, 1)), "no table"),
    ):
        assert rig.set_atomic(*arguments) == lib.MACHINE_MISUSE
        assert text in rig.error()
    index = index_of(7, 1)
    assert lib.tdp_mmu_set_spte_atomic(rig.m, CPU, 0, table, index, 1, 6, 0, other) == lib.MACHINE_MISUSE
    assert lib.tdp_mmu_set_spte(rig.m, CPU, 0, table, index, 1, 6, other) == 2**64 - 1
    assert rig.right(6) == 0


def test_split_changes_no_right(rig: Rig) -> None:
    spte = map_huge(rig)
    hfn = rig.fault(HUGE_GFN).hfn
    assert {rig.right(HUGE_GFN + i) for i in range(512)} == {3}
    tags = [lib.frame_tag_of(rig.m, hfn + i) for i in range(512)]
    table = lib.tdp_mmu_make_split_table(rig.m, CPU, spte, 2)
    parent, _, _ = rig.walk(HUGE_GFN)
    assert rig.set_atomic(parent, 2, HUGE_GFN, spte, lib.make_nonleaf_spte(rig.m, table)) == 0
    assert [lib.frame_tag_of(rig.m, hfn + i) for i in range(512)] == tags
    for i in (0, 1, 511):
        child = lib.spte_read(rig.m, table, i)
        assert child == (spte & ~HUGE) + (i << lib.SPTE_HFN_SHIFT)
        rig.step(rig.chunk(lib.TDP_ZAP_LEAFS, HUGE_GFN + i, HUGE_GFN + i + 1))
        assert rig.right(HUGE_GFN + i) == 0
    assert rig.right(HUGE_GFN + 2) == 3


def test_huge_replaces_table(rig: Rig) -> None:
    spte = map_huge(rig)
    parent, _, _ = rig.walk(HUGE_GFN)
    table = lib.tdp_mmu_make_split_table(rig.m, CPU, spte, 2)
    link = lib.make_nonleaf_spte(rig.m, table)
    assert rig.set_atomic(parent, 2, HUGE_GFN, spte, link) == 0
    assert rig.set_atomic(parent, 2, HUGE_GFN, link, spte) == 0
    assert rig.remove(link, 2, HUGE_GFN, shared=True) == [table]
    assert {rig.right(HUGE_GFN + i) for i in range(512)} == {3}
    rig.set(parent, 2, HUGE_GFN, 0)
    assert {rig.right(HUGE_GFN + i) for i in range(512)} == {0}, "every grant had its end"


@pytest.mark.parametrize("most", [1, 7, 512])
def test_removed_tree(rig: Rig, most: int) -> None:
    for gfn in (0, 1, 600, 1500):
        map_page(rig, gfn)
    table, _ = rig.link(0, 3)
    link = lib.spte_read(rig.m, table, 0)
    rig.set(table, 3, 0, 0)
    pages = rig.remove(link, 3, 0, most=most)
    assert len(pages) == 4
    assert pages[3] == link >> lib.SPTE_HFN_SHIFT & 0xFFFFFF, "children before their parent"
    assert {rig.right(gfn) for gfn in (0, 1, 600, 1500)} == {0}
    assert rig.unmapped == 4
    assert lib.spte_read(rig.m, pages[0], 1) == lib.FROZEN_SPTE
    assert lib.spte_read(rig.m, pages[0], 2) == 0, "under the write lock only what was present is frozen"


def unlinked(rig: Rig, *gfns: int) -> tuple[int, Any]:
    """The link of a table that had these pages, and the table's removal, begun."""
    for gfn in gfns:
        map_page(rig, gfn)
    parent, link = rig.link(0, 2)
    rig.set(parent, 2, 0, 0)
    removal = ffi.new("struct tdp_removal *")
    assert lib.tdp_removal_begin(rig.m, CPU, 0, removal, link, 2, 0, 1) == 0
    return link >> lib.SPTE_HFN_SHIFT & 0xFFFFFF, removal


def test_removal_goes_entry_by_entry(rig: Rig) -> None:
    table, removal = unlinked(rig, 0, 2)
    seen = []
    while removal.level:
        assert lib.tdp_removal_step(rig.m, CPU, 0, removal, 1) == 0
        seen.append((removal.leafs, removal.page))
    assert seen == [(1, 0), (0, 0), (1, 0), *[(0, 0)] * 508, (0, table)]


def test_removal_by_single_changes(rig: Rig) -> None:
    table, removal = unlinked(rig, 0, 2)
    removal.single = 1
    seen = []
    while removal.level:
        assert lib.tdp_removal_step(rig.m, CPU, 0, removal, 512) == 0
        seen.append((removal.leafs, removal.page))
    assert seen == [(1, 0), (1, 0), (0, table)]


def test_removal_stops_at_what_somebody_else_has_frozen(rig: Rig) -> None:
    table, removal = unlinked(rig, 0, 2)
    rig.set(table, 1, 1, lib.FROZEN_SPTE)
    for _ in range(3):
        assert lib.tdp_removal_step(rig.m, CPU, 0, removal, 512) == lib.MACHINE_AGAIN
        assert (removal.index[1], removal.page) == (1, 0)
    assert (rig.right(0), rig.right(2)) == (0, 3)
    rig.set(table, 1, 1, 0)
    assert lib.tdp_removal_step(rig.m, CPU, 0, removal, 512) == 0
    assert (removal.page, removal.level, rig.right(2)) == (table, 0, 0)


def test_removal_without_freezing_leaves_entries_to_install_in(rig: Rig) -> None:
    table, removal = unlinked(rig, 0)
    removal.freeze = 0
    assert lib.tdp_removal_step(rig.m, CPU, 0, removal, 512) == 0
    assert {lib.spte_read(rig.m, table, i) for i in range(512)} == {0}


def test_removal_of_a_table_that_was_freed_is_reported(rig: Rig) -> None:
    map_page(rig, 0)
    _, link = rig.link(0, 2)
    lib.ept_table_free(rig.m, CPU, link >> lib.SPTE_HFN_SHIFT & 0xFFFFFF)
    removal = ffi.new("struct tdp_removal *")
    assert lib.tdp_removal_begin(rig.m, CPU, 0, removal, link, 2, 0, 1) == 0
    assert removal.level == 0
    assert not lib.tdp_table_holds(rig.m, CPU, 0, link, 2, 0)
    counts = ffi.new("uint64_t[]", lib.VIOLATIONS)
    lib.oracle_counts(rig.m, counts)
    assert counts[lib.VIOLATION_WALK_AFTER_FREE] == 2


def test_removal_of_a_leaf_is_misuse(rig: Rig) -> None:
    spte = map_page(rig, 0)
    removal = ffi.new("struct tdp_removal *")
    assert lib.tdp_removal_begin(rig.m, CPU, 0, removal, spte, 1, 0, 1) == lib.MACHINE_MISUSE
    assert "no table" in rig.error()


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


def test_tables_are_freed_after_a_grace_period(rig: Rig) -> None:
    map_page(rig, 5)
    before = lib.frames_in_use(rig.m, lib.FRAME_TABLE)
    assert before == rig.root_level - 1
    thread = threading.Thread(target=lib.rcu_thread, args=(rig.m, RCU_CPU))
    thread.start()
    try:
        lib.rcu_read_lock(rig.m, CPU)
        assert rig.zap(rig.chunk(lib.TDP_ZAP_LEVEL, 0, 1 << 36, level=rig.root_level)) == (1, 1, before)
        lib.ept_table_free_rcu(rig.m, CPU, rig.root)
        assert lib.frames_in_use(rig.m, lib.FRAME_TABLE) == before, "this CPU is a reader"
        lib.rcu_read_unlock(rig.m, CPU)
        assert lib.rcu_barrier(rig.m, CPU) == 0
        assert lib.frames_in_use(rig.m, lib.FRAME_TABLE) == 0
        assert lib.frames_in_use(rig.m, lib.FRAME_ROOT) == 0
    finally:
        lib.machine_stop(rig.m)
        thread.join()


def test_zap_root_in_passes(rig: Rig) -> None:
    """tdp_mmu_zap_root(): each pass removes what is at its level and leaves what is above."""
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


def test_a_removed_table_takes_tracked_sptes_along(rig: Rig) -> None:
    for gfn in (3, 4):
        map_page(rig, gfn)
    rig.step(rig.chunk(lib.TDP_ACCESS_TRACK, shared=1))
    assert rig.zap(rig.chunk(lib.TDP_ZAP_RANGE, 0, 512)) == (1, 2, 1)
    assert {rig.right(gfn) for gfn in (3, 4)} == {0}


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
    assert rig.step(rig.chunk(lib.TDP_AGE, shared=1)).changed == 2
    assert rig.step(rig.chunk(lib.TDP_AGE, shared=1)).changed == 0
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


def test_map_around(rig: Rig) -> None:
    spte = map_page(rig, 510)
    table, _, _ = rig.walk(510)
    lib.mm_protect(rig.m, CPU, 0, 509, 510, 0)
    hfns, tags, writable = (ffi.new("uint32_t[]", 8) for _ in range(3))
    for gfn in (508, 509, 511, 512):
        rig.fault(gfn, write=False)
    lib.mm_fault_range(rig.m, CPU, 0, 507, 8, 0, hfns, tags, writable)
    assert lib.tdp_mmu_map_around(rig.m, CPU, 0, table, 507, 8, hfns, tags, writable) == 3
    assert [rig.right(gfn) for gfn in range(507, 514)] == [0, 3, 1, 3, 3, 0, 0], "not beyond the table"
    assert rig.walk(510)[2] == spte


def test_walk_through_a_freed_table_is_reported(rig: Rig) -> None:
    """Only a mutant frees a table that is linked; a software walk must say so and go no further."""
    map_page(rig, 5)
    table, _, _ = rig.walk(5)
    lib.ept_table_free(rig.m, CPU, table)
    chunk = rig.step(rig.chunk(lib.TDP_ZAP_LEAFS))
    assert (chunk.changed, chunk.done) == (0, 1)
    reports = ffi.new("struct violation_report[4]")
    assert lib.oracle_reports(rig.m, 0, reports, 4) == 1
    assert reports[0].kinds == 1 << lib.VIOLATION_WALK_AFTER_FREE
    assert reports[0].hfn == table
