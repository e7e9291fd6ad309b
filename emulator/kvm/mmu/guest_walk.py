"""arch/x86/kvm/mmu/paging_tmpl.h, its first half: KVM walks the guest's tables, in the formats that it knows.

A PagingFormat is the constants and bit tests of one type of entries (PTTYPE); a KvmPagewalk is that of one
guest, in the mode that its registers choose (SDM vol. 3A, 4.1.1).  A walk reads the guest's tables without a
lock.  Therefore a page fault (paging.py) calls gpte_changed() under mmu_lock for each entry that the walk
used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from emulator.kvm.kvm_host import PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K, PG_LEVEL_512G
from emulator.kvm.mmu.structs import (
    ACC_EXEC_MASK,
    ACC_READ_MASK,
    ACC_USER_MASK,
    ACC_WRITE_MASK,
    KvmMmu,
)
from emulator.kvm.structs import Vcpu
from emulator.kvm.virt.guest_memory import (
    kvm_cmpxchg_guest_entry,
    kvm_is_visible_memslot,
    kvm_read_guest_entry,
    kvm_read_guest_entry_atomic,
)
from emulator.kvm.virt.slots import gfn_to_memslot, mark_page_dirty_in_slot
from emulator.machine.runtime import Cpu
from native import lib
from native.types import Gfn, Level, span

PT_PRESENT_MASK: Final = 1 << 0
PT_WRITABLE_MASK: Final = 1 << 1
PT_USER_MASK: Final = 1 << 2
PT_GUEST_ACCESSED_MASK: Final = 1 << 5
PT_GUEST_DIRTY_MASK: Final = 1 << 6
PT_PAGE_SIZE_MASK: Final = 1 << 7
PT64_NX_MASK: Final = 1 << 63
VMX_EPT_READABLE_MASK: Final = 1 << 0
VMX_EPT_WRITABLE_MASK: Final = 1 << 1
VMX_EPT_EXECUTABLE_MASK: Final = 1 << 2
VMX_EPT_RWX_MASK: Final = VMX_EPT_READABLE_MASK | VMX_EPT_WRITABLE_MASK | VMX_EPT_EXECUTABLE_MASK
# Bits 16:13 of an entry for 4 MiB are bits 35:32 of its address (PSE-36).
PT32_DIR_PSE36_MASK: Final = 0xF << 13

PFERR_PRESENT_MASK: Final[int] = lib.PFERR_PRESENT
PFERR_WRITE_MASK: Final[int] = lib.PFERR_WRITE
PFERR_USER_MASK: Final[int] = lib.PFERR_USER
PFERR_RSVD_MASK: Final[int] = lib.PFERR_RSVD
PFERR_FETCH_MASK: Final[int] = lib.PFERR_FETCH

# Levels of the guest's top table.  PT32E_ROOT_LEVEL is that of the PDPTEs, which are no table in memory
# while they are in use.
PT32_ROOT_LEVEL: Final = PG_LEVEL_2M
PT32E_ROOT_LEVEL: Final = PG_LEVEL_1G
PT64_ROOT_4LEVEL: Final = PG_LEVEL_512G

_ALL_RIGHTS: Final = ACC_READ_MASK | ACC_WRITE_MASK | ACC_USER_MASK | ACC_EXEC_MASK


@dataclass(frozen=True, slots=True)
class PagingFormat:
    """The constants of paging_tmpl.h for one type of entries, and their bit tests.

    level_bits: PT_LEVEL_BITS, the bits of an address that index a table.  entry_bytes: of pt_element_t.
    base_addr_mask: PT_BASE_ADDR_MASK.  max_huge_level: the highest level at which bit 7 may end a walk.
    accessed_mask, dirty_mask: PT_GUEST_ACCESSED_MASK and PT_GUEST_DIRTY_MASK; 0: the entries have no such
    flags (PT_HAVE_ACCESSED_DIRTY).  ept: the entries are those of an EPT.
    """

    name: str
    level_bits: int
    entry_bytes: int
    base_addr_mask: int
    max_huge_level: Level
    accessed_mask: int = PT_GUEST_ACCESSED_MASK
    dirty_mask: int = PT_GUEST_DIRTY_MASK
    ept: bool = False

    def index(self, addr: int, level: Level) -> int:
        """PT_INDEX()"""
        return addr >> 12 + self.level_bits * (level - 1) & (1 << self.level_bits) - 1

    def pages(self, level: Level) -> int:
        """Return how many pages an entry of that level maps."""
        return 1 << self.level_bits * (level - 1)

    def gpte_to_gfn_lvl(self, gpte: int, level: Level) -> Gfn:
        """gpte_to_gfn_lvl(), with pse36_gfn_delta(): return the first gfn of a page of that level."""
        gfn = self.gpte_to_gfn(gpte) & -self.pages(level)
        if self.entry_bytes == 4 and level > PG_LEVEL_4K:
            gfn += (gpte & PT32_DIR_PSE36_MASK) << 7
        return gfn

    def gpte_to_gfn(self, gpte: int) -> Gfn:
        """gpte_to_gfn()"""
        return Gfn((gpte & self.base_addr_mask) >> 12)

    def is_present_gpte(self, gpte: int) -> bool:
        """FNAME(is_present_gpte)"""
        return bool(gpte & (VMX_EPT_RWX_MASK if self.ept else PT_PRESENT_MASK))

    def gpte_access(self, gpte: int) -> int:
        """FNAME(gpte_access): return the ACC_ bits of one entry of the guest's."""
        if self.ept:
            return ept_access(gpte)
        access = ACC_READ_MASK
        if gpte & PT_WRITABLE_MASK:
            access |= ACC_WRITE_MASK
        if gpte & PT_USER_MASK:
            access |= ACC_USER_MASK
        if not gpte & PT64_NX_MASK:
            access |= ACC_EXEC_MASK
        return access

    def protect_clean_gpte(self, access: int, gpte: int) -> int:
        """FNAME(protect_clean_gpte): take W while the guest's dirty flag is clear, so that the first write
        faults."""
        clean = self.dirty_mask and not gpte & self.dirty_mask
        return access & ~ACC_WRITE_MASK if clean else access


