"""KVM's walks of a guest's tables, and the SPTEs that it makes from them, against guest_walk_model.py.

Fixed seeds draw the tables: in each mode, of all sizes of pages, with all rights and flags, some entries
not present, several leading to one table.  An access must find the model's page or fault, and set the model's
flags; the SPTE must then permit it, and no access that the guest's tables forbid.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from emulator.kvm.kvm_host import (
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    X86_CR0_PE,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_PAE,
    X86_CR4_PSE,
    X86_CR4_SMEP,
)
from emulator.kvm.mmu.fault import RET_PF_FIXED, RET_PF_INJECTED
from emulator.kvm.mmu.guest_walk import GuestWalker, pagewalk_of, walk_addr
from emulator.kvm.mmu.mmu import kvm_mmu_zap_all_fast
from emulator.kvm.mmu.page_fault import kvm_mmu_page_fault
from emulator.kvm.mmu.roots import kvm_mmu_reset_context
from emulator.kvm.mmu.shadow_spte import kvm_mmu_page_get_gfn
from emulator.kvm.mmu.spte import is_last_spte, is_shadow_present_pte
from emulator.kvm.mmu.structs import ACC_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK
from native import lib
from tests.emulator.kvm.guest_walk_model import (
    EXECUTE,
    NX,
    PS,
    READ,
    WRITE,
    A,
    Access,
    D,
    Guest,
    GuestFault,
    Mode,
    P,
    Path,
    U,
    W,
)
from tests.emulator.kvm.rig import GFNS, running_rig
from tests.emulator.kvm.shadow_rig import ShadowedGuest, shadowed_guest

#: By level, so that the guest's tables make no circles: 100 is the top one.
TABLES = {4: (100,), 3: (101, 102), 2: (103, 104), 1: (105, 106)}
PAGES = (10, 11, 1024, 1027)
#: Of the entries that are used, by level: a page of 2 MiB or more begins at gfn 1024 at least.
INDEXES = {4: (0, 255), 3: (0, 3), 2: (2, 3), 1: (0, 1, 511)}
INDEXES_OF_4_BYTES = {2: (1, 2), 1: (0, 1, 512, 1023)}
ALL_ACCESSES = [Access(kind, user) for kind in (READ, WRITE, EXECUTE) for user in (True, False)]

#: Not present, rights, a reserved bit; each for reads, writes and fetches by the kernel and by user mode.
ALL_ERRORS = {0, 2, 4, 6, 16, 20} | {3, 5, 7, 17, 21} | {9, 11, 13, 15, 25, 29}
ACCESSES = 6


def indexes(mode: Mode, level: int) -> tuple[int, ...]:
    return (INDEXES if mode.entry_bytes == 8 else INDEXES_OF_4_BYTES)[level]


def entry_of(r: random.Random, mode: Mode, level: int) -> int:
    """Return an entry of a level.  Most grant all rights, as in most guests; a few are not present."""
    entry = r.choice((P | W | U,) * 5 + (P | U, P | W)) | r.choice((0, A, A | D))
    entry |= NX if mode.entry_bytes == 8 and r.random() < 0.15 else 0
    if r.random() < 0.06:
        return entry & ~P
    if 1 < level <= mode.huge and r.random() < 0.4:
        # The address of a page of 1 GiB is 0: the indexes below lead to the memslot.
        return entry | PS | (r.choice((1024, 2048)) if level == 2 else 0) << 12
    if level == 1:
        return entry | r.choice(PAGES) << 12
    # Without CR4.PSE bit 7 is ignored.
    ignored = PS if mode is Mode.PLAIN and r.random() < 0.5 else 0
    return entry | ignored | r.choice(TABLES[level - 1]) << 12


def guest_of(r: random.Random) -> Guest:
    mode = r.choice(tuple(Mode))
    wide = mode.entry_bytes == 8
    bits = r.random() < 0.5, r.random() < 0.5, wide and r.random() < 0.6
    guest = Guest(mode, TABLES[mode.levels][0], *bits)
    if mode is Mode.PAE:
        guest.pdptes = tuple(r.choice((0, *(gfn << 12 | P for gfn in TABLES[2]))) for _ in range(4))
    for level in range(mode.levels, 0, -1):
        for table in TABLES[level]:
            for index in indexes(mode, level):
                guest.tables[table, index] = entry_of(r, mode, level)
    return guest


def access_of(r: random.Random, mode: Mode) -> tuple[int, Access]:
    linear = r.randrange(4) << 30 if mode is Mode.PAE else 0
    for level in range(1, mode.levels + 1):
        linear |= r.choice(indexes(mode, level)) << 12 + mode.bits * (level - 1)
    return linear, Access(r.randrange(3), r.random() < 0.5)


class Comparison:
    """A vCPU that takes over one model after the other."""

    def __init__(self, guest: ShadowedGuest) -> None:
        self.guest = guest
        self.cpu, self.vcpu, self.kvm = guest.cpu, guest.vcpu, guest.kvm
        self.model = Guest(Mode.LONG, 0)
        self.mapped = 0
        self.faults: Counter[int] = Counter()

    def take_over(self, model: Guest) -> None:
        self.model, arch = model, self.vcpu.arch
        wide, long_mode = model.mode.entry_bytes == 8, model.mode is Mode.LONG
        arch.cr0 = X86_CR0_PG | X86_CR0_PE | (X86_CR0_WP if model.wp else 0)
        arch.cr4 = X86_CR4_SMEP if model.smep else 0
        arch.cr4 |= X86_CR4_PAE if wide else X86_CR4_PSE if model.mode is Mode.PSE else 0
        arch.efer = (EFER_NX if model.nx else 0) | (EFER_LME | EFER_LMA if long_mode else 0)
        arch.cr3 = model.cr3_gfn << 12
        arch.pdptrs = (model.pdptes or (0, 0, 0, 0))[:4]  # type: ignore[assignment]
        for (table, index), entry in model.tables.items():
            self._write(table, index, entry)
        kvm_mmu_reset_context(self.cpu, self.vcpu)
        with self.kvm.slots_lock.held(self.cpu):
            kvm_mmu_zap_all_fast(self.cpu, self.kvm)

    def _write(self, table: int, index: int, entry: int) -> None:
        if self.model.mode.entry_bytes == 4:
            shift = index % 2 * 32
            index //= 2
            entry = self.guest.entry(table, index) & ~(0xFFFFFFFF << shift) | entry << shift
        self.guest.write(table, index, entry)

    def _read(self, table: int, index: int) -> int:
        if self.model.mode.entry_bytes == 8:
            return self.guest.entry(table, index)
        return self.guest.entry(table, index // 2) >> index % 2 * 32 & 0xFFFFFFFF

    def access(self, linear: int, access: Access) -> None:
        pfec = (
            (lib.PFERR_WRITE if access.kind == WRITE else 0)
            | (lib.PFERR_FETCH if access.kind == EXECUTE else 0)
            | (lib.PFERR_USER if access.user else 0)
        )
        self.guest.enter()
        walker = walk_addr(self.cpu, self.vcpu, pagewalk_of(self.vcpu.mmu), linear, pfec)
        path, error = self._expected(linear, access)
        if path is None:
            assert walker.error_code == error
            assert self._fault(linear, access, pfec) == RET_PF_INJECTED
            self.faults[error] += 1
        else:
            self._same(walker, path, access)
            assert path.gfn < GFNS
            assert self._fault(linear, access, pfec) == RET_PF_FIXED
            self._leaf(linear, path, access)
            self.mapped += 1
        assert {at: self._read(*at) for at in self.model.tables} == self.model.tables

    def _expected(self, linear: int, access: Access) -> tuple[Path | None, int]:
        try:
            return self.model.translate(linear, access), 0
        except GuestFault as fault:
            return None, fault.error

    def _same(self, walker: GuestWalker, path: Path, access: Access) -> None:
        assert walker.error_code is None
        assert (walker.gfn, walker.level) == (path.gfn, path.level)
        writable = path.writable and (access.kind == WRITE or self.model.is_dirty(path))
        assert bool(walker.pte_access & ACC_WRITE_MASK) == writable
        assert bool(walker.pte_access & ACC_USER_MASK) == path.user
        assert bool(walker.pte_access & ACC_EXEC_MASK) == path.executable

    def _fault(self, linear: int, access: Access, pfec: int) -> int:
        """Take the fault, as if no SPTE were there; one that is there may be enough already."""
        self._drop()
        self.guest.enter()
        return kvm_mmu_page_fault(self.cpu, self.vcpu, linear, access.kind, False, pfec)

    def _drop(self) -> None:
        with self.kvm.slots_lock.held(self.cpu):
            kvm_mmu_zap_all_fast(self.cpu, self.kvm)

    def _leaf(self, linear: int, path: Path, access: Access) -> None:
        """Compare the rights of the SPTE with those of the guest's tables, for each kind of access."""
        leaf, spte = self.guest.leaf(linear), self.guest.spte(linear)
        level = leaf.sp.role.level
        assert is_shadow_present_pte(spte)
        assert is_last_spte(spte, level)
        first = kvm_mmu_page_get_gfn(self.cpu, leaf.sp, leaf.idx)
        assert first + (linear >> 12) % (1 << 9 * (level - 1)) == path.gfn
        for one in ALL_ACCESSES:
            permitted = self._permits(spte, one)
            if one == access:
                assert permitted
            if permitted:
                assert path.permits(one, self.model), (one, hex(spte))
                assert one.kind != WRITE or self.model.is_dirty(path)

    def _permits(self, spte: int, one: Access) -> bool:
        """Return whether the processor, with CR0.WP set and with the guest's CR4.SMEP, permits the access."""
        right = {READ: lib.SPTE_READABLE, WRITE: lib.SPTE_WRITABLE, EXECUTE: lib.SPTE_EXECUTABLE}[one.kind]
        user = bool(spte & lib.SPTE_USER)
        if one.kind == EXECUTE and self.model.smep and not one.user and user:
            return False
        return bool(spte & right) and (user or not one.user)


@pytest.fixture(scope="module")
def comparison() -> Iterator[Comparison]:
    with running_rig() as rig, shadowed_guest(rig) as guest:
        yield Comparison(guest)


@pytest.mark.slow
def test_walks_and_sptes_follow_the_guests_tables(comparison: Comparison) -> None:
    """The guests are the same each time, so many that each mode meets each rule."""
    for seed in range(160):
        r = random.Random(seed)
        guest = guest_of(r)
        comparison.take_over(guest)
        for number in range(ACCESSES):
            linear, access = access_of(r, guest.mode)
            try:
                comparison.access(linear, access)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, access {number}: {linear:#x} {access}") from error
    assert comparison.mapped > 300
    assert set(comparison.faults) == ALL_ERRORS
    assert not comparison.guest.rig.violations()
