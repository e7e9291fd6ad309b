"""The TLB's careful cases, one by one: few random programs reach them, or they deserve a name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from native import ffi, lib
from native.types import AccessKind, Ep4ta, MappingKind, Pcid, Right, Vpid
from tests.native.tlb_model import Kind
from tests.native.tlb_pair import SERVER, UNBOUNDED, Geometry, Pair, native_tlb

CONTEXTS = 2048  # as in tlb_internal.h
GENERATIONS = 32767


@pytest.fixture(params=[UNBOUNDED, SERVER], ids=["unbounded", "server"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    p = Pair(request.param)
    yield p
    p.close()


def fill(
    pair: Pair, page: int, size: int = 0, guest: int = 0, is_global: bool = False, physical: bool = False
) -> None:
    pair.insert(page, size, guest, is_global, physical)


def hit(pair: Pair, page: int, physical: bool = False) -> bool:
    """Hit in the second level, or if it is the kind in use in either."""
    result = pair.lookup(page, physical) == 1
    if not physical:
        first = bool(lib.tlb_l1_probe(pair.native, page, pair.hfn, pair.right))
        assert not first or result, "in the first level only"
    pair.check()
    return result


@pytest.mark.parametrize("name", ["mov_to_cr3", "invpcid_single", "invpcid_retain_globals"])
def test_globals_survive(pair: Pair, name: str) -> None:
    fill(pair, 1, is_global=True)
    fill(pair, 2)
    pair.invalidate(name, *([] if name == "invpcid_retain_globals" else [0]))
    assert hit(pair, 1)
    assert not hit(pair, 2)
    pair.switch(Kind.COMBINED, 1, 5, 3)
    assert hit(pair, 1)  # with any PCID


def test_invvpid_3_retains_globals(pair: Pair) -> None:
    fill(pair, 1, is_global=True)
    fill(pair, 2)
    pair.invalidate("invvpid_retain_globals", 1)
    assert hit(pair, 1)
    assert not hit(pair, 2)


def test_first_level_copies_of_a_global_go_with_it(pair: Pair) -> None:
    fill(pair, 1, is_global=True)
    pair.switch(Kind.COMBINED, 1, 5, 3)
    assert pair.lookup(1, physical=False, refill=True) == 1  # a copy under PCID 5
    pair.switch(Kind.COMBINED, 1, 0, 3)
    pair.invalidate("mov_to_cr_pcid")
    pair.switch(Kind.COMBINED, 1, 5, 3)
    assert not hit(pair, 1)


def test_invlpg_reaches_copies_of_globals_under_other_pcids(pair: Pair) -> None:
    fill(pair, 1, is_global=True)
    pair.switch(Kind.COMBINED, 1, 5, 3)
    assert pair.lookup(1, physical=False, refill=True) == 1
    pair.switch(Kind.COMBINED, 1, 0, 3)
    pair.invalidate("invlpg", 1)
    pair.switch(Kind.COMBINED, 1, 5, 3)
    assert not hit(pair, 1)


def test_invlpg_acts_for_every_ep4ta(pair: Pair) -> None:
    for ep4ta in (3, 4):
        pair.switch(Kind.COMBINED, 1, 0, ep4ta)
        fill(pair, 1)
        fill(pair, 2)
    pair.switch(Kind.LINEAR, 1, 0, 0)
    fill(pair, 1)
    pair.invalidate("invlpg", 1)
    assert not hit(pair, 1)
    for ep4ta in (3, 4):
        pair.switch(Kind.COMBINED, 1, 0, ep4ta)
        assert not hit(pair, 1)
        assert hit(pair, 2)


def test_invlpg_drops_every_paging_structure_entry_of_the_pcid_only(pair: Pair) -> None:
    for pcid in (0, 5):
        pair.switch(Kind.COMBINED, 1, pcid, 3)
        pair.insert_psc(1 << 27, 1, physical=False)
    pair.insert_psc(1 << 27, 1, physical=True)
    pair.invalidate("invlpg", 1)
    pair.check()
    assert lib.psc_dump(pair.native, pair.psc_dumped, 8) == 2
    pair.invalidate("invpcid_address", 0, 1)  # names an address: covers nothing of this
    assert lib.psc_dump(pair.native, pair.psc_dumped, 8) == 2


def test_invvpid_all_skips_vpid_0(pair: Pair) -> None:
    pair.switch(Kind.COMBINED, 0, 0, 3)
    fill(pair, 1)
    pair.switch(Kind.COMBINED, 2, 0, 3)
    fill(pair, 1)
    pair.invalidate("invvpid_all")
    assert not hit(pair, 1)
    pair.switch(Kind.COMBINED, 0, 0, 3)
    assert hit(pair, 1)
    pair.invalidate("invvpid_single", 0)  # fails
    assert hit(pair, 1)
    pair.invalidate("vm_transition_no_vpid")
    assert not hit(pair, 1)


def test_invept_never_drops_linear_nor_invvpid_guest_physical(pair: Pair) -> None:
    fill(pair, 9, physical=True)
    pair.switch(Kind.LINEAR, 1, 0, 0)
    fill(pair, 1)
    pair.invalidate("invvpid_single", 1)
    assert not hit(pair, 1)
    fill(pair, 1)
    pair.switch(Kind.COMBINED, 1, 0, 3)
    assert hit(pair, 9, physical=True)
    pair.invalidate("invept_global")
    assert not hit(pair, 9, physical=True)
    pair.switch(Kind.LINEAR, 1, 0, 0)
    assert hit(pair, 1)


@pytest.mark.parametrize(
    ("piece", "guest", "pages"),
    [(0, 1, (512, 513, 1023)), (1, 2, (0, 512, (1 << 18) - 512)), (0, 2, (0, 513, (1 << 18) - 1))],
    ids=["2M-in-4K", "1G-in-2M", "1G-in-4K"],
)
@pytest.mark.parametrize("name", ["invlpg", "page_fault_invalidate"])
def test_all_pieces_of_a_guest_page_go_with_one_address(
    pair: Pair, name: str, piece: int, guest: int, pages: tuple[int, ...]
) -> None:
    for page in pages:
        fill(pair, page, size=piece, guest=guest)
    fill(pair, pages[0] ^ 1 << 9 * guest, size=piece, guest=guest)  # the neighbour's
    pair.invalidate(name, pages[1] + 5)
    for page in pages:
        assert not hit(pair, page)
    assert hit(pair, pages[0] ^ 1 << 9 * guest)


def test_first_level_pieces_of_a_large_page_go_with_one_address(pair: Pair) -> None:
    fill(pair, 512, size=1)
    for page in (600, 700, 1023):
        pair.lookup(page, physical=False, refill=True)
    pair.invalidate("invlpg", 512)
    for page in (512, 600, 700, 1023):
        assert not lib.tlb_l1_probe(pair.native, page, pair.hfn, pair.right)


def test_ept_violation_drops_one_linear_address_of_one_tag(pair: Pair) -> None:
    fill(pair, 512, guest=1)
    fill(pair, 513, guest=1)
    fill(pair, 70, physical=True)
    pair.switch(Kind.COMBINED, 1, 5, 3)
    fill(pair, 512)
    pair.switch(Kind.COMBINED, 1, 0, 3)
    pair.ept_violation(70, 512)
    assert not hit(pair, 512)
    assert not hit(pair, 70, physical=True)
    assert hit(pair, 513)
    pair.switch(Kind.COMBINED, 1, 5, 3)
    assert hit(pair, 512)


def test_paging_off_uses_guest_physical_mappings(pair: Pair) -> None:
    pair.switch(Kind.GUEST_PHYSICAL, 1, 0, 3)
    fill(pair, 600, size=1)
    pair.lookup(700, physical=True, refill=True)
    assert lib.tlb_l1_probe(pair.native, 700, pair.hfn, pair.right)
    pair.invalidate("invvpid_single", 1)
    pair.invalidate("mov_to_cr_all")
    assert lib.tlb_l1_probe(pair.native, 700, pair.hfn, pair.right)
    pair.invalidate("invept_single", 3)
    assert not lib.tlb_l1_probe(pair.native, 700, pair.hfn, pair.right)
    assert not hit(pair, 700, physical=True)


def test_ept_violation_reaches_what_was_cached_while_paging_was_off(pair: Pair) -> None:
    pair.switch(Kind.GUEST_PHYSICAL, 1, 0, 3)
    fill(pair, 600, size=1)
    pair.switch(Kind.COMBINED, 1, 0, 3)
    pair.ept_violation(600, 4)
    pair.switch(Kind.GUEST_PHYSICAL, 1, 0, 3)
    assert not lib.tlb_l1_probe(pair.native, 600, pair.hfn, pair.right)


def test_ghosts_name_the_flush_that_made_them(pair: Pair) -> None:
    fill(pair, 1)
    fill(pair, 2)
    lib.tlb_flush_begin(pair.native, 77)
    lib.invept_single(pair.native, Ep4ta(3))
    lib.tlb_flush_begin(pair.native, 78)
    lib.invept_single(pair.native, Ep4ta(3))  # nothing was left
    e = ffi.new("struct tlb_entry *")
    assert lib.tlb_lookup(pair.native, MappingKind(Kind.COMBINED), 1, e) == 2
    assert (e.page, lib.tlb_ghost_flush(pair.native)) == (1, 77)
    lib.tlb_ghost_forget(pair.native)
    assert lib.tlb_lookup(pair.native, MappingKind(Kind.COMBINED), 1, e) == 0
    e.page = 2
    lib.tlb_insert(pair.native, e, 2)
    lib.invlpg(pair.native, 2)
    assert lib.tlb_lookup(pair.native, MappingKind(Kind.COMBINED), 2, e) == 2
    assert lib.tlb_ghost_flush(pair.native) == 0


@pytest.mark.parametrize("geometry", [UNBOUNDED, SERVER], ids=["unbounded", "server"])
def test_generations_wrap(geometry: Geometry) -> None:
    """After 32767 flushes a context's first generation returns, and entries that bore it then must not."""
    tlb, old, new = native_tlb(geometry), ffi.new("struct tlb_entry *"), ffi.new("struct tlb_entry *")
    table, found = ffi.new("struct psc_entry *"), ffi.new("struct psc_entry *")
    old.kind = new.kind = table.kind = Kind.COMBINED
    old.page, new.page, table.level = 1, 2, 1
    lib.tlb_switch(tlb, Vpid(1), Pcid(0), Ep4ta(3), True)
    lib.tlb_insert(tlb, old, 1)
    lib.psc_insert(tlb, table)
    table.page = 1 << 18
    for _ in range(GENERATIONS):
        lib.tlb_insert(tlb, new, 2)
        lib.psc_insert(tlb, table)
        lib.invvpid_single(tlb, Vpid(1))
    lib.tlb_insert(tlb, new, 2)
    hfn, right = ffi.new("uint32_t *"), ffi.new("uint32_t[]", 3)
    assert lib.tlb_lookup(tlb, MappingKind(Kind.COMBINED), 1, old) != 1
    assert lib.psc_lookup(tlb, MappingKind(Kind.COMBINED), 1, found) == 0
    assert not lib.tlb_l1_probe(tlb, 1, hfn, right)
    assert lib.tlb_lookup(tlb, MappingKind(Kind.COMBINED), 2, new) == 1
    assert lib.tlb_dump(tlb, ffi.new("struct tlb_entry[]", 1), 1) == 1
    lib.tlb_destroy(tlb)


