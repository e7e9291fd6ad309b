"""arch/x86/kvm/mmu/paging_tmpl.h, its first half: KVM walks the guest's tables.

For 4-level paging with 8-byte entries (SDM vol. 3A, 4.5.4).  A walk reads the guest's tables without a lock.
Therefore a page fault (paging.py) calls gpte_changed() under mmu_lock for each entry that the walk used.
"""

from __future__ import annotations

from typing import Final

from emulator.kvm.kvm_host import (
    PG_LEVEL_1G,
    PG_LEVEL_4K,
    PG_LEVEL_512G,
    SPTE_ENT_PER_PAGE,
    SPTE_LEVEL_BITS,
    X86_CR0_WP,
    X86_CR4_SMEP,
    kvm_pages_per_hpage,
)
from emulator.kvm.mmu.structs import ACC_EXEC_MASK, ACC_READ_MASK, ACC_USER_MASK, ACC_WRITE_MASK
from emulator.kvm.structs import Vcpu
from emulator.kvm.virt.guest_memory import (
    kvm_cmpxchg_guest_word,
    kvm_is_visible_memslot,
    kvm_read_guest_word,
    kvm_read_guest_word_atomic,
)
from emulator.kvm.virt.slots import gfn_to_memslot, mark_page_dirty_in_slot
from emulator.machine.runtime import Cpu
from native import lib

PT_PRESENT_MASK: Final = 1 << 0
PT_WRITABLE_MASK: Final = 1 << 1
PT_USER_MASK: Final = 1 << 2
PT_GUEST_ACCESSED_MASK: Final = 1 << 5
PT_GUEST_DIRTY_MASK: Final = 1 << 6
PT_PAGE_SIZE_MASK: Final = 1 << 7
PT64_NX_MASK: Final = 1 << 63
PT_BASE_ADDR_MASK: Final = (1 << 52) - (1 << 12)

PFERR_PRESENT_MASK: Final[int] = lib.PFERR_PRESENT
PFERR_WRITE_MASK: Final[int] = lib.PFERR_WRITE
PFERR_USER_MASK: Final[int] = lib.PFERR_USER
PFERR_FETCH_MASK: Final[int] = lib.PFERR_FETCH

PT64_ROOT_4LEVEL: Final = PG_LEVEL_512G


class GuestWalker:
    """struct guest_walker: a walk of the guest's tables, by level.

    prefetch_ptes: entries of the table that gpte_changed() has read last, by index.
    `level`: the last entry's.  pt_access[level]: the rights that the entries above permit a table of that
    level; pte_access: those of the page.  error_code: of the fault that the walk ended with; None: it found
    the page.
    """

    __slots__ = (
        "error_code",
        "gfn",
        "level",
        "prefetch_ptes",
        "pt_access",
        "pte_access",
        "ptes",
        "table_gfn",
    )

    def __init__(self) -> None:
        self.level = PT64_ROOT_4LEVEL
        self.gfn = 0
        self.prefetch_ptes: dict[int, int] = {}
        self.error_code: int | None = None
        self.pte_access = 0
        self.table_gfn = [0] * (PT64_ROOT_4LEVEL + 1)
        self.ptes = [0] * (PT64_ROOT_4LEVEL + 1)
        self.pt_access = [0] * (PT64_ROOT_4LEVEL + 1)


def gpte_access(gpte: int) -> int:
    """gpte_access(): return the ACC_ bits of one entry of the guest's."""
    access = ACC_READ_MASK
    if gpte & PT_WRITABLE_MASK:
        access |= ACC_WRITE_MASK
    if gpte & PT_USER_MASK:
        access |= ACC_USER_MASK
    if not gpte & PT64_NX_MASK:
        access |= ACC_EXEC_MASK
    return access


def protect_clean_gpte(access: int, gpte: int) -> int:
    """protect_clean_gpte(): take W while the guest's dirty flag is clear, so that the first write faults."""
    return access if gpte & PT_GUEST_DIRTY_MASK else access & ~ACC_WRITE_MASK


def _index(addr: int, level: int) -> int:
    return addr >> 12 + SPTE_LEVEL_BITS * (level - 1) & SPTE_ENT_PER_PAGE - 1


def permission_fault(vcpu: Vcpu, access: int, pfec: int) -> int:
    """permission_fault(): return the error code of the fault that the access causes, or 0."""
    user = bool(pfec & PFERR_USER_MASK)
    wp = bool(vcpu.arch.cr0 & X86_CR0_WP)
    smep = bool(vcpu.arch.cr4 & X86_CR4_SMEP)
    if user and not access & ACC_USER_MASK:
        return PFERR_PRESENT_MASK
    if pfec & PFERR_WRITE_MASK and not access & ACC_WRITE_MASK and (user or wp):
        return PFERR_PRESENT_MASK
    if pfec & PFERR_FETCH_MASK and (
        not access & ACC_EXEC_MASK or (smep and not user and access & ACC_USER_MASK)
    ):
        return PFERR_PRESENT_MASK
    return 0


