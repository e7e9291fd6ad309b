"""Guests' page tables by the SDM's rules: walks in each mode, rights, error codes, accessed and dirty flags.

Slow and obvious on purpose.  Sources: SDM vol. 3A 4.3 (32-bit paging), 4.4 (PAE), 4.5 (4-level), 4.6
(rights), 4.7 (error codes), 4.8 (accessed and dirty flags).  Entries are ints by (gfn of the table, index).
A walk that ends in a fault sets no flag, as KVM's; the SDM permits either.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

P, W, U, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
PRESENT, WRITTEN, USER, RESERVED, FETCH = 1, 2, 4, 8, 16
READ, WRITE, EXECUTE = 0, 1, 2


class Mode(Enum):
    """Levels of tables in memory, bits of an address for each, bytes of an entry, highest level of pages."""

    LONG = 4, 9, 8, 3
    PAE = 2, 9, 8, 2
    PSE = 2, 10, 4, 2
    PLAIN = 2, 10, 4, 1

    @property
    def levels(self) -> int:
        return self.value[0]

    @property
    def bits(self) -> int:
        return self.value[1]

    @property
    def entry_bytes(self) -> int:
        return self.value[2]

    @property
    def huge(self) -> int:
        return self.value[3]

    def index(self, linear: int, level: int) -> int:
        return linear >> 12 + self.bits * (level - 1) & (1 << self.bits) - 1

    def is_page(self, entry: int, level: int) -> bool:
        return level == 1 or (level <= self.huge and bool(entry & PS))

    def gfn(self, entry: int, level: int, linear: int) -> int:
        """Return the gfn of a linear address in the page of an entry (PSE-36: bits 16:13 are bits 35:32)."""
        pages = 1 << self.bits * (level - 1)
        top = 32 if self.entry_bytes == 4 else 52
        first = (entry & (1 << top) - 1) >> 12
        if pages > 1:
            first -= first % pages
            first += (entry >> 13 & 15) << 20 if self.entry_bytes == 4 else 0
        return first + (linear >> 12) % pages


class GuestFault(Exception):
    """A page fault of the guest's own."""

    def __init__(self, error: int) -> None:
        self.error = error


@dataclass(frozen=True)
class Access:
    kind: int
    user: bool

    def error(self, guest: Guest) -> int:
        """Return the bits of the error code that describe the access."""
        fetch = self.kind == EXECUTE and (guest.smep or guest.nx)
        written = WRITTEN if self.kind == WRITE else 0
        return written | (USER if self.user else 0) | (FETCH if fetch else 0)


@dataclass
class Path:
    """The entries of a walk, from the top, and their common rights."""

    entries: list[tuple[int, int]] = field(default_factory=list)
    level: int = 0
    gfn: int = 0
    writable: bool = True
    user: bool = True
    executable: bool = True

    def permits(self, access: Access, guest: Guest) -> bool:
        if access.user and not self.user:
            return False
        if access.kind == WRITE:
            return self.writable or not (access.user or guest.wp)
        if access.kind == EXECUTE:
            return self.executable and not (guest.smep and not access.user and self.user)
        return True


@dataclass
class Guest:
    mode: Mode
    cr3_gfn: int
    wp: bool = True
    smep: bool = False
    nx: bool = False
    pdptes: tuple[int, ...] = ()
    tables: dict[tuple[int, int], int] = field(default_factory=dict)

    def path(self, linear: int, access: Access) -> Path:
        """Walk the tables; rights are not checked, and no flag is set."""
        path, gfn, error = Path(), self.cr3_gfn, access.error(self)
        if self.mode is Mode.PAE:
            pdpte = self.pdptes[linear >> 30 & 3]
            if not pdpte & P:
                raise GuestFault(error)
            gfn = pdpte >> 12
        for level in range(self.mode.levels, 0, -1):
            index = self.mode.index(linear, level)
            entry = self.tables.get((gfn, index), 0)
            if not entry & P:
                raise GuestFault(error)
            if entry & NX and not self.nx:
                raise GuestFault(error | PRESENT | RESERVED)
            path.entries.append((gfn, index))
            path.writable &= bool(entry & W)
            path.user &= bool(entry & U)
            path.executable &= not entry & NX
            if self.mode.is_page(entry, level):
                path.level, path.gfn = level, self.mode.gfn(entry, level, linear)
                return path
            gfn = self.mode.gfn(entry, 1, 0)
        raise AssertionError

    def translate(self, linear: int, access: Access) -> Path:
        """Do an access: the page fault that it is, or its path, with the flags set."""
        path = self.path(linear, access)
        if not path.permits(access, self):
            raise GuestFault(access.error(self) | PRESENT)
        for at in path.entries:
            self.tables[at] |= A
        if access.kind == WRITE:
            self.tables[path.entries[-1]] |= D
        return path

    def is_dirty(self, path: Path) -> bool:
        return bool(self.tables[path.entries[-1]] & D)
