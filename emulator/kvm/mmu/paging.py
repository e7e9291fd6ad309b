"""arch/x86/kvm/mmu/paging_tmpl.h, its second half: page faults on the guest's tables, and unsync pages.

The walk of the guest's tables (guest_walk.py) takes no lock.  Therefore the fault compares each entry that
the walk used with the guest's again, under mmu_lock, once the shadow page of the entry's table is
write-protected or unsync: from then on KVM learns of the guest's stores.
"""

from __future__ import annotations

from emulator.kvm.kvm_host import (
    KVM_REQ_MMU_FREE_OBSOLETE_ROOTS,
    SPTE_ENT_PER_PAGE,
    kvm_pages_per_hpage,
)
from emulator.kvm.mmu.fault import (
    ENOMEM,
    RET_PF_CONTINUE,
    RET_PF_INJECTED,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
    RET_PF_WRITE_PROTECTED,
    KvmPageFault,
)
from emulator.kvm.mmu.guest_walk import (
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    GuestWalker,
    gpte_changed,
    pagewalk_of,
    walk_addr,
)
from emulator.kvm.mmu.hugepage import kvm_mmu_hugepage_adjust
from emulator.kvm.mmu.lockless import (
    clear_sp_write_flooding_count,
    kvm_mmu_is_dummy_root,
    shadow_page_table_clear_flood,
)
from emulator.kvm.mmu.mmio import sync_mmio_spte
from emulator.kvm.mmu.page_fault import (
    is_page_fault_stale,
    kvm_mmu_faultin_pfn,
    page_fault_handle_page_track,
)
from emulator.kvm.mmu.rmap import drop_spte
from emulator.kvm.mmu.shadow import (
    drop_parent_pte,
    link_shadow_page,
    make_mmu_pages_available,
    spte_to_child_sp,
)
from emulator.kvm.mmu.shadow_map import (
    direct_pte_prefetch,
    kvm_mmu_prefetch_sptes,
    make_shadow_spte,
    mmu_set_spte,
    prefetch_window,
    shadow_walk,
)
from emulator.kvm.mmu.shadow_spte import (
    kvm_mmu_page_get_gfn,
    mmu_spte_update,
    spte_of,
    spte_rights,
)
from emulator.kvm.mmu.shadow_structs import ShadowPage, Sptep
from emulator.kvm.mmu.spte import is_large_pte, is_shadow_present_pte
from emulator.kvm.mmu.structs import ACC_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK
from emulator.kvm.mmu.sync import (
    kvm_mmu_get_child_sp,
    kvm_mmu_invalidate_addr_in_root,
    mmu_sync_children,
)
from emulator.kvm.structs import Kvm, Vcpu
from emulator.kvm.virt.guest_memory import kvm_read_guest_entry_atomic
from emulator.kvm.virt.requests import kvm_flush_remote_tlbs_range, kvm_make_request
from emulator.kvm.virt.slots import gfn_to_memslot
from emulator.machine.runtime import Cpu, OutOfFrames
from native import lib
from native.types import Gfn, Gva, SpteIndex


def validate_direct_spte(cpu: Cpu, kvm: Kvm, sptep: Sptep, direct_access: int) -> None:
    """validate_direct_spte(): unlink a direct page below a guest's huge page if its rights have changed."""
    spte = spte_of(cpu, sptep)
    if not is_shadow_present_pte(spte) or is_large_pte(spte):
        return
    child = spte_to_child_sp(kvm, spte)
    if child.role.access == direct_access:
        return
    drop_parent_pte(cpu, kvm, child, sptep)
    gfn = kvm_mmu_page_get_gfn(cpu, sptep.sp, sptep.idx)
    kvm_flush_remote_tlbs_range(
        cpu, kvm, gfn, kvm_pages_per_hpage(sptep.sp.role.level), lib.REASON_REMOTE_REPLACE
    )


