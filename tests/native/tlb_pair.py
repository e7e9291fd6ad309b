"""The native TLB and the model side by side: each operation goes to both, each answer is compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from native import ffi, lib
from native.types import Ep4ta, Gfn, LinearPage, MappingKind, Pcid, Vpid
from tests.native.tlb_model import Kind, ModelTlb, PscEntry, Tag, Translation

FLUSH_HISTORY = 16  # as in tlb_internal.h: generations for which ghosts know their end

# Few of each, so that they meet; VPIDs 1 and 257 share a chain.
VPIDS = (0, 1, 2, 257)
PCIDS = (0, 1, 5)
EP4TAS = (3, 4)
PAGES = (0, 1, 2, 511, 512, 513, 1024, 1 << 18, (1 << 18) + 1, (1 << 18) + 513, 1 << 27, (1 << 36) - 1)
VMS = 8
DUMP_MAX = 4096


@dataclass(frozen=True)
class Geometry:
    l2_entries: int
    l2_ways: int
    psc_entries: int

    @property
    def unbounded(self) -> bool:
        return self.l2_entries == 0


UNBOUNDED = Geometry(0, 0, 0)
SERVER = Geometry(1536, 12, 32)
TINY = Geometry(8, 2, 4)


def native_tlb(geometry: Geometry) -> Any:
    config = ffi.new("struct machine_config *")
    config.vms = VMS
    config.l2_entries = geometry.l2_entries
    config.l2_ways = geometry.l2_ways
    config.psc_entries = geometry.psc_entries
    tlb = lib.tlb_create(config)
    assert tlb != ffi.NULL
    return tlb


@dataclass
class Pair:
    geometry: Geometry
    model: ModelTlb = field(default_factory=ModelTlb)
    frames: int = 0  # each fill gets a frame number of its own, so that a stale copy shows
    native: Any = None
    entry: Any = None

    def __post_init__(self) -> None:
        self.native = native_tlb(self.geometry)
        self.entry = ffi.new("struct tlb_entry *")
        self.psc_entry = ffi.new("struct psc_entry *")
        self.dumped = ffi.new("struct tlb_entry[]", DUMP_MAX)
        self.psc_dumped = ffi.new("struct psc_entry[]", DUMP_MAX)
        self.hfn = ffi.new("uint32_t *")
        self.right = ffi.new("uint32_t[]", 3)
        self.switch(Kind.COMBINED, 1, 0, EP4TAS[0])

    def close(self) -> None:
        lib.tlb_destroy(self.native)
        self.native = None

    # -- current context, fills

    def switch(self, kind: Kind, vpid: int, pcid: int, ep4ta: int) -> None:
        if kind == Kind.GUEST_PHYSICAL:
            pcid = 0
            lib.tlb_switch_physical(self.native, Vpid(vpid), Ep4ta(ep4ta))
        else:
            lib.tlb_switch(self.native, Vpid(vpid), Pcid(pcid), Ep4ta(ep4ta), kind == Kind.COMBINED)
        self.model.switch(kind, vpid, pcid, ep4ta)

    def insert(self, page: int, size: int, guest: int, is_global: bool, physical: bool) -> None:
        """guest > size makes a piece of a larger guest page."""
        kind = Kind.GUEST_PHYSICAL if physical and self.model.kind != Kind.LINEAR else self.model.kind
        if kind == Kind.GUEST_PHYSICAL:
            guest, is_global = size, False
        self.frames += 1 << 18
        tag = self.model.tag(kind)
        # One VM to a context: then tlb_dropped() is exact.
        vm = tag.vpid % VMS if kind == Kind.LINEAR else tag.ep4ta % VMS
        aligned = page >> 9 * size << 9 * size
        pieces = guest if guest > size else None
        entry = Translation(tag, aligned, size, self.frames, is_global, pieces, vm)
        self.model.insert(entry)
        e = self.entry
        e.page, e.hfn, e.size, e.kind, e.vm = aligned, self.frames, size, kind, vm
        e.fractured = 0 if pieces is None else guest + 1
        setattr(e, "global", is_global)
        e.right = [self.frames >> 18, 1, 2]
        lib.tlb_insert(self.native, e, page)

    def insert_psc(self, page: int, level: int, physical: bool) -> None:
        kind = Kind.GUEST_PHYSICAL if physical and self.model.kind != Kind.LINEAR else self.model.kind
        self.frames += 1 << 18
        aligned = page >> 9 * level << 9 * level
        self.model.insert_psc(PscEntry(self.model.tag(kind), aligned, level, self.frames))
        e = self.psc_entry
        e.page, e.hfn, e.level, e.kind = page, self.frames, level, kind
        lib.psc_insert(self.native, e)

    # -- look-ups

    def lookup(self, page: int, physical: bool, refill: bool = False) -> int:
        kind = Kind.GUEST_PHYSICAL if physical and self.model.kind != Kind.LINEAR else self.model.kind
        if refill:
            kind = self.model.kind
            result = lib.tlb_refill_l1(self.native, page, self.entry)
        else:
            result = lib.tlb_lookup(self.native, MappingKind(kind), page, self.entry)
        hits = self.model.hits(kind, page)
        ghosts = self.model.ghosts_of(kind, page)
        if result == 1:
            assert translation(self.entry) in hits
        elif result == 2:
            self._check_ghost(ghosts)
        if self.geometry.unbounded:
            assert result == (1 if hits else 2 if ghosts else 0)
        if result == 2 and not refill and (self.frames >> 18) % 3 == 0:
            found = translation(self.entry)
            lib.tlb_ghost_forget(self.native)
            del self.model.ghosts[found.key]
        return int(result)

    def _check_ghost(self, ghosts: list[Any]) -> None:
        found = [g for g in ghosts if g.entry == translation(self.entry)]
        assert len(found) == 1
        flush = lib.tlb_ghost_flush(self.native)
        forgotten = self.model.invalidations - found[0].invalidations >= FLUSH_HISTORY
        assert flush == found[0].flush or (forgotten and flush == 0)

    def psc_lookup(self, page: int, physical: bool) -> None:
        kind = Kind.GUEST_PHYSICAL if physical and self.model.kind != Kind.LINEAR else self.model.kind
        level = lib.psc_lookup(self.native, MappingKind(kind), page, self.psc_entry)
        if level:
            assert level == self.psc_entry.level
            assert psc(self.psc_entry) in self.model.psc.values()
            assert psc(self.psc_entry).tag == self.model.tag(kind)
        if self.geometry.unbounded:
            deepest = self.model.psc_hit(kind, page)
            assert level == (deepest.level if deepest else 0)

    # -- invalidation: the same name on both sides

    @contextmanager
    def counting_drops(self) -> Iterator[None]:
        """Flush numbers are counted up; native operations must not take them."""
        flush = self.model.flush + 1
        lib.tlb_flush_begin(self.native, flush)
        self.model.flush_begin(flush)
        yield
        if self.geometry.unbounded:
            total = sum(self.model.dropped.values())
            assert lib.tlb_dropped(self.native, -1) == total
            for vm in range(VMS):
                assert lib.tlb_dropped(self.native, vm) == total - self.model.dropped[vm]

    def invalidate(self, name: str, *arguments: int) -> None:
        with self.counting_drops():
            getattr(lib, name)(self.native, *arguments)
            getattr(self.model, name)(*arguments)

    def ept_violation(self, gpa_page: int, linear_page: int | None) -> None:
        if self.model.kind == Kind.LINEAR:
            return
        with self.counting_drops():
            lib.ept_violation_invalidate(
                self.native, Gfn(gpa_page), LinearPage(linear_page or 0), linear_page is not None
            )
            self.model.ept_violation_invalidate(gpa_page, linear_page)

    def drop(self, page: int) -> None:
        with self.counting_drops():
            lib.tlb_drop(self.native, MappingKind(self.model.kind), page)
            self.model.drop(self.model.kind, page)

    # -- everything

    def check(self, pages: tuple[int, ...] = PAGES) -> None:
        n = lib.tlb_dump(self.native, self.dumped, DUMP_MAX)
        held = [translation(self.dumped[i]) for i in range(n)]
        n = lib.psc_dump(self.native, self.psc_dumped, DUMP_MAX)
        psc_held = [psc(self.psc_dumped[i]) for i in range(n)]
        assert len(set(held)) == len(held)
        if self.geometry.unbounded:
            assert set(held) == set(self.model.live.values())
            assert set(psc_held) == set(self.model.psc.values())
        else:
            assert set(held) <= set(self.model.live.values())
            assert set(psc_held) <= set(self.model.psc.values())
        for page in pages:
            if lib.tlb_l1_probe(self.native, page, self.hfn, self.right):
                cached = self.model.first_level(page)
                assert self.hfn[0] in {e.hfn + page - e.page for e in cached}
                # The second level leaves the rights of a large page unjudged, and so those of its pieces.
                unjudged = [lib.RIGHT_UNJUDGED] if any(e.size for e in cached) else []
                assert self.right[0] in [self.hfn[0] >> 18, *unjudged]


def translation(e: Any) -> Translation:
    tag = Tag(Kind(e.kind), e.vpid, e.pcid, e.ep4ta)
    pieces = e.fractured - 1 if e.fractured else None
    return Translation(tag, e.page, e.size, e.hfn, bool(getattr(e, "global")), pieces, e.vm)


def psc(e: Any) -> PscEntry:
    return PscEntry(Tag(Kind(e.kind), e.vpid, e.pcid, e.ep4ta), e.page, e.level, e.hfn)


#: Operation name of both sides, and the ranges of its arguments.
INVALIDATIONS: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...] = (
    ("invept_single", (EP4TAS,)),
    ("invept_global", ()),
    ("invvpid_address", (VPIDS, PAGES)),
    ("invvpid_single", (VPIDS,)),
    ("invvpid_all", ()),
    ("invvpid_retain_globals", (VPIDS,)),
    ("invlpg", (PAGES,)),
    ("invpcid_address", (PCIDS, PAGES)),
    ("invpcid_single", (PCIDS,)),
    ("invpcid_all", ()),
    ("invpcid_retain_globals", ()),
    ("mov_to_cr3", (PCIDS,)),
    ("mov_to_cr_all", ()),
    ("mov_to_cr_pcid", ()),
    ("page_fault_invalidate", (PAGES,)),
    ("vm_transition_no_vpid", ()),
)


def random_program(geometry: Geometry, seed: int, steps: int) -> None:
    """Fills outnumber invalidations, so that there is something to drop or to keep."""
    r = random.Random(seed)
    pair = Pair(geometry)

    def flag() -> bool:
        return r.random() < 0.5

    def near() -> int:
        return (r.choice(PAGES) + r.choice((0, 0, 1, 7, 512))) & ((1 << 36) - 1)

    def insert() -> None:
        pair.insert(near(), r.choice((0, 0, 0, 1, 2)), r.randrange(3), flag(), r.random() < 0.3)

    def invalidate() -> None:
        name, arguments = r.choice(INVALIDATIONS)
        pair.invalidate(name, *(r.choice(values) for values in arguments))

    steps_by_weight: list[tuple[int, Callable[[], object]]] = [
        (12, insert),
        (6, lambda: pair.insert_psc(r.choice(PAGES), r.randrange(1, 5), flag())),
        (5, lambda: pair.switch(Kind(r.randrange(3)), r.choice(VPIDS), r.choice(PCIDS), r.choice(EP4TAS))),
        (4, lambda: pair.lookup(near(), flag(), refill=flag())),
        (2, lambda: pair.psc_lookup(near(), flag())),
        (4, invalidate),
        (1, lambda: pair.ept_violation(near(), near() if flag() else None)),
        (1, lambda: pair.drop(near())),
    ]
    weights = [weight for weight, _ in steps_by_weight]
    for _, step in r.choices(steps_by_weight, weights, k=steps):
        step()
        pair.check()
    pair.close()
