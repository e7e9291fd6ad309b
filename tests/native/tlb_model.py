"""The entries that a TLB may hold, by the SDM's rules: nothing is evicted, every operation scans everything.

Slow and obvious on purpose.  Sources: SDM vol. 3A 4.10 (linear addresses, PCIDs, global pages, INVLPG,
INVPCID, MOV to CR, page faults) and vol. 3C 29.4 (VPIDs, EP4TAs, INVEPT, INVVPID, EPT violations).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum


class Kind(IntEnum):
    LINEAR = 0
    GUEST_PHYSICAL = 1
    COMBINED = 2


@dataclass(frozen=True)
class Tag:
    kind: Kind
    vpid: int = 0
    pcid: int = 0
    ep4ta: int = 0


@dataclass(frozen=True)
class Translation:
    tag: Tag
    page: int
    size: int
    hfn: int
    is_global: bool = False
    guest_size: int | None = None  # of the guest page that this is a piece of, if a piece
    vm: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        """Return the key that two translations share if the later one replaces the earlier."""
        pcid = None if self.is_global else self.tag.pcid
        return (self.tag.kind, self.tag.vpid, pcid, self.tag.ep4ta, self.size, self.page)

    def covers(self, page: int) -> bool:
        return page >> 9 * self.size == self.page >> 9 * self.size

    def is_of_guest_page_at(self, page: int) -> bool:
        shift = 9 * (self.size if self.guest_size is None else self.guest_size)
        return page >> shift == self.page >> shift


@dataclass(frozen=True)
class PscEntry:
    tag: Tag
    page: int
    level: int  # of the table that it points to: 1 covers 2M
    hfn: int

    @property
    def key(self) -> tuple[object, ...]:
        return (self.tag, self.level, self.page)

    def covers(self, page: int) -> bool:
        return page >> 9 * self.level == self.page >> 9 * self.level


@dataclass
class Ghost:
    entry: Translation
    flush: int
    invalidations: int  # done before this one


Doomed = Callable[[Translation], bool]
DoomedPsc = Callable[[PscEntry], bool]
LINEAR_KINDS = (Kind.LINEAR, Kind.COMBINED)
EPT_KINDS = (Kind.GUEST_PHYSICAL, Kind.COMBINED)


@dataclass
class ModelTlb:
    vpid: int = 0
    pcid: int = 0
    ep4ta: int = 0
    kind: Kind = Kind.LINEAR
    flush: int = 0
    live: dict[tuple[object, ...], Translation] = field(default_factory=dict)
    #: Replaced by a later fill but never invalidated: the first level may still hold copies.
    superseded: set[Translation] = field(default_factory=set)
    ghosts: dict[tuple[object, ...], Ghost] = field(default_factory=dict)
    psc: dict[tuple[object, ...], PscEntry] = field(default_factory=dict)
    dropped: Counter[int] = field(default_factory=Counter)
    invalidations: int = 0

    # -- current context

    def switch(self, kind: Kind, vpid: int, pcid: int, ep4ta: int) -> None:
        self.kind, self.vpid, self.pcid, self.ep4ta = kind, vpid, pcid, ep4ta

    def tag(self, kind: Kind) -> Tag:
        if kind == Kind.GUEST_PHYSICAL:
            return Tag(kind, ep4ta=self.ep4ta)
        return Tag(kind, self.vpid, self.pcid, self.ep4ta if kind == Kind.COMBINED else 0)

    def usable(self, entry: Translation, kind: Kind, page: int) -> bool:
        """May an access of that kind use it now?"""
        tag = self.tag(kind)
        if not entry.covers(page) or entry.tag.kind != kind or entry.tag.ep4ta != tag.ep4ta:
            return False
        if kind == Kind.GUEST_PHYSICAL:
            return True
        return entry.tag.vpid == tag.vpid and (entry.is_global or entry.tag.pcid == tag.pcid)

    # -- fill and look-up

    def insert(self, entry: Translation) -> None:
        old = self.live.get(entry.key)
        if old is not None:
            self.superseded.add(old)
        self.live[entry.key] = entry
        self.ghosts.pop(entry.key, None)

    def hits(self, kind: Kind, page: int) -> list[Translation]:
        return [e for e in self.live.values() if self.usable(e, kind, page)]

    def first_level(self, page: int) -> list[Translation]:
        every = [*self.live.values(), *self.superseded]
        return [e for e in every if self.usable(e, self.kind, page)]

    def ghosts_of(self, kind: Kind, page: int) -> list[Ghost]:
        return [g for g in self.ghosts.values() if self.usable(g.entry, kind, page)]

    def insert_psc(self, entry: PscEntry) -> None:
        self.psc[entry.key] = entry

    def psc_hit(self, kind: Kind, page: int) -> PscEntry | None:
        tag = self.tag(kind)
        hits = [e for e in self.psc.values() if e.tag == tag and e.covers(page)]
        return min(hits, key=lambda e: e.level, default=None)

    # -- invalidation

    def _drop(self, flush: int, doomed: Doomed, doomed_psc: DoomedPsc) -> None:
        self.invalidations += 1
        for key, entry in list(self.live.items()):
            if doomed(entry):
                del self.live[key]
                self.ghosts[key] = Ghost(entry, flush, self.invalidations)
                self.dropped[entry.vm] += 1
        self.superseded = {e for e in self.superseded if not doomed(e)}
        self.psc = {key: e for key, e in self.psc.items() if not doomed_psc(e)}

    def flush_begin(self, flush: int) -> None:
        self.flush = flush
        self.dropped.clear()

    def invept_single(self, ep4ta: int) -> None:
        self._drop(
            self.flush,
            lambda e: e.tag.kind in EPT_KINDS and e.tag.ep4ta == ep4ta,
            lambda e: e.tag.kind in EPT_KINDS and e.tag.ep4ta == ep4ta,
        )

    def invept_global(self) -> None:
        self._drop(self.flush, lambda e: e.tag.kind in EPT_KINDS, lambda e: e.tag.kind in EPT_KINDS)

    def invvpid_address(self, vpid: int, page: int) -> None:
        if vpid == 0:
            return  # VMfail
        self._drop(
            self.flush,
            lambda e: e.tag.kind in LINEAR_KINDS and e.tag.vpid == vpid and e.is_of_guest_page_at(page),
            lambda e: e.tag.kind in LINEAR_KINDS and e.tag.vpid == vpid and e.covers(page),
        )

    def invvpid_single(self, vpid: int) -> None:
        if vpid == 0:
            return  # VMfail
        self._drop_vpid(self.flush, vpid, None, True)

    def invvpid_all(self) -> None:
        self._drop(
            self.flush,
            lambda e: e.tag.kind in LINEAR_KINDS and e.tag.vpid != 0,
            lambda e: e.tag.kind in LINEAR_KINDS and e.tag.vpid != 0,
        )

    def invvpid_retain_globals(self, vpid: int) -> None:
        if vpid == 0:
            return  # VMfail
        self._drop_vpid(self.flush, vpid, None, False)

    def _drop_vpid(self, flush: int, vpid: int, pcid: int | None, and_globals: bool) -> None:
        """Linear and combined mappings of a VPID, of one PCID or all, of every EP4TA."""

        def of_vpid(e: Translation | PscEntry) -> bool:
            return e.tag.kind in LINEAR_KINDS and e.tag.vpid == vpid

        self._drop(
            flush,
            lambda e: of_vpid(e) and (and_globals if e.is_global else pcid in (None, e.tag.pcid)),
            lambda e: of_vpid(e) and pcid in (None, e.tag.pcid),
        )

    def _address_of_pcid(self, e: Translation, pcid: int, and_globals: bool, page: int) -> bool:
        if e.tag.kind not in LINEAR_KINDS or e.tag.vpid != self.vpid or not e.is_of_guest_page_at(page):
            return False
        return and_globals if e.is_global else e.tag.pcid == pcid

    def _psc_of_pcid(self, e: PscEntry, pcid: int) -> bool:
        return e.tag.kind in LINEAR_KINDS and e.tag.vpid == self.vpid and e.tag.pcid == pcid

    def invlpg(self, page: int) -> None:
        self._drop(
            0,
            lambda e: self._address_of_pcid(e, self.pcid, True, page),
            lambda e: self._psc_of_pcid(e, self.pcid),
        )

    def invpcid_address(self, pcid: int, page: int) -> None:
        self._drop(
            0,
            lambda e: self._address_of_pcid(e, pcid, False, page),
            lambda e: self._psc_of_pcid(e, pcid) and e.covers(page),
        )

    def invpcid_single(self, pcid: int) -> None:
        self._drop_vpid(0, self.vpid, pcid, False)

    def invpcid_all(self) -> None:
        self._drop_vpid(0, self.vpid, None, True)

    def invpcid_retain_globals(self) -> None:
        self._drop_vpid(0, self.vpid, None, False)

    def mov_to_cr3(self, pcid: int) -> None:
        self._drop_vpid(0, self.vpid, pcid, False)

    def mov_to_cr_all(self) -> None:
        self._drop_vpid(0, self.vpid, None, True)

    def mov_to_cr_pcid(self) -> None:
        self._drop_vpid(0, self.vpid, self.pcid, True)

    def page_fault_invalidate(self, page: int) -> None:
        self._drop(
            0,
            lambda e: self._address_of_pcid(e, self.pcid, True, page),
            lambda e: self._psc_of_pcid(e, self.pcid) and e.covers(page),
        )

    def ept_violation_invalidate(self, gpa_page: int, linear_page: int | None) -> None:
        """Guest-physical mappings for the address; combined ones for the linear address, this EP4TA only."""
        if self.kind == Kind.LINEAR:
            return  # EPT is off
        if self.kind == Kind.GUEST_PHYSICAL:
            linear_page = None  # paging is off

        def used(e: Translation) -> bool:
            if self.usable(e, Kind.GUEST_PHYSICAL, gpa_page):
                return True
            return linear_page is not None and self.usable(e, Kind.COMBINED, linear_page)

        def used_psc(e: PscEntry) -> bool:
            if e.tag == self.tag(Kind.GUEST_PHYSICAL):
                return e.covers(gpa_page)
            return linear_page is not None and e.tag == self.tag(Kind.COMBINED) and e.covers(linear_page)

        self._drop(0, used, used_psc)

    def vm_transition_no_vpid(self) -> None:
        self._drop_vpid(0, 0, None, True)

    def drop(self, kind: Kind, page: int) -> None:
        """Forget the translation of one page in the current context; no instruction does this."""
        self._drop(0, lambda e: self.usable(e, kind, page), lambda e: False)
