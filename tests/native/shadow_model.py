"""A pCPU without EPT by the SDM's rules: walks of one dimension, linear mappings, table caches, faults.

Slow and obvious on purpose, as tlb_model.py.  Nothing is evicted.  Sources: SDM vol. 3A 4.5 (walks), 4.7
(error codes), 4.8 (A and D), 4.10 (TLBs, PCIDs, paging-structure caches, page faults), vol. 3C 29.4 (VPIDs).
A guest access is by user mode; an SPTE maps the page to its own gfn.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

READ, WRITE, EXECUTE = 0, 1, 2
PRESENT, WRITTEN, USER, RESERVED, FETCH = 1, 2, 4, 8, 16
LEVELS = 4


@dataclass
class Spte:
    """A present leaf; `life`: which of the page's frames it maps."""

    hfn: int
    life: int
    writable: bool
    executable: bool
    user: bool
    global_: bool
    accessed: bool = True
    dirty: bool = True
    size: int = 0  # 1: a leaf of 2 MiB

    def permits(self, kind: int) -> bool:
        return self.user and (kind != WRITE or self.writable) and (kind != EXECUTE or self.executable)


@dataclass(frozen=True)
class Entry:
    """A cached translation."""

    vpid: int
    pcid: int
    page: int
    hfn: int
    life: int
    write: bool
    execute: bool
    global_: bool
    size: int = 0  # 1: of 2 MiB, `page` and `hfn` are the first

    def covers(self, page: int) -> bool:
        return page >> 9 * self.size == self.page >> 9 * self.size

    def allows(self, kind: int) -> bool:
        return kind == READ or (self.write if kind == WRITE else self.execute)


@dataclass
class Root:
    """A tree of shadow tables: the tables below it, and its leafs.  `mmio`: reserved entries, `huge`:
    leafs of 2 MiB by region, where there are no tables of level 1."""

    tables: set[tuple[int, int]] = field(default_factory=set)  # level, page >> 9 * level
    leafs: dict[int, Spte] = field(default_factory=dict)
    mmio: set[int] = field(default_factory=set)
    huge: dict[int, Spte] = field(default_factory=dict)

    def touch(self, page: int, lowest: int = 1) -> None:
        self.tables |= {(level, page >> 9 * level) for level in range(lowest, LEVELS)}


@dataclass
class Page:
    """The host's side of a page: its frames so far, and the rights that KVM has promised away."""

    life: int = 0
    hfn: int = -1
    no_read: bool = False
    no_write: bool = False

    def granted(self, hfn: int, writable: bool) -> None:
        if hfn != self.hfn:
            self.hfn, self.no_write = hfn, not writable
        self.no_read = False
        self.no_write = self.no_write and not writable


@dataclass
class Cpu:
    entries: set[Entry] = field(default_factory=set)
    caches: dict[tuple[int, int, int, int], int] = field(
        default_factory=dict
    )  # vpid, pcid, level, region: root

    def usable(self, vpid: int, pcid: int, page: int) -> list[Entry]:
        return [
            e for e in self.entries if e.covers(page) and e.vpid == vpid and (e.global_ or e.pcid == pcid)
        ]

    def drop_page(self, vpid: int, pcid: int | None, page: int) -> None:
        """Drop the entries that would translate a page, under one PCID or all; globals are used with each."""
        self.entries = {
            e
            for e in self.entries
            if not e.covers(page) or e.vpid != vpid or not (e.global_ or pcid in (None, e.pcid))
        }
        self.caches = {
            (v, p, level, region): root
            for (v, p, level, region), root in self.caches.items()
            if v != vpid or pcid not in (None, p) or page >> 9 * level != region
        }

    def drop_vpid(self, vpid: int, *, retain_globals: bool = False) -> None:
        self.entries = {e for e in self.entries if e.vpid != vpid or (retain_globals and e.global_)}
        self.caches = {key: root for key, root in self.caches.items() if key[0] != vpid}

    def drop_all(self) -> None:
        """INVVPID all-context: every VPID but 0."""
        self.entries = {e for e in self.entries if e.vpid == 0}
        self.caches = {key: root for key, root in self.caches.items() if key[0] == 0}


@dataclass
class Vcpu:
    vpid: int
    root: int = 0
    pcid: int = 0