def other_vpids(tlb: Any, entry: Any, count: int) -> None:
    for vpid in range(1000, 1000 + count):
        lib.tlb_switch(tlb, Vpid(vpid), Pcid(0), Ep4ta(3), True)
        lib.tlb_insert(tlb, entry, entry.page)


@pytest.mark.parametrize("geometry", [UNBOUNDED, SERVER], ids=["unbounded", "server"])
def test_recycled_contexts_inherit_nothing(geometry: Geometry) -> None:
    """More tags than contexts: the oldest tag's slot serves another, which must see neither its entries
    nor its ghosts."""
    tlb, e, psc = native_tlb(geometry), ffi.new("struct tlb_entry *"), ffi.new("struct psc_entry *")
    e.kind, e.vm = Kind.COMBINED, 1
    live, dead, other = 1, 2, 7
    for vpid in range(1, CONTEXTS + 50):
        lib.tlb_switch(tlb, Vpid(vpid), Pcid(0), Ep4ta(3), True)
        for page in (live, dead):
            assert lib.tlb_lookup(tlb, MappingKind(Kind.COMBINED), page, e) == 0, vpid
            assert lib.psc_lookup(tlb, MappingKind(Kind.COMBINED), page, psc) == 0, vpid
            e.page, e.kind = page, Kind.COMBINED
            lib.tlb_insert(tlb, e, page)
        lib.invlpg(tlb, dead)
        psc.kind, psc.level, psc.page = Kind.COMBINED, 1, 0
        lib.psc_insert(tlb, psc)
    assert lib.tlb_contexts(tlb) < CONTEXTS
    lib.tlb_switch(tlb, Vpid(1), Pcid(0), Ep4ta(3), True)  # its slot has another entry by now
    assert lib.tlb_lookup(tlb, MappingKind(Kind.COMBINED), live, e) == 0
    e.page = other
    other_vpids(tlb, e, 10)
    lib.invept_global(tlb)
    assert lib.tlb_dump(tlb, ffi.NULL, 0) == 0
    lib.tlb_destroy(tlb)