def fetch(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault, walker: GuestWalker) -> int:
    """fetch(), under mmu_lock for write: link the shadow pages of the guest's tables, then map the page.

    Raises OutOfFrames.  Below a guest's huge page that is mapped by small ones there are direct pages.
    """
    kvm, w = vcpu.kvm, pagewalk_of(vcpu.mmu)
    if gpte_changed(cpu, vcpu, w, walker, fault.addr, w.top_level):
        return RET_PF_RETRY
    if vcpu.mmu.root is None or kvm_mmu_is_dummy_root(kvm, vcpu.mmu.root):
        # CR3 points to memory by now: load another one.
        kvm_make_request(cpu, vcpu, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS)
        return RET_PF_RETRY
    adjusted = False
    for sptep in shadow_walk(cpu, vcpu, fault.addr):
        level = sptep.sp.role.level
        clear_sp_write_flooding_count(cpu, sptep.sp)
        if level > walker.level:
            if not _link_table(cpu, vcpu, fault, walker, sptep):
                return RET_PF_RETRY
            continue
        if not adjusted:
            kvm_mmu_hugepage_adjust(cpu, kvm, fault)
            adjusted = True
        base_gfn = fault.gfn & -kvm_pages_per_hpage(level)
        if level == fault.goal_level:
            return _set_leaf(cpu, vcpu, fault, walker, sptep, base_gfn)
        validate_direct_spte(cpu, kvm, sptep, walker.pte_access)
        sp = kvm_mmu_get_child_sp(cpu, vcpu, sptep, base_gfn, direct=True, access=walker.pte_access)
        if sp is not None:
            link_shadow_page(cpu, kvm, sptep, sp)
    raise AssertionError(f"no SPTE of level {fault.goal_level} for {fault.addr:#x}")


def _link_table(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault, walker: GuestWalker, sptep: Sptep) -> bool:
    """Link the shadow page of the guest's next table; return False if the fault must be taken again.

    A page is synced before it is linked: the guest owes no flush for an entry that was not present before.
    """
    below = sptep.sp.role.level - 1
    table_gfn = walker.table_gfn[below]
    sp = kvm_mmu_get_child_sp(cpu, vcpu, sptep, table_gfn, direct=False, access=walker.pt_access[below])
    if sp is not None and sp.unsync_children and not mmu_sync_children(cpu, vcpu, sp, can_yield=False):
        return False
    if gpte_changed(cpu, vcpu, pagewalk_of(vcpu.mmu), walker, fault.addr, below):
        return False
    if sp is not None:
        link_shadow_page(cpu, vcpu.kvm, sptep, sp)
    return True


def _set_leaf(
    cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault, walker: GuestWalker, sptep: Sptep, base_gfn: Gfn
) -> int:
    r = mmu_set_spte(
        cpu,
        vcpu.kvm,
        fault.slot,
        sptep,
        walker.pte_access,
        base_gfn,
        fault.pfn,
        prefetch=False,
        write_fault=fault.write,
    )
    if r != RET_PF_SPURIOUS:
        pte_prefetch(cpu, vcpu, walker, sptep)
    return r


def pte_prefetch(cpu: Cpu, vcpu: Vcpu, walker: GuestWalker, sptep: Sptep) -> None:
    """FNAME(pte_prefetch): map neighbours of the page as well, up to one that the guest has not used yet."""
    if sptep.sp.role.direct:
        direct_pte_prefetch(cpu, vcpu, sptep)
        return
    first = first_gpte(sptep.sp)
    for index in prefetch_window(cpu, vcpu, sptep):
        at = Sptep(sptep.sp, index)
        if index == sptep.idx or is_shadow_present_pte(spte_of(cpu, at)):
            continue
        if not prefetch_gpte(cpu, vcpu, at, walker.prefetch_ptes[first + index]):
            return


def prefetch_gpte(cpu: Cpu, vcpu: Vcpu, sptep: Sptep, gpte: int) -> bool:
    """FNAME(prefetch_gpte): map the page of one entry; return False if it must not, or cannot, be mapped."""
    w = pagewalk_of(vcpu.mmu)
    if w.prefetch_invalid_gpte(gpte):
        return False
    access = w.fmt.protect_clean_gpte(sptep.sp.role.access & w.fmt.gpte_access(gpte), gpte)
    return kvm_mmu_prefetch_sptes(cpu, vcpu, w.fmt.gpte_to_gfn(gpte), sptep, 1, access)


def kvm_inject_emulated_page_fault(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault, error_code: int) -> None:
    """kvm_inject_emulated_page_fault(): hand the fault to the owner of the tables, the guest or L1.

    An EPT violation invalidates the page's mappings, so KVM syncs the SPTE before L1 gets the exit.
    """
    mmu = vcpu.mmu
    if mmu.inject_page_fault is None:
        lib.guest_inject_page_fault(cpu.m, vcpu.id, Gva(fault.addr), error_code)
        return
    if error_code & PFERR_PRESENT_MASK and not error_code & PFERR_RSVD_MASK:
        kvm_mmu_invalidate_addr_in_root(cpu, vcpu, fault.addr, mmu.root)
    mmu.inject_page_fault(cpu, vcpu, fault, error_code)