@dataclass
class ShadowModel:
    roots: list[Root]
    cpus: list[Cpu]
    pages: dict[int, Page] = field(default_factory=dict)
    violations: int = 0

    def page(self, page: int) -> Page:
        return self.pages.setdefault(page, Page())

    # -- KVM and the host

    def set_spte(self, root: int, page: int, spte: Spte) -> None:
        self.roots[root].touch(page)
        self.roots[root].mmio.discard(page)
        self.roots[root].leafs[page] = spte
        self.page(page).granted(spte.hfn, spte.writable)

    def set_huge(self, root: int, page: int, spte: Spte) -> None:
        """Set a leaf of 2 MiB.  The host keeps its pages, so that no right to them is ever lost."""
        self.roots[root].touch(page, 2)
        self.roots[root].huge[page >> 9] = spte

    def set_mmio(self, root: int, page: int) -> None:
        self.zap(root, page)
        self.roots[root].touch(page)
        self.roots[root].mmio.add(page)

    def zap(self, root: int, page: int) -> None:
        self.roots[root].leafs.pop(page, None)
        self.roots[root].mmio.discard(page)

    def promise(self, page: int, *, freed: bool) -> None:
        """Every SPTE of the page is gone, and KVM promises that it is used no more."""
        for root in range(len(self.roots)):
            self.roots[root].leafs.pop(page, None)
        state = self.page(page)
        state.no_read = state.no_write = True
        state.life += freed

    # -- the guest

    def access(self, cpu: int, vcpu: Vcpu, page: int, kind: int) -> int | None:
        """Do one access between a VM entry and a VM exit; return the error code of its fault, or None."""
        tlb = self.cpus[cpu]
        if vcpu.vpid == 0:
            tlb.drop_vpid(0)
        error = self._translate(tlb, vcpu, page, kind)
        if error is not None:
            tlb.drop_page(vcpu.vpid, vcpu.pcid, page)
        if vcpu.vpid == 0:
            tlb.drop_vpid(0)
        return error

    def _translate(self, tlb: Cpu, vcpu: Vcpu, page: int, kind: int) -> int | None:
        for entry in tlb.usable(vcpu.vpid, vcpu.pcid, page):
            if entry.allows(kind):
                self._use(tlb, entry, kind)
                return None
        found = self._walk(tlb, vcpu, page, kind)
        if not isinstance(found, Spte):
            return found
        self._fill(tlb, vcpu, page, found)
        return None

    @staticmethod
    def _fill(tlb: Cpu, vcpu: Vcpu, page: int, found: Spte) -> None:
        entry = Entry(
            vcpu.vpid,
            vcpu.pcid,
            page >> 9 * found.size << 9 * found.size,
            found.hfn,
            found.life,
            found.writable and found.dirty,
            found.executable,
            found.global_,
            found.size,
        )
        tlb.entries -= {e for e in tlb.usable(vcpu.vpid, vcpu.pcid, page) if e.global_ == found.global_}
        tlb.entries.add(entry)

    def speculate(self, cpu: int, vcpu: Vcpu, page: int) -> bool:
        """Fetch a translation that no access needs (SDM vol. 3A, 4.10.2.3); return whether it is new.

        A walk that ends in a fault raises none, and drops nothing; table caches on its way are filled.
        """
        tlb = self.cpus[cpu]
        if vcpu.vpid == 0:
            tlb.drop_vpid(0)
        new = False
        if not tlb.usable(vcpu.vpid, vcpu.pcid, page):
            found = self._walk(tlb, vcpu, page, READ)
            new = isinstance(found, Spte)
            if isinstance(found, Spte):
                self._fill(tlb, vcpu, page, found)
        if vcpu.vpid == 0:
            tlb.drop_vpid(0)
        return new

    def _use(self, tlb: Cpu, entry: Entry, kind: int) -> None:
        """Count a violation if the frame has been freed, or its right promised away and not granted again."""
        state = self.page(entry.page)
        gone = state.no_write if kind == WRITE else state.no_read
        if gone or entry.life != state.life:
            self.violations += 1
            tlb.entries.discard(entry)

    def _walk(self, tlb: Cpu, vcpu: Vcpu, page: int, kind: int) -> Spte | int:
        error = USER | (WRITTEN if kind == WRITE else 0) | (FETCH if kind == EXECUTE else 0)
        root, level = vcpu.root, LEVELS
        for cached in range(1, LEVELS):
            found = tlb.caches.get((vcpu.vpid, vcpu.pcid, cached, page >> 9 * cached))
            if found is not None:
                root, level = found, cached
                break
        tables = self.roots[root]
        spte: Spte | None = None
        for below in range(level - 1, 0, -1):
            if below == 1:
                spte = tables.huge.get(page >> 9)
                if spte is not None:
                    break
            if (below, page >> 9 * below) not in tables.tables:
                return error
            tlb.caches[vcpu.vpid, vcpu.pcid, below, page >> 9 * below] = root
        if page in tables.mmio:
            return error | PRESENT | RESERVED
        spte = spte or tables.leafs.get(page)
        if spte is None:
            return error
        if not spte.permits(kind):
            return error | PRESENT
        spte.accessed = True
        spte.dirty = spte.dirty or kind == WRITE
        return replace(spte)
