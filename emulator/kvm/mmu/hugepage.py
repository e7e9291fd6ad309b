"""arch/x86/kvm/mmu/mmu.c: the sizes of pages that host, slot and dirty logging permit."""

from __future__ import annotations

from emulator.kvm.kvm_host import KVM_MAX_HUGEPAGE_LEVEL, PG_LEVEL_4K, kvm_pages_per_hpage
from emulator.kvm.mmu.fault import KvmPageFault
from emulator.kvm.structs import Kvm, KvmMemorySlot
from emulator.machine.runtime import Cpu
from native import lib
from native.types import Custody, Gfn, Hfn, Level


def kvm_mmu_hugepage_adjust(cpu: Cpu, kvm: Kvm, fault: KvmPageFault) -> None:
    """kvm_mmu_hugepage_adjust(), under mmu_lock: choose the largest level that host, slot and logging permit.

    The fault's gfn is in no invalidation, but its neighbours may be.  Mapping them is safe.  The host splits
    a huge page before it changes a part of it, and the split invalidates the whole page.  KVM calls
    kvm_zap_gfn_range() for whole huge pages.
    """
    slot = fault.slot
    if slot is None:
        return
    level = kvm_mmu_max_mapping_level(cpu, kvm, slot, fault.gfn, fault.max_level)
    if level == PG_LEVEL_4K:
        return
    custody = huge_custody(cpu, kvm, slot, fault.gfn, fault.pfn.pfn, fault.pfn.custody)
    if custody is None:
        return
    fault.goal_level = level
    fault.pfn.pfn = Hfn(fault.pfn.pfn & -kvm_pages_per_hpage(level))
    fault.pfn.custody = custody


def kvm_mmu_max_mapping_level(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, max_level: Level = KVM_MAX_HUGEPAGE_LEVEL
) -> Level:
    """kvm_mmu_max_mapping_level(), under mmu_lock: return the largest level that the host maps now.

    max_level: the largest that the guest's tables permit.
    """
    level = min(max_level, KVM_MAX_HUGEPAGE_LEVEL)
    if level == PG_LEVEL_4K:
        return level
    start = gfn & -kvm_pages_per_hpage(level)
    if _level_allowed(slot, gfn, level) and lib.mm_huge(cpu.m, kvm.id, slot.gfn_to_hva(start)):
        return level
    return PG_LEVEL_4K


def _level_allowed(slot: KvmMemorySlot, gfn: Gfn, level: Level) -> bool:
    """Return whether lpage_info permits a huge mapping.

    It does not while dirty pages are logged, across the slot's ends, or where guest and host addresses are
    aligned differently.
    """
    pages = kvm_pages_per_hpage(level)
    start = gfn & -pages
    return (
        not slot.dirty_track_enabled()
        and not slot.arch.disallow_lpage.get((level, start), 0)
        and slot.base_gfn <= start
        and start + pages <= slot.end_gfn
        and (slot.base_gfn ^ slot.userspace_addr) & (pages - 1) == 0
    )


def huge_custody(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, pfn: Hfn, custody: Custody
) -> Custody | None:
    """Return the custody of a huge SPTE, given `pfn` and the custody under which it was found.

    Return None if the host maps gfn to another frame.  This happens after another bug only; the kernel
    asserts that gfn and pfn agree.
    """
    found = lib.mm_huge_custody(cpu.m, kvm.id, slot.gfn_to_hva(gfn), pfn, custody)
    return None if found < 0 else Custody(found)