def test_unlisted_contexts_are_recycled_before_live_ones() -> None:
    tlb, e = native_tlb(UNBOUNDED), ffi.new("struct tlb_entry *")
    e.kind, e.page = Kind.COMBINED, 1
    lib.tlb_switch(tlb, Vpid(1), Pcid(0), Ep4ta(3), True)
    lib.tlb_insert(tlb, e, 1)
    for vpid in range(2, 4 * CONTEXTS):
        lib.tlb_switch(tlb, Vpid(vpid), Pcid(0), Ep4ta(3), True)  # fills nothing
    lib.tlb_switch(tlb, Vpid(1), Pcid(0), Ep4ta(3), True)
    assert lib.tlb_lookup(tlb, MappingKind(Kind.COMBINED), 1, e) == 1
    lib.tlb_destroy(tlb)


def test_dropped_counts_by_vm() -> None:
    tlb, e = native_tlb(UNBOUNDED), ffi.new("struct tlb_entry *")
    e.kind = Kind.COMBINED
    for vm in (1, 2):
        lib.tlb_switch(tlb, Vpid(vm), Pcid(0), Ep4ta(10 + vm), True)
        for page in range(5 * vm):
            e.page, e.vm = page, vm
            lib.tlb_insert(tlb, e, page)
    lib.tlb_flush_begin(tlb, 1)
    lib.invept_global(tlb)
    assert [lib.tlb_dropped(tlb, vm) for vm in (-1, 1, 2, 3)] == [15, 10, 5, 15]
    lib.tlb_flush_begin(tlb, 2)
    lib.invept_global(tlb)
    assert [lib.tlb_dropped(tlb, vm) for vm in (-1, 1, 2)] == [0, 0, 0]
    # two VMs in one context: in all exact, the second's count as foreign to everybody
    for page, vm in ((0, 1), (1, 1), (2, 2)):
        e.page, e.vm = page, vm
        lib.tlb_insert(tlb, e, page)
    lib.invept_global(tlb)
    assert [lib.tlb_dropped(tlb, vm) for vm in (-1, 1, 2)] == [3, 1, 3]
    lib.tlb_destroy(tlb)