def walk_addr(cpu: Cpu, vcpu: Vcpu, addr: int, pfec: int) -> GuestWalker:
    """walk_addr_generic(): translate `addr` by the guest's tables, and set their accessed and dirty flags.

    The flags are set by compare-and-swap; if the guest changed the entry meanwhile, the walk starts over.
    """
    while True:
        walker = _read_tables(cpu, vcpu, addr, pfec)
        if walker.error_code is not None:
            return walker
        again = update_accessed_dirty_bits(cpu, vcpu, walker, addr, bool(pfec & PFERR_WRITE_MASK))
        if again is None:
            walker.error_code = _fault_bits(pfec)
            return walker
        if not again:
            if not pfec & PFERR_WRITE_MASK:
                walker.pte_access = protect_clean_gpte(walker.pte_access, walker.ptes[walker.level])
            return walker


def _fault_bits(pfec: int) -> int:
    """Return the bits of an error code that describe the access."""
    return pfec & (PFERR_WRITE_MASK | PFERR_USER_MASK | PFERR_FETCH_MASK)


def _read_tables(cpu: Cpu, vcpu: Vcpu, addr: int, pfec: int) -> GuestWalker:
    kvm = vcpu.kvm
    walker = GuestWalker()
    pte, access = vcpu.arch.cr3, gpte_access(PT_WRITABLE_MASK | PT_USER_MASK)
    for level in range(PT64_ROOT_4LEVEL, 0, -1):
        walker.level = level
        table_gfn = (pte & PT_BASE_ADDR_MASK) >> 12
        slot = gfn_to_memslot(kvm, table_gfn, int(vcpu.arch.smm))
        walker.table_gfn[level] = table_gfn
        walker.pt_access[level] = access
        read = None
        if slot is not None and kvm_is_visible_memslot(slot):
            read = kvm_read_guest_word(cpu, kvm, slot, table_gfn, _index(addr, level))
        if read is None or not read & PT_PRESENT_MASK:
            walker.error_code = _fault_bits(pfec)
            return walker
        pte = walker.ptes[level] = read
        access &= gpte_access(pte)
        if level == PG_LEVEL_4K or (level <= PG_LEVEL_1G and pte & PT_PAGE_SIZE_MASK):
            break
    walker.pte_access = access
    if permission_fault(vcpu, access, pfec):
        walker.error_code = _fault_bits(pfec) | PFERR_PRESENT_MASK
        return walker
    below = kvm_pages_per_hpage(walker.level) - 1
    walker.gfn = ((pte & PT_BASE_ADDR_MASK) >> 12 & ~below) + (addr >> 12 & below)
    return walker


def update_accessed_dirty_bits(
    cpu: Cpu, vcpu: Vcpu, walker: GuestWalker, addr: int, write_fault: bool
) -> bool | None:
    """update_accessed_dirty_bits(): return False if all flags are set, True to walk again, None: an error."""
    kvm = vcpu.kvm
    for level in range(PT64_ROOT_4LEVEL, walker.level - 1, -1):
        orig = walker.ptes[level]
        pte = orig | PT_GUEST_ACCESSED_MASK
        if level == walker.level and write_fault:
            pte |= PT_GUEST_DIRTY_MASK
        if pte == orig:
            continue
        slot = gfn_to_memslot(kvm, walker.table_gfn[level], int(vcpu.arch.smm))
        assert slot is not None
        swapped = kvm_cmpxchg_guest_word(
            cpu, kvm, slot, walker.table_gfn[level], _index(addr, level), orig, pte
        )
        if not swapped:
            return None if swapped is None else True
        mark_page_dirty_in_slot(cpu, slot, walker.table_gfn[level])
        walker.ptes[level] = pte
    return False


def gpte_changed(cpu: Cpu, vcpu: Vcpu, walker: GuestWalker, addr: int, level: int) -> bool:
    """gpte_changed(), under mmu_lock: return whether the guest's entry is another than the walk's.

    In a last table read its neighbours as well, for pte_prefetch(): from here on KVM sees the guest's stores.
    """
    table_gfn = walker.table_gfn[level]
    slot = gfn_to_memslot(vcpu.kvm, table_gfn, int(vcpu.arch.smm))
    if slot is None:
        return True
    index = _index(addr, level)
    num = max(1, vcpu.kvm.params.prefetch) if level == PG_LEVEL_4K else 1
    first = index & -num
    for at in range(first, first + num):
        gpte = kvm_read_guest_word_atomic(cpu, vcpu.kvm, slot, table_gfn, at)
        if gpte is None:
            return True
        walker.prefetch_ptes[at] = gpte
    return walker.prefetch_ptes[index] != walker.ptes[level]


def paging64_gva_to_gpa(cpu: Cpu, vcpu: Vcpu, addr: int, pfec: int) -> int | None:
    """FNAME(gva_to_gpa): translate by the guest's tables; None: the guest would fault."""
    walker = walk_addr(cpu, vcpu, addr, pfec)
    return None if walker.error_code is not None else walker.gfn << 12 | addr & 0xFFF