def paging_page_fault(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault) -> int:
    """FNAME(page_fault): the guest's tables decide first; what they forbid is the guest's own page fault."""
    kvm, w = vcpu.kvm, pagewalk_of(vcpu.mmu)
    walker = walk_addr(cpu, vcpu, w, fault.addr, fault.error_code & ~PFERR_RSVD_MASK)
    if walker.error_code is not None:
        kvm_inject_emulated_page_fault(cpu, vcpu, fault, walker.error_code)
        return RET_PF_INJECTED
    fault.gfn = walker.gfn
    fault.max_level = walker.level
    fault.slot = gfn_to_memslot(cpu, kvm, fault.gfn, int(vcpu.arch.smm))
    if page_fault_handle_page_track(cpu, kvm, fault):
        shadow_page_table_clear_flood(cpu, vcpu, fault.addr)
        return RET_PF_WRITE_PROTECTED
    r = kvm_mmu_faultin_pfn(cpu, vcpu, fault)
    if r != RET_PF_CONTINUE:
        return r
    # A supervisor's write with CR0.WP clear ignores W of the guest's tables.
    if (
        fault.write
        and not walker.pte_access & ACC_WRITE_MASK
        and not w.cr0_wp
        and fault.slot is not None
        and not fault.error_code & PFERR_USER_MASK
    ):
        walker.pte_access = (walker.pte_access | ACC_WRITE_MASK) & ~ACC_USER_MASK
        if w.cr4_smep:
            walker.pte_access &= ~ACC_EXEC_MASK
    with kvm.mmu_lock.write_lock(cpu):
        if not make_mmu_pages_available(cpu, kvm):
            return ENOMEM
        if is_page_fault_stale(cpu, vcpu, fault):
            return RET_PF_RETRY
        try:
            return fetch(cpu, vcpu, fault, walker)
        except OutOfFrames:
            return ENOMEM


def first_gpte(sp: ShadowPage) -> int:
    """FNAME(get_level1_sp_gpa): return the index of the entry in the guest's last table that the page's first
    SPTE stands for."""
    return sp.role.quadrant * SPTE_ENT_PER_PAGE


def paging_sync_spte(cpu: Cpu, vcpu: Vcpu, sp: ShadowPage, index: SpteIndex) -> int:
    """FNAME(sync_spte): compare an SPTE of an unsync page with the guest's entry; below 0: it cannot be read;
    1: a flush is due.

    Drop an SPTE if its gfn has changed; otherwise at most reduce its rights.
    """
    kvm, w = vcpu.kvm, pagewalk_of(vcpu.mmu)
    fmt, sptep, gpte = w.fmt, Sptep(sp, index), None
    slot = gfn_to_memslot(cpu, kvm, sp.gfn, int(vcpu.arch.smm))
    if slot is not None:
        at = first_gpte(sp) + index
        gpte = kvm_read_guest_entry_atomic(cpu, kvm, slot, sp.gfn, at, fmt.entry_bytes)
    if gpte is None:
        return -1
    if w.prefetch_invalid_gpte(gpte):
        drop_spte(cpu, kvm, sptep)
        return 1
    gfn = fmt.gpte_to_gfn(gpte)
    access = fmt.protect_clean_gpte(sp.role.access & fmt.gpte_access(gpte), gpte)
    if sync_mmio_spte(cpu, kvm, sptep, gfn):
        return 0
    if gfn != kvm_mmu_page_get_gfn(cpu, sp, index):
        drop_spte(cpu, kvm, sptep)
        return 1
    if sp.get_access(index) == access:
        return 0
    sp.shadowed_access[index] = access
    spte = spte_of(cpu, sptep)
    page_slot = gfn_to_memslot(cpu, kvm, gfn, int(vcpu.arch.smm))
    assert page_slot is not None
    new_spte, _ = make_shadow_spte(
        cpu, kvm, sp, page_slot, access, gfn, spte_rights(spte), spte, prefetch=True, synchronizing=True
    )
    return int(mmu_spte_update(cpu, kvm, sptep, gfn, new_spte))