def right_of(pair: Pair, page: int) -> tuple[int, int]:
    """In the first level and in the second, for accesses of type 2."""
    assert lib.tlb_l1_probe(pair.native, page, pair.hfn, pair.right)
    assert lib.tlb_lookup(pair.native, MappingKind(Kind.COMBINED), page, pair.entry) == 1
    return pair.right[2], pair.entry.right[2]


def test_a_right_is_refreshed_in_both_levels(pair: Pair) -> None:
    fill(pair, 1)
    lib.tlb_update_right(pair.native, MappingKind(Kind.COMBINED), 1, AccessKind(2), Right(0x123))
    assert right_of(pair, 1) == (0x123, 0x123)


def test_a_right_to_one_frame_of_a_large_page_says_nothing_about_the_others(pair: Pair) -> None:
    fill(pair, 600, size=1)
    before = right_of(pair, 600)[1]
    lib.tlb_update_right(pair.native, MappingKind(Kind.COMBINED), 600, AccessKind(2), Right(0x123))
    assert right_of(pair, 600) == (0x123, before)
    assert pair.lookup(700, physical=False, refill=True) == 1
    assert right_of(pair, 700) == (before, before)


def test_a_right_is_not_refreshed_in_another_translation_of_the_page(pair: Pair) -> None:
    fill(pair, 1)
    fill(pair, 1, is_global=True)  # the first level has this one, a look-up finds the other
    before = right_of(pair, 1)[0]
    lib.tlb_update_right(pair.native, MappingKind(Kind.COMBINED), 1, AccessKind(2), Right(0x123))
    assert right_of(pair, 1) == (before, 0x123)
    pair.invalidate("mov_to_cr3", 0)
    assert lib.tlb_lookup(pair.native, MappingKind(Kind.COMBINED), 1, pair.entry) == 1
    assert pair.entry.right[2] == before


