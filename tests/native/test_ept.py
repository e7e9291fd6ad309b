"""SPTEs and tables, one at a time."""

from __future__ import annotations

from native import ffi, lib
from native.types import Custody, Gfn, Hfn, HostWritable, Hva, Level, SpteIndex
from tests.native.memory_rig import (
    ACCESSED,
    CPU,
    CUSTODY_MASK,
    DIRTY,
    HUGE,
    HUGE_GFN,
    MMU_WRITABLE,
    PRESENT,
    WRITABLE,
    Rig,
    index_of,
    map_huge,
    map_page,
    split_table,
)
from tests.support import VM0


def test_make_spte() -> None:
    spte = lib.make_spte(Hfn(0xABCDEF), Custody(0x7ABC), Level(1), True, HostWritable(True))
    assert spte >> lib.SPTE_HFN_SHIFT & 0xFFFFFF == 0xABCDEF
    assert (spte & CUSTODY_MASK) >> lib.SPTE_CUSTODY_SHIFT == 0x7ABC
    assert spte & (WRITABLE | ACCESSED | DIRTY | HUGE) == WRITABLE | ACCESSED | DIRTY
    assert lib.make_spte(Hfn(1), Custody(0), Level(2), True, HostWritable(True)) & HUGE
    for writable, host_writable in ((False, True), (True, False)):
        spte = lib.make_spte(Hfn(1), Custody(0), Level(1), writable, HostWritable(host_writable))
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


def test_sptes_of_a_table_are_found_in_order(rig: Rig) -> None:
    table = Hfn(lib.shadow_page_alloc(rig.m, CPU, lib.FRAME_TABLE))
    assert lib.spte_next(rig.m, table, SpteIndex(0)) == 512
    child = lib.make_nonleaf_spte(rig.m, rig.table())
    for index in (3, 511):
        assert lib.shadow_mmu_set_spte(rig.m, CPU, VM0, table, SpteIndex(index), Level(2), Gfn(0), child) == 0
    assert [lib.spte_next(rig.m, table, SpteIndex(index)) for index in (0, 3, 4, 511, 512)] == [
        3,
        3,
        511,
        511,
        512,
    ]


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
    other = lib.make_spte(rig.fault(6).hfn, Custody(0), Level(1), True, HostWritable(True))
    for arguments, text in (
        ((table, 1, 5, spte, other), "another frame"),
        ((rig.fault(5).hfn, 1, 5, 0, other), "not a table"),
        ((table, 6, 5, 0, other), "level"),
        ((table, 1, 1 << 20, 0, other), "beyond guest memory"),
        (
            (table, 1, 6, 0, lib.make_spte(table, Custody(0), Level(1), True, HostWritable(True))),
            "no guest frame",
        ),
        (
            (table, 2, 6, 0, lib.make_spte(rig.fault(6).hfn, Custody(0), Level(1), True, HostWritable(True))),
            "no table",
        ),
    ):
        assert rig.set_atomic(*arguments) == lib.MACHINE_MISUSE
        assert text in rig.error()
    index = index_of(7, 1)
    assert (
        lib.tdp_mmu_set_spte_atomic(rig.m, CPU, VM0, table, SpteIndex(index), Level(1), Gfn(6), 0, other)
        == lib.MACHINE_MISUSE
    )
    assert (
        lib.tdp_mmu_set_spte(rig.m, CPU, VM0, table, SpteIndex(index), Level(1), Gfn(6), other) == 2**64 - 1
    )
    assert rig.right(6) == 0


def test_split_changes_no_right(rig: Rig) -> None:
    spte = map_huge(rig)
    hfn = rig.fault(HUGE_GFN).hfn
    assert {rig.right(HUGE_GFN + i) for i in range(512)} == {3}
    tags = [lib.frame_tag_of(rig.m, Hfn(hfn + i)) for i in range(512)]
    table = split_table(rig, spte, 2)
    parent, _, _ = rig.walk(HUGE_GFN)
    assert rig.set_atomic(parent, 2, HUGE_GFN, spte, lib.make_nonleaf_spte(rig.m, Hfn(table))) == 0
    assert [lib.frame_tag_of(rig.m, Hfn(hfn + i)) for i in range(512)] == tags
    for i in (0, 1, 511):
        child = lib.spte_read(rig.m, Hfn(table), SpteIndex(i))
        assert child == (spte & ~HUGE) + (i << lib.SPTE_HFN_SHIFT)
        rig.step(rig.chunk(lib.TDP_ZAP_LEAFS, HUGE_GFN + i, HUGE_GFN + i + 1))
        assert rig.right(HUGE_GFN + i) == 0
    assert rig.right(HUGE_GFN + 2) == 3


def test_huge_replaces_table(rig: Rig) -> None:
    spte = map_huge(rig)
    parent, _, _ = rig.walk(HUGE_GFN)
    table = split_table(rig, spte, 2)
    link = lib.make_nonleaf_spte(rig.m, Hfn(table))
    assert rig.set_atomic(parent, 2, HUGE_GFN, spte, link) == 0
    assert rig.set_atomic(parent, 2, HUGE_GFN, link, spte) == 0
    assert rig.remove(link, 2, HUGE_GFN, shared=True) == [table]
    assert {rig.right(HUGE_GFN + i) for i in range(512)} == {3}
    rig.set(parent, 2, HUGE_GFN, 0)
    assert {rig.right(HUGE_GFN + i) for i in range(512)} == {0}, "every grant had its end"


def test_map_around(rig: Rig) -> None:
    spte = map_page(rig, 510)
    table, _, _ = rig.walk(510)
    lib.mm_protect(rig.m, CPU, VM0, Hva(509), Hva(510), False)
    hfns, tags, writable = (ffi.new("uint32_t[]", 8) for _ in range(3))
    for gfn in (508, 509, 511, 512):
        rig.fault(gfn, write=False)
    lib.mm_fault_range(rig.m, CPU, VM0, Hva(507), 8, False, hfns, tags, writable)
    wrong = lib.tdp_mmu_map_around(rig.m, CPU, VM0, table, SpteIndex(506), Gfn(507), 8, hfns, tags, writable)
    assert wrong == lib.MACHINE_MISUSE
    assert "does not belong to this index" in rig.error()
    assert [rig.right(gfn) for gfn in range(507, 514)] == [0, 0, 0, 3, 0, 0, 0]
    assert (
        lib.tdp_mmu_map_around(rig.m, CPU, VM0, table, SpteIndex(507), Gfn(507), 8, hfns, tags, writable) == 3
    )
    assert [rig.right(gfn) for gfn in range(507, 514)] == [0, 3, 1, 3, 3, 0, 0], "not beyond the table"
    assert rig.walk(510)[2] == spte
