"""Cases that the fast path must leave to the general walk, one test each.

As in test_walk_fast.py two machines do the same, of which one never takes the fast path.  Here a page is
evicted from both levels while the tables on the way to it stay cached, so that the fast path is tried; then
one condition of it is broken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from native import ffi, lib
from native.types import WordIndex
from tests.native.hypervisor import EXECUTE, READ, WRITE
from tests.native.test_walk_fast import PAGES, Side, check_cached
from tests.support import CPU0

GPTE_WRITABLE, GPTE_GLOBAL = 2, 0x100
PAGE, OTHERS = PAGES[0], PAGES[1:24]


class Case(Side):
    """One of the two machines, with PAGE in no cell of pCPU 0."""

    def __enter__(self) -> Case:
        return self

    def __init__(self, psc_entries: int) -> None:
        super().__init__(24, 12, psc_entries)
        self.tlb = lib.cpu_tlb(self.m, CPU0)
        for page in [*OTHERS, PAGE]:
            self.touch(page, WRITE)
        self.make_absent(PAGE)

    def touch(self, page: int, kind: int = READ) -> None:
        self.access(CPU0, self.vcpus[0], page << 12, kind)

    def make_absent(self, page: int) -> None:
        """All its cells go to others."""
        for _ in range(3):
            for other in OTHERS:
                if other != page:
                    self.touch(other)
        assert not {page, self.gfn(page)} & {e.page for e in self.live()}

    def live(self) -> list[Any]:
        entries = ffi.new("struct tlb_entry[]", 2048)
        self.keep.append(entries)
        return [entries[i] for i in range(lib.tlb_dump(self.tlb, entries, 2048))]

    def tables(self) -> list[Any]:
        entries = ffi.new("struct psc_entry[]", 512)
        self.keep.append(entries)
        return [entries[i] for i in range(lib.psc_dump(self.tlb, entries, 512))]

    def last_table(self, kind: int, page: int) -> Any:
        """The cached link to the last table on the way to the page."""
        (table,) = [t for t in self.tables() if (t.kind, t.level, t.page) == (kind, 1, page & ~511)]
        return table

    def gpte(self, page: int, flip: int = 0) -> int:
        hfn = self.last_table(lib.KIND_COMBINED, page).hfn
        value = int(lib.frame_read(self.m, hfn, WordIndex(page & 511))) ^ flip
        lib.frame_write(self.m, hfn, WordIndex(page & 511), value)
        return value

    def gfn(self, page: int) -> int:
        return self.gpte(page) >> 12 & 0xFFFFFFFFFF

    def insert(self, kind: int, page: int, size: int) -> None:
        """A translation like any other."""
        e = self.live()[0]
        e.kind, e.page, e.size = kind, page, size
        lib.tlb_insert(self.tlb, ffi.addressof(e), page)

    def flush_but_tables(self, flush: Callable[[], None]) -> None:
        """A flush after which the paging-structure caches are as before."""
        tables = self.tables()
        flush()
        for t in tables:
            lib.psc_insert(self.tlb, ffi.addressof(t))

    def first_level_goes(self, page: int) -> None:
        """With one translation of the second, not of the page."""
        nth = next(nth for nth, e in enumerate(self.live()) if e.page != page)
        assert lib.tlb_evict(self.tlb, nth)

    def evict_combined(self) -> None:
        """All of them, without a ghost."""
        for nth, e in reversed(list(enumerate(self.live()))):
            if e.kind == lib.KIND_COMBINED:
                assert lib.tlb_evict(self.tlb, nth)

    def flip_link(self, bits: int) -> None:
        link = self.last_table(lib.KIND_GUEST_PHYSICAL, self.gfn(PAGE))
        link.right ^= bits
        lib.psc_insert(self.tlb, ffi.addressof(link))


def read_only_to_the_guest(side: Case) -> None:
    side.gpte(PAGE, GPTE_WRITABLE)
    side.touch(PAGE)


def global_page(side: Case) -> None:
    side.gpte(PAGE, GPTE_GLOBAL)
    side.touch(PAGE)


def not_executable(side: Case) -> None:
    side.change(side.gfn(PAGE), lib.SPTE_EXECUTABLE)
    side.touch(PAGE)


def executed_first(side: Case) -> None:
    side.change(side.gfn(PAGE), lib.SPTE_ACCESSED)
    side.touch(PAGE, EXECUTE)


def link_of_an_earlier_root(side: Case) -> None:
    side.flip_link(1 << 16)
    side.touch(PAGE)
    assert side.violations() == {"foreign-root": 1}


def link_to_a_freed_table(side: Case) -> None:
    side.flip_link(1)
    side.touch(PAGE)
    assert side.violations() == {"walk-after-free": 1}


def ghost_of_a_large_page(side: Case) -> None:
    side.insert(lib.KIND_COMBINED, PAGE & ~511, lib.PAGE_2M)
    side.flush_but_tables(lambda: side.do_invvpid(CPU0))
    refills = side.count(lib.COUNT_REFILLS)
    side.touch(PAGE)
    assert side.count(lib.COUNT_REFILLS) > refills


def ghost_of_the_guest_physical_page(side: Case) -> None:
    side.insert(lib.KIND_GUEST_PHYSICAL, side.gfn(PAGE), lib.PAGE_4K)
    side.flush_but_tables(side.do_flush)
    refills = side.count(lib.COUNT_REFILLS)
    side.touch(PAGE)
    assert side.count(lib.COUNT_REFILLS) > refills


def dead_but_no_ghost(side: Case) -> None:
    """Its own cell must be taken again: of two with one id the first is found, which may be the dead one."""
    for page in (PAGE, *OTHERS):
        side.make_absent(page)
        side.insert(lib.KIND_COMBINED, page, lib.PAGE_4K)
        side.evict_combined()
        side.touch(page)
        side.first_level_goes(page)
        side.touch(page)


CASES = [
    read_only_to_the_guest,
    global_page,
    not_executable,
    executed_first,
    link_of_an_earlier_root,
    link_to_a_freed_table,
    ghost_of_a_large_page,
    ghost_of_the_guest_physical_page,
    dead_but_no_ghost,
]


@pytest.mark.parametrize("case", CASES)
def test_other_cases_are_left_to_the_general_walk(case: Callable[[Case], None]) -> None:
    with Case(64) as fast, Case(0) as general:
        case(fast)
        case(general)
        assert fast.counts() == general.counts()
        assert fast.violations() == general.violations()
        assert fast.sptes() == general.sptes()
        check_cached(fast, general, CPU0, case)
        assert fast.first_level(CPU0) == general.first_level(CPU0)