def ept_access(epte: int) -> int:
    """FNAME(gpte_access) for an EPT: return the ACC_ bits of an entry; its R grants the guest's U as well."""
    access = ACC_READ_MASK | ACC_USER_MASK if epte & VMX_EPT_READABLE_MASK else 0
    access |= ACC_WRITE_MASK if epte & VMX_EPT_WRITABLE_MASK else 0
    return access | (ACC_EXEC_MASK if epte & VMX_EPT_EXECUTABLE_MASK else 0)


PAGING64: Final = PagingFormat("paging64", 9, 8, (1 << 52) - (1 << 12), PG_LEVEL_1G)
PAGING32: Final = PagingFormat("paging32", 10, 4, (1 << 32) - (1 << 12), PG_LEVEL_2M)
_EPT: Final = PagingFormat("ept", 9, 8, (1 << 52) - (1 << 12), PG_LEVEL_1G, 0, 0, ept=True)
_EPT_AD: Final = replace(_EPT, accessed_mask=1 << 8, dirty_mask=1 << 9)


@dataclass(frozen=True, slots=True)
class KvmPagewalk:
    """struct kvm_pagewalk, before 7.3 part of struct kvm_mmu: the mode in which a guest's tables are read.

    level, cr0_wp, cr4_smep, cr4_pse, efer_nx: of cpu_role.
    """

    fmt: PagingFormat
    level: Level
    cr0_wp: bool
    cr4_smep: bool
    cr4_pse: bool
    efer_nx: bool

    def guest_pgd(self, vcpu: Vcpu) -> int:
        """kvm_mmu_get_guest_pgd(), nested_ept_get_eptp(): return the address of the guest's top table."""
        return vcpu.nested.vmcs12().ept_pointer if self.fmt.ept else vcpu.arch.cr3

    def pdptr(self, vcpu: Vcpu, index: int) -> int:
        """kvm_pdptr_read(): return a PDPTE as the last load of CR3 or of paging bits has read it."""
        return vcpu.arch.pdptrs[index]

    @property
    def top_level(self) -> Level:
        """Return the level of the highest table in memory."""
        return PT32_ROOT_LEVEL if self.level == PT32E_ROOT_LEVEL else self.level

    def is_last_gpte(self, level: Level, gpte: int) -> bool:
        """FNAME(is_last_gpte): bit 7 of a 4-byte entry is ignored unless CR4.PSE is set."""
        if level == PG_LEVEL_4K:
            return True
        pse = self.fmt.entry_bytes == 8 or self.cr4_pse
        return level <= self.fmt.max_huge_level and pse and bool(gpte & PT_PAGE_SIZE_MASK)

    def is_rsvd_bits_set(self, gpte: int) -> bool:
        """FNAME(is_rsvd_bits_set), for bit 63 alone, which is reserved while EFER.NX is clear.

        In an EPT, W or X without R is reserved: KVM does not offer L1 execute-only pages.
        """
        if self.fmt.ept:
            return not gpte & VMX_EPT_READABLE_MASK
        return bool(gpte & PT64_NX_MASK) and not self.efer_nx

    def permission_fault(self, access: int, pfec: int) -> int:
        """permission_fault(): return PFERR_PRESENT_MASK if the entries' rights forbid the access, or 0.

        The guest's EFLAGS.AC is not modelled, and CR4.SMAP therefore forbids nothing.
        """
        if self.fmt.ept:
            return PFERR_PRESENT_MASK if ept_needs(pfec) & ~access else 0
        user = bool(pfec & PFERR_USER_MASK)
        if user and not access & ACC_USER_MASK:
            return PFERR_PRESENT_MASK
        if pfec & PFERR_WRITE_MASK and not access & ACC_WRITE_MASK and (user or self.cr0_wp):
            return PFERR_PRESENT_MASK
        if pfec & PFERR_FETCH_MASK and (
            not access & ACC_EXEC_MASK or (self.cr4_smep and not user and access & ACC_USER_MASK)
        ):
            return PFERR_PRESENT_MASK
        return 0

    def fault_bits(self, pfec: int) -> int:
        """Return the bits of an error code that describe the access (has_pferr_fetch())."""
        fetch = PFERR_FETCH_MASK if self.fmt.ept or self.efer_nx or self.cr4_smep else 0
        return pfec & (PFERR_WRITE_MASK | PFERR_USER_MASK | fetch)

    def prefetch_invalid_gpte(self, gpte: int) -> bool:
        """FNAME(prefetch_invalid_gpte): return whether the entry is not present, or was never used."""
        return (
            not self.fmt.is_present_gpte(gpte)
            or bool(self.fmt.accessed_mask and not gpte & self.fmt.accessed_mask)
            or self.is_rsvd_bits_set(gpte)
        )


