"""Tables that have lost their link, taken apart."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from native import ffi, lib
from native.types import Gfn, Hfn, Level, SpteIndex
from tests.native.memory_rig import CPU, RCU_CPU, Rig, map_page
from tests.support import VM0

if TYPE_CHECKING:
    from native._native import TdpRemovalPtr


@pytest.mark.parametrize("most", [1, 7, 512])
def test_removed_tree(rig: Rig, most: int) -> None:
    for gfn in (0, 1, 600, 1500):
        map_page(rig, gfn)
    table, _ = rig.link(0, 3)
    link = lib.spte_read(rig.m, table, SpteIndex(0))
    rig.set(table, 3, 0, 0)
    pages = rig.remove(link, 3, 0, most=most)
    assert len(pages) == 4
    assert pages[3] == link >> lib.SPTE_HFN_SHIFT & 0xFFFFFF, "children before their parent"
    assert {rig.right(gfn) for gfn in (0, 1, 600, 1500)} == {0}
    assert rig.unmapped == 4
    assert lib.spte_read(rig.m, pages[0], SpteIndex(1)) == lib.FROZEN_SPTE
    assert lib.spte_read(rig.m, pages[0], SpteIndex(2)) == 0, (
        "under the write lock only what was present is frozen"
    )


def unlinked(rig: Rig, *gfns: int) -> tuple[Hfn, TdpRemovalPtr]:
    """The link of a table that had these pages, and the table's removal, begun."""
    for gfn in gfns:
        map_page(rig, gfn)
    parent, link = rig.link(0, 2)
    rig.set(parent, 2, 0, 0)
    removal = ffi.new("struct tdp_removal *")
    assert lib.tdp_removal_begin(rig.m, CPU, VM0, removal, link, Level(2), Gfn(0), True) == 0
    return Hfn(link >> lib.SPTE_HFN_SHIFT & 0xFFFFFF), removal


def test_removal_goes_entry_by_entry(rig: Rig) -> None:
    table, removal = unlinked(rig, 0, 2)
    seen = []
    while removal.level:
        assert lib.tdp_removal_step(rig.m, CPU, VM0, removal, 1) == 0
        seen.append((removal.leafs, removal.page))
    assert seen == [(1, 0), (0, 0), (1, 0), *[(0, 0)] * 508, (0, table)]


def test_the_removed_leafs_are_told_as_they_were(rig: Rig) -> None:
    spte = map_page(rig, 0)
    _, removal = unlinked(rig, 2)
    seen = []
    for _ in range(3):
        assert lib.tdp_removal_step(rig.m, CPU, VM0, removal, 1) == 0
        seen.append(removal.old_spte)
    assert seen[:2] == [spte, 0]
    assert seen[2] & lib.SPTE_ACCESSED


def test_removal_by_single_changes(rig: Rig) -> None:
    table, removal = unlinked(rig, 0, 2)
    removal.single = 1
    seen = []
    while removal.level:
        assert lib.tdp_removal_step(rig.m, CPU, VM0, removal, 512) == 0
        seen.append((removal.leafs, removal.page))
    assert seen == [(1, 0), (1, 0), (0, table)]


def test_removal_stops_at_what_somebody_else_has_frozen(rig: Rig) -> None:
    table, removal = unlinked(rig, 0, 2)
    rig.set(table, 1, 1, lib.FROZEN_SPTE)
    for _ in range(3):
        assert lib.tdp_removal_step(rig.m, CPU, VM0, removal, 512) == lib.MACHINE_AGAIN
        assert (removal.index[1], removal.page) == (1, 0)
    assert (rig.right(0), rig.right(2)) == (0, 3)
    rig.set(table, 1, 1, 0)
    assert lib.tdp_removal_step(rig.m, CPU, VM0, removal, 512) == 0
    assert (removal.page, removal.level, rig.right(2)) == (table, 0, 0)


def test_removal_without_freezing_leaves_entries_to_install_in(rig: Rig) -> None:
    table, removal = unlinked(rig, 0)
    removal.freeze = 0
    assert lib.tdp_removal_step(rig.m, CPU, VM0, removal, 512) == 0
    assert {lib.spte_read(rig.m, table, SpteIndex(i)) for i in range(512)} == {0}


def test_removal_of_a_table_that_was_freed_is_reported(rig: Rig) -> None:
    map_page(rig, 0)
    _, link = rig.link(0, 2)
    lib.ept_table_free(rig.m, CPU, Hfn(link >> lib.SPTE_HFN_SHIFT & 0xFFFFFF))
    removal = ffi.new("struct tdp_removal *")
    assert lib.tdp_removal_begin(rig.m, CPU, VM0, removal, link, Level(2), Gfn(0), True) == 0
    assert removal.level == 0
    assert not lib.tdp_table_holds(rig.m, CPU, VM0, link, Level(2), Gfn(0))
    counts = ffi.new("uint64_t[]", lib.VIOLATIONS)
    lib.oracle_counts(rig.m, counts)
    assert counts[lib.VIOLATION_WALK_AFTER_FREE] == 2


def test_removal_of_a_leaf_is_misuse(rig: Rig) -> None:
    spte = map_page(rig, 0)
    removal = ffi.new("struct tdp_removal *")
    assert lib.tdp_removal_begin(rig.m, CPU, VM0, removal, spte, Level(1), Gfn(0), True) == lib.MACHINE_MISUSE
    assert "no table" in rig.error()


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


def test_a_removed_table_takes_tracked_sptes_along(rig: Rig) -> None:
    for gfn in (3, 4):
        map_page(rig, gfn)
    rig.step(rig.chunk(lib.TDP_ACCESS_TRACK, shared=1))
    assert rig.zap(rig.chunk(lib.TDP_ZAP_RANGE, 0, 512)) == (1, 2, 1)
    assert {rig.right(gfn) for gfn in (3, 4)} == {0}
