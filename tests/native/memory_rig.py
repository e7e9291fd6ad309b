"""A machine with one VM, and its frames, EPT and user memory without any KVM above them."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from native import ffi, lib
from native.types import (
    CounterId,
    Custody,
    FrameKind,
    Gfn,
    Hfn,
    HostWritable,
    Hva,
    Level,
    SpteIndex,
    WordIndex,
)
from tests.support import CPU1, CPU2, VM0

if TYPE_CHECKING:
    from native._native import U32, U64, MmPagePtr, TdpChunkPtr

CPU = CPU1  # the housekeeping CPU that the tests act as
RCU_CPU = CPU2
PRESENT, WRITABLE, ACCESSED, DIRTY, HUGE = 7, 2, 0x100, 0x200, 0x80
MMU_WRITABLE = 1 << lib.SPTE_MMU_WRITABLE_BIT
CUSTODY_MASK = 0x7FFF << lib.SPTE_CUSTODY_SHIFT
BLOCK = int(lib.BLOCK_FRAMES)
HUGE_GFN = 512  # a 2M range of the rig's 2048 gfns that tests map huge


def pages_of(level: int) -> int:
    """KVM_PAGES_PER_HPAGE()"""
    return 1 << 9 * (level - 1)


def index_of(gfn: int, level: int) -> int:
    return gfn >> 9 * (level - 1) & 511


class Rig:
    """One machine, VM 0, and a root."""

    def __init__(self, gfns: int = 2048, root_level: int = 4, **changes: int) -> None:
        values = {"pcpus": 1, "housekeeping": 2, "vms": 2, "vcpus": 1, "seed": 1}
        values |= {"root_frames": 4, "table_frames": 64, "guest_frames": 256, "guest_blocks": 3}
        values |= {"l1_ways": 4, "l2_entries": 64, "l2_ways": 4, "psc_entries": 4}
        values.update(changes)
        error = ffi.new("char[]", 200)
        self.m = lib.machine_create(ffi.new("struct machine_config *", values), error, 200)
        if self.m == ffi.NULL:
            raise AssertionError(ffi.string(error).decode())
        assert lib.vm_create(self.m, gfns) == 0
        self.gfns = gfns
        self.root_level = root_level
        self.unmapped = 0  # pages, by zap() and remove()
        self.root = self.table(lib.FRAME_ROOT)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        lib.machine_stop(self.m)
        lib.machine_destroy(self.m)

    def error(self) -> str:
        return ffi.string(lib.machine_error_text(self.m, CPU)).decode()

    def events(self) -> list[tuple[int, int, int]]:
        out = ffi.new("struct event[]", 256)
        return [(out[i].kind, out[i].a, out[i].b) for i in range(lib.events_read(self.m, CPU, out, 256))]

    def count(self, counter: CounterId) -> int:
        values = ffi.new("uint64_t[]", lib.COUNTERS)
        lib.counters_sum(self.m, values)
        return int(values[counter])

    # -- frames

    def frame(self, kind: FrameKind) -> Hfn:
        return Hfn(lib.frame_alloc(self.m, CPU, kind))

    def free(self, hfn: Hfn) -> None:
        lib.frame_free(self.m, CPU, hfn)

    def words(self, hfn: Hfn) -> set[int]:
        return {lib.frame_read(self.m, hfn, WordIndex(i)) for i in range(512)}

    # -- EPT

    def table(self, kind: FrameKind = lib.FRAME_TABLE) -> Hfn:
        table = Hfn(lib.ept_table_alloc(self.m, CPU, kind))
        assert table > 0
        return table

    def path(self, gfn: int) -> tuple[int, U32, U64]:
        """The level where a walk to gfn ends; tables and SPTEs by level."""
        sptes, tables = ffi.new("uint64_t[]", 6), ffi.new("uint32_t[]", 6)
        level = int(lib.tdp_mmu_get_walk(self.m, self.root, Level(self.root_level), Gfn(gfn), sptes, tables))
        return level, tables, sptes

    def walk(self, gfn: int) -> tuple[Hfn, int, int]:
        """Table, level and SPTE where a walk to gfn ends."""
        level, tables, sptes = self.path(gfn)
        return Hfn(tables[level]), level, int(sptes[level])

    def set_atomic(self, table: Hfn, level: int, gfn: int, old: int, new: int) -> int:
        return int(
            lib.tdp_mmu_set_spte_atomic(
                self.m, CPU, VM0, table, SpteIndex(index_of(gfn, level)), Level(level), Gfn(gfn), old, new
            )
        )

    def set(self, table: Hfn, level: int, gfn: int, new: int) -> int:
        return int(
            lib.tdp_mmu_set_spte(
                self.m, CPU, VM0, table, SpteIndex(index_of(gfn, level)), Level(level), Gfn(gfn), new
            )
        )

    def link(self, gfn: int, goal: int) -> tuple[Hfn, int]:
        """Tables down to `goal`; returns the table and the SPTE there."""
        while True:
            level, tables, sptes = self.path(gfn)
            if level <= goal or sptes[level] & PRESENT:
                return Hfn(tables[max(level, goal)]), int(sptes[max(level, goal)])
            child = lib.make_nonleaf_spte(self.m, self.table())
            assert self.set_atomic(Hfn(tables[level]), level, gfn, sptes[level], child) == 0

    def chunk(self, walk: int, start: int = 0, end: int | None = None, **more: int) -> TdpChunkPtr:
        fields = {"root": self.root, "root_level": self.root_level, "walk": walk, "next_gfn": start}
        fields["end_gfn"] = self.gfns if end is None else end
        return ffi.new("struct tdp_chunk *", {**fields, **more})

    def step(self, chunk: TdpChunkPtr, most: int = 1 << 20) -> TdpChunkPtr:
        assert lib.tdp_walk_chunk(self.m, CPU, VM0, chunk, most) == 0
        return chunk

    def remove(self, spte: int, level: int, gfn: int, shared: int = 0, most: int = 512) -> list[Hfn]:
        """Take the table apart that was linked by this SPTE; its pages, children first."""
        removal = ffi.new("struct tdp_removal *")
        assert (
            lib.tdp_removal_begin(self.m, CPU, VM0, removal, spte, Level(level), Gfn(gfn), bool(shared)) == 0
        )
        pages = []
        while removal.level:
            assert lib.tdp_removal_step(self.m, CPU, VM0, removal, most) == 0
            self.unmapped += removal.leafs
            if removal.page:
                pages.append(removal.page)
        return pages

    def zap(self, chunk: TdpChunkPtr, most: int = 1 << 20) -> tuple[int, int, int]:
        """The whole walk: SPTEs changed, pages unmapped, tables removed and freed."""
        changed = tables = 0
        before = self.unmapped
        while not chunk.done:
            self.step(chunk, most)
            changed += chunk.changed
            self.unmapped += chunk.pages
            if chunk.found_level:
                removed = self.remove(
                    chunk.found_spte, chunk.found_level, chunk.found_gfn, chunk.shared, most
                )
                tables += len(removed)
                for table in removed:
                    lib.ept_table_free_rcu(self.m, CPU, table)
        return changed, self.unmapped - before, tables

    def right(self, gfn: int) -> int:
        """Rights granted now: 1 read, 2 write."""
        return int(lib.oracle_right(self.m, VM0, Gfn(gfn), ffi.new("uint32_t *"))) & 3

    def hfn(self, gfn: int) -> Hfn:
        hfn = ffi.new("uint32_t *")
        lib.oracle_right(self.m, VM0, Gfn(gfn), hfn)
        return Hfn(hfn[0])

    # -- user memory

    def fault(self, hva: int, write: bool = True) -> MmPagePtr:
        page = ffi.new("struct mm_page *")
        assert lib.mm_fault(self.m, CPU, VM0, Hva(hva), write, page) == 0
        return page

    def try_fault(self, hva: int, write: bool = True) -> int:
        """0, or why there is no page."""
        return lib.mm_fault(self.m, CPU, VM0, Hva(hva), write, ffi.new("struct mm_page *"))


def map_page(rig: Rig, gfn: int, writable: bool = True) -> int:
    """Map one 4K page; returns its SPTE."""
    table, old = rig.link(gfn, 1)
    page = rig.fault(gfn)
    spte = int(lib.make_spte(page.hfn, page.tag, Level(1), writable, HostWritable(True)))
    assert rig.set_atomic(table, 1, gfn, old, spte) == 0
    return spte


def map_huge(rig: Rig, gfn: int = HUGE_GFN) -> int:
    """Install a 2M leaf, and return it."""
    rig.fault(gfn)
    assert lib.mm_collapse(rig.m, CPU, VM0, Hva(gfn)) == 0
    page = rig.fault(gfn)
    table, old = rig.link(gfn, 2)
    custody = lib.mm_huge_custody(rig.m, VM0, Hva(gfn), page.hfn, page.tag)
    spte = int(lib.make_spte(page.hfn, Custody(custody), Level(2), True, HostWritable(True)))
    assert rig.set_atomic(table, 2, gfn, old, spte) == 0
    return spte


def split_table(rig: Rig, huge_spte: int, level: int) -> int:
    """Return a new table that maps what the SPTE maps, or lib.MACHINE_NOMEM."""
    table = lib.ept_table_alloc(rig.m, CPU, lib.FRAME_TABLE)
    if table >= 0:
        assert lib.tdp_mmu_fill_split_table(rig.m, CPU, Hfn(table), huge_spte, Level(level)) == 0
    return int(table)