def ept_needs(pfec: int) -> int:
    """Return the ACC_ bits that an access to a nested guest's physical page needs."""
    needs = ACC_READ_MASK if pfec & PFERR_USER_MASK else 0
    needs |= ACC_WRITE_MASK if pfec & PFERR_WRITE_MASK else 0
    return needs | (ACC_EXEC_MASK if pfec & PFERR_FETCH_MASK else 0)


def ept_format(*, accessed_dirty: bool) -> PagingFormat:
    """Return the format of an EPT of L1's, with accessed and dirty flags or without."""
    return _EPT_AD if accessed_dirty else _EPT


def ept_pagewalk(*, accessed_dirty: bool) -> KvmPagewalk:
    """Return the walk of an EPT of L1's with four levels.  It depends on no register of L1 or L2."""
    fmt = ept_format(accessed_dirty=accessed_dirty)
    return KvmPagewalk(fmt, PT64_ROOT_4LEVEL, cr0_wp=True, cr4_smep=False, cr4_pse=False, efer_nx=True)


def pagewalk_of(mmu: KvmMmu) -> KvmPagewalk:
    """Return the walk of the tables that the MMU shadows; a direct MMU has none."""
    assert mmu.w is not None
    return mmu.w


class GuestWalker:
    """struct guest_walker: a walk of the guest's tables, by level.

    prefetch_ptes: entries of the table that gpte_changed() has read last, by index.
    `level`: the last entry's.  max_level: the first one's.  pt_access[level]: the rights that the entries
    above permit a table of that level; pte_access: those of the page.  error_code: of the fault that the walk
    ended with; None: it found the page.
    """

    __slots__ = (
        "error_code",
        "gfn",
        "level",
        "max_level",
        "prefetch_ptes",
        "pt_access",
        "pte_access",
        "ptes",
        "table_gfn",
    )

    def __init__(self, level: Level) -> None:
        self.level = self.max_level = level
        self.gfn = Gfn(0)
        self.prefetch_ptes: dict[int, int] = {}
        self.error_code: int | None = None
        self.pte_access = 0
        self.table_gfn = [Gfn(0)] * (level + 1)
        self.ptes = [0] * (level + 1)
        self.pt_access = [0] * (level + 1)


def walk_addr(cpu: Cpu, vcpu: Vcpu, w: KvmPagewalk, addr: int, pfec: int) -> GuestWalker:
    """walk_addr_generic(): translate `addr` by the guest's tables, and set their accessed and dirty flags.

    The flags are set by compare-and-swap; if the guest changed the entry meanwhile, the walk starts over.
    """
    while True:
        walker = _read_tables(cpu, vcpu, w, addr, pfec)
        if walker.error_code is not None:
            return walker
        again = update_accessed_dirty_bits(cpu, vcpu, w, walker, addr, bool(pfec & PFERR_WRITE_MASK))
        if again is None:
            walker.error_code = w.fault_bits(pfec)
            return walker
        if not again:
            if not pfec & PFERR_WRITE_MASK:
                walker.pte_access = w.fmt.protect_clean_gpte(walker.pte_access, walker.ptes[walker.level])
            return walker


