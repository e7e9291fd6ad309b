"""User memory: contents, custody and sizes of mapping, against a plain model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native import ffi, lib
from native.types import Custody, Gfn, Hfn, HostWritable, Hva, Level, SpteIndex, Ticket, WordIndex
from tests.native.memory_rig import BLOCK, CPU, Rig, split_table
from tests.support import VM0


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as machine:
        yield machine


def write(rig: Rig, hva: int, value: int) -> None:
    """Write as a guest does that has the page mapped writable."""
    lib.frame_write(rig.m, rig.fault(hva).hfn, WordIndex(5), value)


def test_untouched_memory_reads_zero(rig: Rig) -> None:
    assert lib.mm_present(rig.m, VM0, Hva(0), Hva(2048)) == 0
    assert rig.words(rig.fault(7).hfn) == {0}
    write(rig, 7, 99)
    assert lib.mm_unmap(rig.m, CPU, VM0, Hva(0), Hva(2048), False) == 1
    assert lib.mm_read(rig.m, VM0, Hva(7), WordIndex(5)) == 0
    assert rig.words(rig.fault(7).hfn) == {0}, "a recycled frame is cleared before it is handed out"


def test_swap_keeps_contents_in_another_frame(rig: Rig) -> None:
    write(rig, 7, 99)
    old = rig.fault(7)
    assert lib.mm_unmap(rig.m, CPU, VM0, Hva(7), Hva(8), True) == 1
    assert lib.frame_host_tag_of(rig.m, old.hfn) != old.tag, "custody is void"
    assert lib.mm_read(rig.m, VM0, Hva(7), WordIndex(5)) == 99
    taken = rig.fault(8)
    assert taken.hfn == old.hfn
    assert lib.frame_read(rig.m, rig.fault(7).hfn, WordIndex(5)) == 99


def test_dontneed_forgets_what_is_swapped(rig: Rig) -> None:
    write(rig, 7, 99)
    lib.mm_unmap(rig.m, CPU, VM0, Hva(7), Hva(8), True)
    assert lib.mm_unmap(rig.m, CPU, VM0, Hva(7), Hva(8), False) == 0
    assert lib.mm_read(rig.m, VM0, Hva(7), WordIndex(5)) == 0


def test_protection(rig: Rig) -> None:
    write(rig, 7, 1)
    assert lib.mm_protect(rig.m, CPU, VM0, Hva(6), Hva(8), False) == 2
    assert rig.try_fault(7, write=True) == lib.MACHINE_AGAIN
    assert rig.fault(7, write=False).writable == 0
    lib.mm_unmap(rig.m, CPU, VM0, Hva(7), Hva(8), True)
    assert rig.try_fault(7, write=True) == lib.MACHINE_AGAIN, "swapping does not lift it"
    assert lib.mm_protect(rig.m, CPU, VM0, Hva(6), Hva(8), True) == 2
    assert rig.fault(7).writable == 1


def test_migration_moves_to_new_frames(rig: Rig) -> None:
    for hva in range(4):
        write(rig, hva, hva + 10)
    before = [rig.fault(hva).hfn for hva in range(4)]
    assert lib.mm_migrate(rig.m, CPU, VM0, Hva(0), Hva(100)) == 4
    assert all(rig.fault(hva).hfn != before[hva] for hva in range(4))
    assert [lib.mm_read(rig.m, VM0, Hva(hva), WordIndex(5)) for hva in range(4)] == [10, 11, 12, 13]
    while rig.frame(lib.FRAME_GUEST) != lib.MACHINE_NOMEM:
        pass
    assert lib.mm_migrate(rig.m, CPU, VM0, Hva(0), Hva(100)) == 0, "no frame to move to"


def test_collapse_and_split(rig: Rig) -> None:
    assert lib.mm_collapse(rig.m, CPU, VM0, Hva(512)) == lib.MACHINE_AGAIN, "nothing is there"
    assert lib.mm_collapse(rig.m, CPU, VM0, Hva(513)) == lib.MACHINE_MISUSE
    write(rig, 512, 1)
    write(rig, 700, 2)
    lib.mm_unmap(rig.m, CPU, VM0, Hva(700), Hva(701), True)
    assert lib.mm_collapse(rig.m, CPU, VM0, Hva(512)) == 0
    assert lib.mm_huge(rig.m, VM0, Hva(600))
    assert not lib.mm_huge(rig.m, VM0, Hva(0))
    pages = [rig.fault(hva) for hva in range(512, 1024)]
    assert {page.level for page in pages} == {lib.PG_LEVEL_2M}
    assert [page.hfn for page in pages] == list(range(pages[0].hfn, pages[0].hfn + BLOCK))
    custodies = {
        lib.mm_huge_custody(rig.m, VM0, Hva(512 + i), pages[i].hfn, pages[i].tag) for i in range(512)
    }
    assert custodies == {lib.frame_block_custody(rig.m, pages[0].hfn)}
    assert [lib.mm_read(rig.m, VM0, Hva(hva), WordIndex(5)) for hva in (512, 600, 700)] == [1, 0, 2]
    assert lib.frames_in_use(rig.m, lib.FRAME_GUEST) == 0
    assert lib.mm_split(rig.m, CPU, VM0, Hva(512)) == 0
    assert rig.fault(600).level == lib.PG_LEVEL_4K
    assert rig.fault(600).hfn == pages[600 - 512].hfn


def test_part_of_a_huge_page_splits_it(rig: Rig) -> None:
    write(rig, 0, 1)
    for part in (lib.mm_unmap, lib.mm_protect):
        assert lib.mm_collapse(rig.m, CPU, VM0, Hva(0)) == 0
        part(rig.m, CPU, VM0, Hva(5), Hva(6), False)
        assert not lib.mm_huge(rig.m, VM0, Hva(0))
        lib.mm_protect(rig.m, CPU, VM0, Hva(0), Hva(512), True)
    assert lib.mm_collapse(rig.m, CPU, VM0, Hva(0)) == 0
    assert lib.mm_protect(rig.m, CPU, VM0, Hva(0), Hva(512), False) == 512
    assert lib.mm_huge(rig.m, VM0, Hva(0)), "the whole of it need not"


def test_a_huge_page_stays_huge_while_a_part_is_promised_away(rig: Rig) -> None:
    """A promise about one page of it: the oracle's notes do not change the host's mapping."""
    write(rig, 0, 1)
    assert lib.mm_collapse(rig.m, CPU, VM0, Hva(0)) == 0
    page, neighbour = rig.fault(9), rig.fault(8)
    assert page.level == lib.PG_LEVEL_2M
    before = lib.mm_huge_custody(rig.m, VM0, Hva(9), page.hfn, page.tag)
    table, _ = rig.link(9, 1)
    assert (
        rig.set_atomic(table, 1, 9, 0, lib.make_spte(page.hfn, page.tag, Level(1), True, HostWritable(True)))
        == 0
    )
    rig.set(table, 1, 9, 0)
    lib.oracle_revoke(rig.m, CPU, VM0, Gfn(9), Gfn(10), lib.PROMISE_NOTIFIER, Ticket(0))
    assert rig.fault(9).tag != page.tag
    assert rig.fault(8).level == lib.PG_LEVEL_2M
    now = lib.mm_huge_custody(rig.m, VM0, Hva(8), neighbour.hfn, neighbour.tag)
    assert now == lib.frame_block_custody(rig.m, page.hfn) != before
    # A fault that looked the page up before the promise does not have it now.
    stale = lib.mm_huge_custody(rig.m, VM0, Hva(9), page.hfn, page.tag)
    table, _ = rig.link(512, 2)
    for custody, holds in ((before, False), (stale, False), (now, True)):
        spte = lib.make_spte(Hfn(page.hfn - 9), Custody(custody), Level(2), True, HostWritable(True))
        rig.set(table, 2, 512, spte)
        hfn = ffi.new("uint32_t *")
        assert lib.oracle_right(rig.m, VM0, Gfn(512 + 8), hfn) == 3
        rights = lib.oracle_right(rig.m, VM0, Gfn(512 + 9), hfn)
        assert rights == (3 if holds else 3 | 3 << 2), "granted, and revoked from the start"
        rig.set(table, 2, 512, 0)

    # Split, only the child of that page has no custody any more.
    small = split_table(
        rig, lib.make_spte(Hfn(page.hfn - 9), Custody(before), Level(2), True, HostWritable(True)), 2
    )
    for index in (8, 9, 10):
        custody = lib.spte_read(rig.m, Hfn(small), SpteIndex(index)) >> lib.SPTE_CUSTODY_SHIFT & 0x7FFF
        assert (custody == lib.frame_host_tag_of(rig.m, Hfn(page.hfn - 9 + index))) == (index != 9)


def test_a_huge_leaf_is_of_the_frame_that_the_host_maps(rig: Rig) -> None:
    write(rig, 9, 1)
    old = rig.fault(9)
    assert lib.mm_huge_custody(rig.m, VM0, Hva(9), old.hfn, old.tag) == -1, "mapped by 4K"
    assert lib.mm_collapse(rig.m, CPU, VM0, Hva(0)) == 0
    assert lib.mm_huge_custody(rig.m, VM0, Hva(9), old.hfn, old.tag) == -1, "another frame by now"
    assert lib.mm_huge_custody(rig.m, VM0, Hva(9), rig.fault(9).hfn, rig.fault(9).tag) >= 0
    assert lib.mm_huge_custody(rig.m, VM0, Hva(1 << 40), Hfn(0), Custody(0)) == -1


def test_collapse_without_a_block(rig: Rig) -> None:
    write(rig, 0, 1)
    while rig.frame(lib.FRAME_BLOCK) != lib.MACHINE_NOMEM:
        pass
    assert lib.mm_collapse(rig.m, CPU, VM0, Hva(0)) == lib.MACHINE_NOMEM
    assert lib.mm_read(rig.m, VM0, Hva(0), WordIndex(5)) == 1


def test_fault_range(rig: Rig) -> None:
    write(rig, 510, 1)
    write(rig, 513, 1)
    lib.mm_protect(rig.m, CPU, VM0, Hva(513), Hva(514), False)
    hfns, tags, writable = (ffi.new("uint32_t[]", 6) for _ in range(3))
    assert lib.mm_fault_range(rig.m, CPU, VM0, Hva(509), 6, False, hfns, tags, writable) == 2
    assert [hfn != 0xFFFFFFFF for hfn in hfns] == [False, True, False, False, True, False]
    assert (hfns[1], tags[1], writable[1]) == (rig.fault(510).hfn, rig.fault(510).tag, 1)
    assert writable[4] == 0
    assert lib.mm_fault_range(rig.m, CPU, VM0, Hva(509), 6, True, hfns, tags, writable) == 6
    assert lib.mm_present(rig.m, VM0, Hva(0), Hva(2048)) == 6


def test_bounds(rig: Rig) -> None:
    assert rig.try_fault(2048) == lib.MACHINE_MISUSE
    assert "0x800" in rig.error()
    hfns, tags, writable = (ffi.new("uint32_t[]", 2) for _ in range(3))
    assert (
        lib.mm_fault_range(rig.m, CPU, VM0, Hva(2047), 2, False, hfns, tags, writable) == lib.MACHINE_MISUSE
    )
    assert lib.mm_unmap(rig.m, CPU, VM0, Hva(2000), Hva(1 << 60), False) == 0
    assert lib.mm_image_create(rig.m, VM0, Hva(1), 2048) == lib.MACHINE_NOMEM


def test_out_of_frames(rig: Rig) -> None:
    for hva in range(256):
        assert rig.try_fault(hva) == 0
    assert rig.try_fault(256) == lib.MACHINE_NOMEM
    lib.mm_unmap(rig.m, CPU, VM0, Hva(0), Hva(1), True)
    assert rig.try_fault(256) == 0


def test_image(rig: Rig) -> None:
    assert lib.mm_image_create(rig.m, VM0, Hva(100), 200) == 0
    assert lib.mm_image_differs(rig.m, VM0, Hva(0)) == -1, "nothing written, nothing to copy"
    for hva in (99, 100, 150, 299, 300):
        write(rig, hva, hva)
    lib.mm_unmap(rig.m, CPU, VM0, Hva(150), Hva(151), True)
    assert lib.mm_image_differs(rig.m, VM0, Hva(0)) == 100
    assert lib.mm_image_copy(rig.m, VM0, Hva(99), 0b111) == 2, "page 99 is not in it"
    assert lib.mm_image_differs(rig.m, VM0, Hva(0)) == 150
    assert lib.mm_image_copy(rig.m, VM0, Hva(150), 1) == 1
    assert lib.mm_image_differs(rig.m, VM0, Hva(101)) == 299
    assert lib.mm_image_copy(rig.m, VM0, Hva(299), 3) == 1
    assert lib.mm_image_differs(rig.m, VM0, Hva(0)) == -1
    write(rig, 150, 7)
    assert lib.mm_image_differs(rig.m, VM0, Hva(0)) == 150


def test_an_image_knows_what_has_changed(rig: Rig) -> None:
    value = ffi.new("uint64_t *")
    for hva in (0, 5, 511):
        write(rig, hva, 1000 + hva)
    assert lib.mm_image_create(rig.m, VM0, Hva(0), 512) == 0
    assert lib.mm_image_copy_all(rig.m, VM0) == 512
    assert lib.mm_image_changed(rig.m, VM0) == 3, "the others hold zeros, as the image does"
    assert lib.mm_image_copy(rig.m, VM0, Hva(0), 0b100001) == 2
    assert lib.mm_image_changed(rig.m, VM0) == 3
    write(rig, 5, 77)
    assert lib.mm_image_lost(rig.m, VM0, Hva(0), value) == 0
    assert (lib.mm_image_lost(rig.m, VM0, Hva(5), value), value[0]) == (1, 77)
    assert lib.mm_image_copy(rig.m, VM0, Hva(0), 0b100001) == 2
    assert lib.mm_image_changed(rig.m, VM0) == 4
    lib.mm_unmap(rig.m, CPU, VM0, Hva(5), Hva(6), False)
    assert (lib.mm_image_lost(rig.m, VM0, Hva(5), value), value[0]) == (1, 0), "given up: zeros again"
    assert lib.mm_image_copy(rig.m, VM0, Hva(5), 1) == 1
    assert lib.mm_image_differs(rig.m, VM0, Hva(0)) == -1
    lib.mm_image_destroy(rig.m, VM0)


def test_stored_pages_use_the_places_of_those_before(rig: Rig) -> None:
    """A service swaps millions of pages out: memory must not grow with them."""
    for _ in range(20):
        for hva in range(200):
            write(rig, hva, hva + 1)
        assert lib.mm_unmap(rig.m, CPU, VM0, Hva(0), Hva(200), True) == 200
        assert lib.mm_stored(rig.m, VM0, False) == 200
        lib.mm_unmap(rig.m, CPU, VM0, Hva(0), Hva(100), False)
        assert lib.mm_stored(rig.m, VM0, False) == 100
        assert [lib.mm_read(rig.m, VM0, Hva(hva), WordIndex(5)) for hva in (99, 100, 199)] == [0, 101, 200]
        assert lib.mm_image_create(rig.m, VM0, Hva(0), 512) == 0
        assert lib.mm_image_copy_all(rig.m, VM0) == 512
        assert lib.mm_stored(rig.m, VM0, False) == 200, "100 swapped out, and their copies"
        lib.mm_image_destroy(rig.m, VM0)
        for hva in range(100, 200):
            rig.fault(hva)
        assert lib.mm_stored(rig.m, VM0, False) == 0
        assert lib.mm_unmap(rig.m, CPU, VM0, Hva(0), Hva(200), False) == 100
    assert lib.mm_stored(rig.m, VM0, True) == 200, "as many places as were in use at once"


def test_a_store_of_many_chunks(rig: Rig) -> None:
    """Every place has bytes of its own, from the first chunk of 255 places to the last."""
    assert lib.mm_image_create(rig.m, VM0, Hva(0), 2048) == 0
    for hva in range(1500):
        write(rig, hva, hva + 1)
        assert lib.mm_unmap(rig.m, CPU, VM0, Hva(hva), Hva(hva + 1), True) == 1
    assert lib.mm_image_copy_all(rig.m, VM0) == 2048
    assert lib.mm_stored(rig.m, VM0, True) == 3000
    assert lib.mm_image_differs(rig.m, VM0, Hva(0)) == -1
    for hva in range(1500):
        assert lib.mm_read(rig.m, VM0, Hva(hva), WordIndex(5)) == hva + 1


HVA = st.integers(0, 1100)
OPERATION = st.one_of(
    st.tuples(st.just("write"), HVA, st.integers(1, 1 << 60)),
    st.tuples(st.sampled_from(["swap", "dontneed", "protect", "allow", "migrate"]), HVA, st.integers(1, 700)),
    st.tuples(st.sampled_from(["collapse", "split"]), st.sampled_from([0, 512]), st.just(0)),
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(OPERATION, max_size=30))
def test_contents_follow_a_plain_model(operations: list[tuple[str, int, int]]) -> None:
    contents: dict[int, int] = {}
    readonly: set[int] = set()
    with Rig(gfns=2048, guest_frames=2500) as rig:
        for name, hva, value in operations:
            pages = range(hva, min(hva + value, 2048))
            if name == "write":
                assert rig.try_fault(hva) == (lib.MACHINE_AGAIN if hva in readonly else 0)
                if hva not in readonly:
                    write(rig, hva, value)
                    contents[hva] = value
            elif name in ("swap", "dontneed"):
                lib.mm_unmap(rig.m, CPU, VM0, Hva(hva), Hva(hva + value), name == "swap")
                assert lib.mm_present(rig.m, VM0, Hva(hva), Hva(hva + value)) == 0
                if name == "dontneed":
                    contents = {k: v for k, v in contents.items() if k not in pages}
            elif name in ("protect", "allow"):
                changed = lib.mm_protect(rig.m, CPU, VM0, Hva(hva), Hva(hva + value), name == "allow")
                after = readonly - set(pages) if name == "allow" else readonly | set(pages)
                assert changed == len(after ^ readonly)
                readonly = after
            elif name == "migrate":
                lib.mm_migrate(rig.m, CPU, VM0, Hva(hva), Hva(hva + value))
            elif name == "collapse":
                lib.mm_collapse(rig.m, CPU, VM0, Hva(hva))
            else:
                lib.mm_split(rig.m, CPU, VM0, Hva(hva))
            check(rig, contents, readonly)
        in_use = lib.frames_in_use(rig.m, lib.FRAME_GUEST)
        assert in_use <= lib.mm_present(rig.m, VM0, Hva(0), Hva(2048))
        lib.vm_destroy(rig.m, VM0)
        assert [lib.frames_in_use(rig.m, kind) for kind in (lib.FRAME_GUEST, lib.FRAME_BLOCK)] == [0, 0]


def check(rig: Rig, contents: dict[int, int], readonly: set[int]) -> None:
    hfns, tags, writable = (ffi.new("uint32_t[]", 2048) for _ in range(3))
    present = lib.mm_fault_range(rig.m, CPU, VM0, Hva(0), 2048, False, hfns, tags, writable)
    frames = [(hva, hfns[hva]) for hva in range(2048) if hfns[hva] != 0xFFFFFFFF]
    assert len({hfn for _, hfn in frames}) == len(frames) == present, "a frame has one page"
    for hva, hfn in frames:
        assert tags[hva] == lib.frame_host_tag_of(rig.m, Hfn(hfn))
        assert writable[hva] == (hva not in readonly)
        assert lib.frame_read(rig.m, Hfn(hfn), WordIndex(5)) == contents.get(hva, 0)
    for hva, value in contents.items():
        assert lib.mm_read(rig.m, VM0, Hva(hva), WordIndex(5)) == value
    for region in (0, 512):
        if lib.mm_huge(rig.m, VM0, Hva(region)):
            assert [hfns[region + i] - hfns[region] for i in range(BLOCK)] == list(range(BLOCK))
