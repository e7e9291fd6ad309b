"""arch/x86/kvm/mmu/spte.[ch]: the meaning of SPTE values, and making leaf SPTEs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from emulator.kvm.kvm_host import PG_LEVEL_4K
from emulator.kvm.mmu.structs import KvmMmuPage, KvmMmuRootInfo
from emulator.kvm.structs import Kvm, KvmMemorySlot
from emulator.kvm.virt.slots import mark_page_dirty_in_slot
from emulator.machine.runtime import Cpu
from native import lib
from native.types import Custody, Gfn, Hfn, HostWritable, Level

PT_WRITABLE_MASK: Final[int] = lib.SPTE_WRITABLE
PT_PAGE_SIZE_MASK: Final[int] = lib.SPTE_PAGE_SIZE
SHADOW_HOST_WRITABLE_MASK: Final[int] = 1 << lib.SPTE_HOST_WRITABLE_BIT
SHADOW_MMU_WRITABLE_MASK: Final[int] = 1 << lib.SPTE_MMU_WRITABLE_BIT
FROZEN_SPTE: Final[int] = lib.FROZEN_SPTE
_RX: Final[int] = lib.SPTE_READABLE | lib.SPTE_EXECUTABLE
_ACC_TRACK_SAVED_SHIFT: Final[int] = lib.SPTE_ACC_TRACK_SAVED_SHIFT
_ACC_TRACK_SAVED: Final[int] = _RX << _ACC_TRACK_SAVED_SHIFT
_RWX: Final[int] = _RX | lib.SPTE_WRITABLE
_PRESENT: Final[int] = _RWX | _ACC_TRACK_SAVED
_HFN_SHIFT: Final[int] = lib.SPTE_HFN_SHIFT
_HFN_MASK: Final = 0xFFFFFF
_CUSTODY: Final[int] = lib.FRAME_TAG_MASK << lib.SPTE_CUSTODY_SHIFT


def is_shadow_present_pte(spte: int) -> bool:
    """is_shadow_present_pte(): return whether the SPTE is present for KVM.

    An access-tracked SPTE is, although a CPU cannot use it.
    """
    return bool(spte & _PRESENT)


def is_access_track_spte(spte: int) -> bool:
    """is_access_track_spte(): without A/D bits in EPT, KVM notices the next access because it faults."""
    return not spte & _RWX and bool(spte & _ACC_TRACK_SAVED)


def restore_acc_track_spte(spte: int) -> int:
    """restore_acc_track_spte(): restore R and X, but not W."""
    saved = (spte & _ACC_TRACK_SAVED) >> _ACC_TRACK_SAVED_SHIFT
    return (spte & ~_ACC_TRACK_SAVED) | saved


def mark_spte_for_access_track(spte: int) -> int:
    """mark_spte_for_access_track(): take R, W and X, and save R and X; MMU-writable preserves W."""
    return (spte & ~_RWX) | (spte & _RX) << _ACC_TRACK_SAVED_SHIFT


def is_frozen_spte(spte: int) -> bool:
    """is_frozen_spte(): return whether nothing may be installed in the SPTE.

    Its table is being removed, or another thread is changing it.
    """
    return spte == FROZEN_SPTE


def is_large_pte(spte: int) -> bool:
    return bool(spte & PT_PAGE_SIZE_MASK)


def is_last_spte(spte: int, level: Level) -> bool:
    return level == PG_LEVEL_4K or bool(spte & PT_PAGE_SIZE_MASK)


def is_writable_pte(spte: int) -> bool:
    return bool(spte & PT_WRITABLE_MASK)


def is_mmu_writable_spte(spte: int) -> bool:
    """is_mmu_writable_spte(): return whether KVM may set W.

    While MMU-writable is set, a TLB may hold a writable translation even if W is clear.
    """
    return bool(spte & SHADOW_MMU_WRITABLE_MASK)


def leaf_spte_change_needs_tlb_flush(old_spte: int, new_spte: int) -> bool:
    """leaf_spte_change_needs_tlb_flush(), since 6.13: return whether the SPTE lost MMU-writable.

    Clearing A, D or W alone may stay unflushed until dirty logging reaps.
    """
    return is_mmu_writable_spte(old_spte) and not is_mmu_writable_spte(new_spte)


def spte_to_child_pt(spte: int) -> Hfn:
    """spte_to_child_pt(): return the frame number of the table that a non-leaf SPTE points to."""
    return Hfn((spte >> _HFN_SHIFT) & _HFN_MASK)


@dataclass(slots=True)
class PfnAndRights:
    """The result of faultin: the frame, the custody tag under which it was taken, the host's permission."""

    pfn: Hfn
    custody: Custody
    host_writable: HostWritable


def make_spte(
    cpu: Cpu, slot: KvmMemorySlot, gfn: Gfn, level: Level, pfn: PfnAndRights, *, wrprot: bool = False
) -> int:
    """make_spte(): make a leaf, writable iff the host permits writes, even if the fault was a read.

    Under dirty logging, making a writable leaf marks the page dirty.  wrprot: leave W and MMU-writable clear,
    because KVM must see the guest's stores to the page.
    """
    writable = pfn.host_writable and not wrprot
    spte: int = lib.make_spte(pfn.pfn, pfn.custody, level, writable, pfn.host_writable)
    if writable and slot.dirty_track_enabled():
        mark_page_dirty_in_slot(cpu, slot, gfn)
    return spte


def remade_spte(kvm: Kvm, old_spte: int, new_spte: int) -> int:
    """Return the SPTE that make_spte() made before 6.13 over a leaf of the same frame: without a dirty flag
    if the leaf was writable.

    The frame is the one that the leaf's custody is about, so the custody stays.  Without A/D bits in EPT,
    SPTEs have neither flag there.
    """
    kept = _CUSTODY if kvm.params.eptad else _CUSTODY | lib.SPTE_ACCESSED | lib.SPTE_DIRTY
    if is_writable_pte(old_spte):
        new_spte &= ~lib.SPTE_DIRTY
    return (new_spte & ~kept) | (old_spte & kept)


def root_to_sp(root: KvmMmuRootInfo | None) -> KvmMmuPage | None:
    """root_to_sp(): return None for no root, and for one without a shadow page (a dummy root, PAE roots)."""
    return None if root is None else root.sp


def is_tdp_mmu_page(sp: KvmMmuPage) -> bool:
    """is_tdp_mmu_page()"""
    return sp.tdp_mmu_page


def is_obsolete_sp(kvm: Kvm, sp: KvmMmuPage) -> bool:
    """is_obsolete_sp(): return whether no vCPU may use it any more.  TDP MMU pages have no mmu_valid_gen."""
    if sp.role.invalid:
        return True
    return not sp.tdp_mmu_page and sp.mmu_valid_gen != kvm.shadow.mmu_valid_gen
