"""A pCPU without EPT by the SDM's rules: walks of one dimension, linear mappings, table caches, faults.

Slow and obvious on purpose, as tlb_model.py.  Nothing is evicted.  Sources: SDM vol. 3A 4.5 (walks), 4.7
(error codes), 4.8 (A and D), 4.10 (TLBs, PCIDs, paging-structure caches, page faults), vol. 3C 29.4 (VPIDs).
The guest has CR0.PG clear: the only legal translation of a page that is not global is to the gfn of its
number.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

READ, WRITE, EXECUTE = 0, 1, 2
PRESENT, WRITTEN, USER, RESERVED, FETCH = 1, 2, 4, 8, 16
LEVELS = 4
MMIO = "reserved bits"


@dataclass
class Spte:
    """A leaf; `life` tells which of the frames that the host has given the gfn it maps."""

    gfn: int
    hfn: int
    life: int
    writable: bool
    executable: bool
    user: bool
    global_: bool
    accessed: bool = True
    dirty: bool = True
    size: int = 0  # 1: a leaf of 2 MiB

    def permits(self, kind: int, supervisor: bool) -> bool:
        right = kind == READ or (self.writable if kind == WRITE else self.executable)
        return right and (self.user or supervisor)


@dataclass(eq=False)
class Table:
    """A table of shadow SPTEs; `hfn`, its frame, serves comparisons alone."""

    level: int
    hfn: int
    entries: dict[int, Table | Spte | str] = field(default_factory=dict)
    linked: bool = True
    freed: bool = False

    def index(self, page: int) -> int:
        return page >> 9 * (self.level - 1) & 511


@dataclass(eq=False)
class Entry:
    """A cached translation.  owner: the vCPU that filled it, which the VPID is a name of."""

    vpid: int
    pcid: int
    page: int
    spte: Spte
    write: bool
    owner: int

    @property
    def size(self) -> int:
        return self.spte.size

    def covers(self, page: int) -> bool:
        return page >> 9 * self.size == self.page >> 9 * self.size

    def allows(self, kind: int, supervisor: bool) -> bool:
        return self.spte.permits(kind, supervisor) and (kind != WRITE or self.write)


@dataclass
class Page:
    """The host's side of a gfn: its frames so far, and the rights that KVM has promised away.

    tracked: KVM has promised to see each store of the guest.
    """

    life: int = 0
    hfn: int = -1
    no_read: bool = False
    no_write: bool = False
    tracked: bool = False

    def granted(self, hfn: int, writable: bool) -> None:
        if hfn != self.hfn:
            self.hfn, self.no_write = hfn, not writable
        self.no_read = False
        self.no_write = self.no_write and not writable


@dataclass
class Cpu:
    entries: list[Entry] = field(default_factory=list)
    #: (VPID, PCID, level, region): the table, and the vCPU that walked to it.
    caches: dict[tuple[int, int, int, int], tuple[Table, int]] = field(default_factory=dict)

    def usable(self, vpid: int, pcid: int, page: int) -> list[Entry]:
        return [
            e
            for e in self.entries
            if e.covers(page) and e.vpid == vpid and (e.spte.global_ or e.pcid == pcid)
        ]

    def drop_page(self, vpid: int, pcid: int | None, page: int) -> None:
        """Drop the entries that would translate a page, under one PCID or all; globals are used with each."""
        self.drop_translations(vpid, pcid, page)
        self.caches = {
            (v, p, level, region): cached
            for (v, p, level, region), cached in self.caches.items()
            if v != vpid or pcid not in (None, p) or page >> 9 * level != region
        }

    def drop_translations(self, vpid: int, pcid: int | None, page: int) -> None:
        self.entries = [
            e
            for e in self.entries
            if not e.covers(page) or e.vpid != vpid or not (e.spte.global_ or pcid in (None, e.pcid))
        ]

    def drop_vpid(self, vpid: int, *, retain_globals: bool = False) -> None:
        self.entries = [e for e in self.entries if e.vpid != vpid or (retain_globals and e.spte.global_)]
        self.caches = {key: cached for key, cached in self.caches.items() if key[0] != vpid}

    def drop_all(self) -> None:
        """INVVPID all-context: every VPID but 0."""
        self.entries = [e for e in self.entries if e.vpid == 0]
        self.caches = {key: cached for key, cached in self.caches.items() if key[0] == 0}


@dataclass
class Vcpu:
    id: int
    vpid: int
    root: Table
    pcid: int = 0
    #: The page of its last fault, and the page of which user space emulates the next access.
    faulted: int | None = None
    skip: int | None = None


@dataclass
class Access:
    """An access, or a speculative fetch, of a vCPU on a pCPU."""

    tlb: Cpu
    vcpu: Vcpu
    page: int
    kind: int = READ
    supervisor: bool = False
    speculative: bool = False

    def context(self) -> tuple[int, int]:
        return self.vcpu.vpid, self.vcpu.pcid

    def error(self) -> int:
        """Return the bits of the error code that describe the access."""
        return (
            (0 if self.supervisor else USER)
            | (WRITTEN if self.kind == WRITE else 0)
            | (FETCH if self.kind == EXECUTE else 0)
        )


class Fault(Exception):
    """A walk that found no translation."""

    def __init__(self, error: int) -> None:
        self.error = error


@dataclass
class ShadowModel:
    """Reports are counted by the cached mapping used.

    violations: reports, but for those of missed stores alone.  An entry's first missed store is reported, and
    later ones through the same entry if the frame's tag has changed meanwhile: missed_least, missed_most.
    """

    cpus: list[Cpu]
    pages: dict[int, Page] = field(default_factory=dict)
    violations: int = 0
    missed_least: int = 0
    missed_most: int = 0
    missed_by: set[Entry] = field(default_factory=set)
    stale_walks: int = 0

    def page(self, gfn: int) -> Page:
        return self.pages.setdefault(gfn, Page())

    # -- KVM and the host

    def set_spte(self, table: Table, page: int, spte: Spte | str | None) -> None:
        table.entries.pop(table.index(page), None)
        if spte is not None:
            table.entries[table.index(page)] = spte
        # The host keeps its huge pages, so that no right to them is ever lost.
        if isinstance(spte, Spte) and not spte.size:
            self.page(spte.gfn).granted(spte.hfn, spte.writable)

    def promise(self, gfn: int) -> None:
        """Every SPTE of the page is gone, and KVM promises that it is used no more."""
        self.page(gfn).no_read = self.page(gfn).no_write = True

    # -- the guest

    def access(self, access: Access) -> int | None:
        """Do one access between a VM entry and a VM exit; return the error code of its fault, or None."""
        self._transition(access)
        error = None
        try:
            self._translate(access)
        except Fault as fault:
            error = self._fault(access, fault.error)
        self._transition(access)
        return error

    def speculate(self, access: Access) -> bool:
        """Fetch a translation that no access needs (SDM vol. 3A, 4.10.2.3); return if it is new and usable.

        A walk that ends in a fault raises none, and drops nothing; table caches on its way are filled.
        """
        self._transition(access)
        new = False
        if not access.tlb.usable(*access.context(), access.page):
            try:
                new = not self._kinds(self._fill(access, self._walk(access)), access)
            except Fault:
                new = False
        self._transition(access)
        return new

    @staticmethod
    def _transition(access: Access) -> None:
        """VM entries and exits without a VPID drop the mappings of VPID 0."""
        if access.vcpu.vpid == 0:
            access.tlb.drop_vpid(0)

    @staticmethod
    def _fault(access: Access, error: int) -> int | None:
        vcpu = access.vcpu
        if vcpu.skip == access.page:
            vcpu.skip = None
            return None
        vcpu.faulted = access.page
        access.tlb.drop_page(*access.context(), access.page)
        return error

    def _translate(self, access: Access) -> None:
        for entry in access.tlb.usable(*access.context(), access.page):
            if entry.allows(access.kind, access.supervisor) and self._use(access, entry):
                return
        self._use(access, self._fill(access, self._walk(access)))

    @staticmethod
    def _fill(access: Access, spte: Spte) -> Entry:
        vpid, pcid = access.context()
        page = access.page >> 9 * spte.size << 9 * spte.size
        entry = Entry(vpid, pcid, page, spte, spte.writable and spte.dirty, access.vcpu.id)
        access.tlb.drop_translations(vpid, pcid, access.page)
        access.tlb.entries.append(entry)
        return entry

    def _kinds(self, entry: Entry, access: Access) -> set[str]:
        """Return the promises that a use would break."""
        spte = entry.spte
        gfn = spte.gfn + access.page - entry.page
        state = self.page(gfn)
        broken = {
            "freed": not spte.size and spte.life != state.life,
            "revoked": not spte.size
            and (spte.hfn != state.hfn or (state.no_write if access.kind == WRITE else state.no_read)),
            "missed": access.kind == WRITE and state.tracked,
            "guest": not spte.global_ and gfn != access.page,
            "foreign": entry.owner != access.vcpu.id,
        }
        return {kind for kind, is_broken in broken.items() if is_broken}

    def _use(self, access: Access, entry: Entry) -> bool:
        """Judge a use; return whether it is served.  A missed store reaches its page all the same."""
        kinds = self._kinds(entry, access)
        if kinds == {"missed"}:
            self.missed_least += entry not in self.missed_by
            self.missed_most += 1
            self.missed_by.add(entry)
        elif kinds:
            self.violations += 1
            access.tlb.drop_translations(*access.context(), access.page)
            return False
        return True

    def _start(self, access: Access) -> Table:
        """Return the deepest table cached, or the root.

        A walk reports a pointer to a freed table, or another vCPU's, and starts at the root; a speculative
        walk ends there.
        """
        for level in range(1, LEVELS):
            table, owner = access.tlb.caches.get(
                (*access.context(), level, access.page >> 9 * level), (None, None)
            )
            if table is None:
                continue
            if not table.freed and owner == access.vcpu.id:
                self.stale_walks += not table.linked and not access.speculative
                return table
            if access.speculative:
                raise Fault(0)
            self.violations += 1
            access.tlb.drop_page(*access.context(), access.page)
            break
        return access.vcpu.root

    def _walk(self, access: Access) -> Spte:
        table, page, error = self._start(access), access.page, access.error()
        while True:
            found = table.entries.get(table.index(page))
            if isinstance(found, Table):
                if found.freed:
                    self.violations += not access.speculative
                    raise Fault(error)
                table = found
                cache = *access.context(), table.level, page >> 9 * table.level
                access.tlb.caches[cache] = table, access.vcpu.id
            elif isinstance(found, Spte):
                break
            else:
                raise Fault(error | PRESENT | RESERVED if found == MMIO else error)
        if not found.permits(access.kind, access.supervisor):
            raise Fault(error | PRESENT)
        found.accessed = True
        found.dirty = found.dirty or access.kind == WRITE
        return replace(found)