def _read_tables(cpu: Cpu, vcpu: Vcpu, w: KvmPagewalk, addr: int, pfec: int) -> GuestWalker:
    kvm, fmt = vcpu.kvm, w.fmt
    walker = GuestWalker(w.top_level)
    pte, access = w.guest_pgd(vcpu), _ALL_RIGHTS
    if w.level == PT32E_ROOT_LEVEL:
        pte = w.pdptr(vcpu, addr >> 30 & 3)
        if not fmt.is_present_gpte(pte):
            walker.error_code = w.fault_bits(pfec)
            return walker
    for level in span(walker.max_level, Level(0), -1):
        walker.level = level
        table_gfn = fmt.gpte_to_gfn(pte)
        slot = gfn_to_memslot(cpu, kvm, table_gfn, int(vcpu.arch.smm))
        walker.table_gfn[level] = table_gfn
        walker.pt_access[level] = access
        read = None
        if slot is not None and kvm_is_visible_memslot(slot):
            read = kvm_read_guest_entry(cpu, kvm, slot, table_gfn, fmt.index(addr, level), fmt.entry_bytes)
        if read is None or not fmt.is_present_gpte(read):
            walker.error_code = w.fault_bits(pfec)
            return walker
        pte = walker.ptes[level] = read
        if w.is_rsvd_bits_set(pte):
            walker.error_code = w.fault_bits(pfec) | PFERR_RSVD_MASK | PFERR_PRESENT_MASK
            return walker
        access &= fmt.gpte_access(pte)
        if w.is_last_gpte(level, pte):
            break
    walker.pte_access = access
    if w.permission_fault(access, pfec):
        walker.error_code = w.fault_bits(pfec) | PFERR_PRESENT_MASK
        return walker
    walker.gfn = fmt.gpte_to_gfn_lvl(pte, walker.level) + (addr >> 12 & fmt.pages(walker.level) - 1)
    return walker


def update_accessed_dirty_bits(
    cpu: Cpu, vcpu: Vcpu, w: KvmPagewalk, walker: GuestWalker, addr: int, write_fault: bool
) -> bool | None:
    """update_accessed_dirty_bits(): return False if all flags are set, True to walk again, None: an error."""
    kvm, fmt = vcpu.kvm, w.fmt
    for level in span(walker.max_level, walker.level - 1, -1):
        orig = walker.ptes[level]
        pte = orig | fmt.accessed_mask
        if level == walker.level and write_fault:
            pte |= fmt.dirty_mask
        if pte == orig:
            continue
        slot = gfn_to_memslot(cpu, kvm, walker.table_gfn[level], int(vcpu.arch.smm))
        assert slot is not None
        swapped = kvm_cmpxchg_guest_entry(
            cpu, kvm, slot, walker.table_gfn[level], fmt.index(addr, level), fmt.entry_bytes, orig, pte
        )
        if not swapped:
            return None if swapped is None else True
        mark_page_dirty_in_slot(cpu, slot, walker.table_gfn[level])
        walker.ptes[level] = pte
    return False


def gpte_changed(cpu: Cpu, vcpu: Vcpu, w: KvmPagewalk, walker: GuestWalker, addr: int, level: Level) -> bool:
    """gpte_changed(), under mmu_lock: return whether the guest's entry is another than the walk's.

    In a last table read its neighbours as well, for pte_prefetch(): from here on KVM sees the guest's stores.
    """
    fmt, table_gfn = w.fmt, walker.table_gfn[level]
    slot = gfn_to_memslot(cpu, vcpu.kvm, table_gfn, int(vcpu.arch.smm))
    if slot is None:
        return True
    index = fmt.index(addr, level)
    num = max(1, vcpu.kvm.params.prefetch) if level == PG_LEVEL_4K else 1
    first = index & -num
    for at in range(first, first + num):
        gpte = kvm_read_guest_entry_atomic(cpu, vcpu.kvm, slot, table_gfn, at, fmt.entry_bytes)
        if gpte is None:
            return True
        walker.prefetch_ptes[at] = gpte
    return walker.prefetch_ptes[index] != walker.ptes[level]


def paging_gva_to_gpa(cpu: Cpu, vcpu: Vcpu, addr: int, pfec: int) -> int | None:
    """FNAME(gva_to_gpa): translate by the guest's tables; None: the guest would fault."""
    walker = walk_addr(cpu, vcpu, pagewalk_of(vcpu.mmu), addr, pfec)
    return None if walker.error_code is not None else walker.gfn << 12 | addr & 0xFFF