def test_least_recently_used_goes_first() -> None:
    pair = Pair(Geometry(l2_entries=4, l2_ways=4, psc_entries=4))
    for page in (0, 1, 2, 3):
        fill(pair, page)
    assert hit(pair, 0)
    fill(pair, 4)
    assert [pair.lookup(page, physical=False) for page in range(5)] == [1, 0, 1, 1, 1]
    pair.invalidate("invlpg", 3)
    fill(pair, 5)  # the dropped one's cell before any live one's
    assert [pair.lookup(page, physical=False) for page in (0, 2, 3, 4, 5)] == [1, 1, 0, 1, 1]
    pair.close()


def test_contexts_do_not_share_one_set() -> None:
    """Twelve equal pages of 100 contexts fit into 1536 entries but for a few."""
    tlb, e = native_tlb(SERVER), ffi.new("struct tlb_entry *")
    e.kind = Kind.COMBINED
    for vpid in range(1, 101):
        lib.tlb_switch(tlb, Vpid(vpid), Pcid(0), Ep4ta(3), True)
        for page in range(12):
            e.page = page
            lib.tlb_insert(tlb, e, page)
    assert lib.tlb_dump(tlb, ffi.NULL, 0) > 1000
    lib.tlb_destroy(tlb)


@pytest.mark.parametrize("paging", [True, False])
def test_guest_physical_mappings_behind_combined_ones_go_first(paging: bool) -> None:
    """While a combined mapping answers for a page, no access looks for its guest-physical one."""
    pair = Pair(Geometry(l2_entries=4, l2_ways=4, psc_entries=4))
    if not paging:
        pair.switch(Kind.GUEST_PHYSICAL, 1, 0, 3)
    for page in (1, 100, 2, 3, 4):
        fill(pair, page, physical=not paging or page == 100)
    kept = [page for page in (1, 100, 2, 3, 4) if hit(pair, page, physical=not paging or page == 100)]
    # Without paging it is a translation like the others.
    assert kept == ([1, 2, 3, 4] if paging else [100, 2, 3, 4])
    pair.close()
