"""arch/x86/kvm/mmu/mmu.c: page faults of guests on the TDP MMU.

A fault samples mmu_invalidate_seq, looks the frame up without any lock, then takes mmu_lock for read and maps
it only if no invalidation touched the gfn meanwhile.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from emulator.kvm.kvm_host import (
    APIC_ACCESS_PAGE_PRIVATE_MEMSLOT,
    KVM_REQ_MMU_FREE_OBSOLETE_ROOTS,
    PG_LEVEL_4K,
)
from emulator.kvm.mmu.fault import (
    EFAULT,
    ENOMEM,
    KVM_PFN_NOSLOT,
    RET_PF_CONTINUE,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_INVALID,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
    RET_PF_WRITE_PROTECTED,
    KvmPageFault,
    fault_around_range,
    spte_permission_fault,
)
from emulator.kvm.mmu.hugepage import kvm_mmu_hugepage_adjust
from emulator.kvm.mmu.lockless import (
    for_each_shadow_entry_lockless,
    is_tdp_mmu_active,
    walk_shadow_page_lockless,
)
from emulator.kvm.mmu.mmio import handle_mmio_page_fault
from emulator.kvm.mmu.page_track import kvm_gfn_is_write_tracked
from emulator.kvm.mmu.shadow_spte import mmu_spte_cmpxchg
from emulator.kvm.mmu.spte import (
    PT_WRITABLE_MASK,
    PfnAndRights,
    is_access_track_spte,
    is_last_spte,
    is_mmu_writable_spte,
    is_obsolete_sp,
    is_shadow_present_pte,
    restore_acc_track_spte,
    root_to_sp,
)
from emulator.kvm.mmu.sync import mmu_try_to_unsync_pages
from emulator.kvm.mmu.tdp_iter import Entry
from emulator.kvm.mmu.tdp_map import kvm_tdp_mmu_map, tdp_entry, tdp_mmu_set_spte_atomic
from emulator.kvm.structs import Kvm, KvmMemorySlot, Vcpu, tdp_enabled
from emulator.kvm.virt.requests import kvm_test_request
from emulator.kvm.virt.slots import gfn_to_memslot, mark_page_dirty_in_slot
from emulator.machine.runtime import FAULT_AROUND_MAX, Cpu, OutOfFrames
from native import lib
from native.types import Custody, HostWritable

# Which statistic counts a page fault, by what became of it.
_STATS: Final = {
    RET_PF_FIXED: lib.STAT_FAULTS,
    RET_PF_SPURIOUS: lib.STAT_PF_SPURIOUS,
    RET_PF_EMULATE: lib.STAT_PF_EMULATE,
    RET_PF_WRITE_PROTECTED: lib.STAT_PF_EMULATE,
    RET_PF_RETRY: lib.STAT_FAULT_RETRIES,
}
# How often fast_page_fault() tries to replace an SPTE that keeps changing.
_FAST_TRIES: Final = 5


def kvm_mmu_page_fault(
    cpu: Cpu, vcpu: Vcpu, addr: int, access: int, present: bool, error_code: int = 0
) -> int:
    """kvm_mmu_page_fault() and kvm_mmu_do_page_fault(): return a RET_PF_ value or a negative error.

    addr: guest-physical with EPT, otherwise linear.  After FIXED, SPURIOUS and RETRY the guest executes the
    access again; after WRITE_PROTECTED the caller emulates it.
    """
    is_tdp = is_tdp_mmu_active(vcpu)
    if tdp_enabled(vcpu.kvm) and not is_tdp:
        error_code = ept_error_code(access)
    fault = KvmPageFault(addr, access, present, error_code, is_tdp=is_tdp)
    if vcpu.mmu.root_role.direct:
        fault.slot = gfn_to_memslot(cpu, vcpu.kvm, fault.gfn, kvm_arch_vcpu_memslots_id(vcpu))
    handler = vcpu.mmu.page_fault
    assert handler is not None
    r = handle_mmio_page_fault(cpu, vcpu, addr) if fault.rsvd else RET_PF_INVALID
    if r == RET_PF_EMULATE:
        return r
    if r == RET_PF_INVALID:
        r = handler(cpu, vcpu, fault)
    stat = _STATS.get(r)
    if stat is not None:
        cpu.stat(vcpu.kvm.id, stat)
    return r


def ept_error_code(access: int) -> int:
    """Return the bits of handle_ept_violation()'s error code that a walk of L1's EPT tests: the kind of the
    access."""
    if access == lib.ACCESS_WRITE:
        return int(lib.PFERR_WRITE)
    return int(lib.PFERR_FETCH if access == lib.ACCESS_EXECUTE else lib.PFERR_USER)


def kvm_arch_vcpu_memslots_id(vcpu: Vcpu) -> int:
    """kvm_arch_vcpu_memslots_id(): choose the address space by the vCPU's mode, not by its root."""
    return int(vcpu.arch.smm)


def kvm_tdp_page_fault(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault) -> int:
    """kvm_tdp_page_fault(), kvm_tdp_mmu_page_fault()"""
    kvm = vcpu.kvm
    if page_fault_handle_page_track(cpu, kvm, fault):
        return RET_PF_WRITE_PROTECTED
    r = fast_page_fault(cpu, vcpu, fault)
    if r != RET_PF_INVALID:
        return r
    r = kvm_mmu_faultin_pfn(cpu, vcpu, fault)
    if r != RET_PF_CONTINUE:
        return r
    with kvm.mmu_lock.read_lock(cpu):
        if is_page_fault_stale(cpu, vcpu, fault):
            return RET_PF_RETRY
        kvm_mmu_hugepage_adjust(cpu, kvm, fault)
        if fault.slot is not None and fault.pfn.host_writable:
            fault.write_protected = not mmu_try_to_unsync_pages(
                cpu, kvm, fault.slot, fault.gfn, synchronizing=False, prefetch=False
            )
        try:
            return kvm_tdp_mmu_map(cpu, vcpu, fault)
        except OutOfFrames:
            return ENOMEM


def page_fault_handle_page_track(cpu: Cpu, kvm: Kvm, fault: KvmPageFault) -> bool:
    """page_fault_handle_page_track(): return whether the guest writes to a page that must stay read-only."""
    if fault.rsvd or not fault.present or not fault.write:
        return False
    return kvm_gfn_is_write_tracked(cpu, kvm, fault.slot, fault.gfn)


def page_fault_can_be_fast(kvm: Kvm, fault: KvmPageFault) -> bool:
    """page_fault_can_be_fast(): a write to a present SPTE; or, without A/D bits, an access to one that may be
    access-tracked, hence non-present for the CPU, yet present for KVM.

    The module parameter eptad is EPT's; ordinary page tables always have A/D bits (kvm_ad_enabled).
    """
    if fault.rsvd:
        return False
    return fault.write if fault.present else tdp_enabled(kvm) and not kvm.params.eptad


def fast_page_fault(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault) -> int:
    """fast_page_fault(): give a write-protected SPTE its W back, and an access-tracked one R and X, without
    mmu_lock.

    An SPTE that changes meanwhile is read again; after some tries the fault takes the slow path.  So does
    each fault on a page that shadows a guest's table, because the gfn that its SPTEs map may change.
    """
    if not page_fault_can_be_fast(vcpu.kvm, fault) or fault.slot is None:
        return RET_PF_INVALID
    with walk_shadow_page_lockless(cpu, vcpu):
        ret = _fast_fixed(cpu, vcpu, fault, fault.slot)
    if ret != RET_PF_INVALID:
        cpu.stat(vcpu.kvm.id, lib.STAT_PF_FAST)
    return ret


def _fast_fixed(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault, slot: KvmMemorySlot) -> int:
    for _ in range(_FAST_TRIES):
        entry = fast_pf_get_last_sptep(cpu, vcpu, fault)
        if (
            entry is None
            or not is_shadow_present_pte(entry.spte)
            or not is_last_spte(entry.spte, entry.level)
        ):
            return RET_PF_INVALID
        if not spte_permission_fault(fault, entry.spte):
            return RET_PF_SPURIOUS
        new_spte = _fast_spte(fault, slot, entry)
        if new_spte is None:
            return RET_PF_INVALID
        if fast_pf_fix_direct_spte(cpu, vcpu, fault, slot, entry, new_spte):
            return RET_PF_FIXED
    return RET_PF_INVALID


def fast_pf_get_last_sptep(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault) -> Entry | None:
    """fast_pf_get_last_sptep(), kvm_tdp_mmu_fast_pf_get_last_sptep(): return the deepest existing entry."""
    if not is_tdp_mmu_active(vcpu):
        last = deque(for_each_shadow_entry_lockless(cpu, vcpu, fault.addr), maxlen=1)
        return last[0] if last else None
    root = root_to_sp(vcpu.mmu.root)
    return None if root is None else tdp_entry(cpu, root, fault.gfn, PG_LEVEL_4K)


def _fast_spte(fault: KvmPageFault, slot: KvmMemorySlot, entry: Entry) -> int | None:
    """Return the SPTE that permits the access, or None if only the slow path can make it.

    W comes back only if MMU-writable is set, that is, if only dirty logging or aging has cleared W.
    """
    spte = entry.spte
    new_spte = restore_acc_track_spte(spte) if is_access_track_spte(spte) else spte
    if fault.write and is_mmu_writable_spte(spte):
        new_spte |= PT_WRITABLE_MASK
        if entry.level > PG_LEVEL_4K and slot.dirty_track_enabled():
            return None  # the fault splits it instead
    if new_spte == spte or spte_permission_fault(fault, new_spte):
        return None
    return new_spte


def fast_pf_fix_direct_spte(
    cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault, slot: KvmMemorySlot, entry: Entry, new_spte: int
) -> bool:
    """fast_pf_fix_direct_spte(): replace the SPTE, then mark a page that became writable; return False if the
    SPTE has changed.

    W is set before the page is marked: reaping reads the log before it write-protects, so a write is either
    in the log that is being read or faults again.
    """
    track = bool(new_spte & ~entry.spte & PT_WRITABLE_MASK) and slot.dirty_track_enabled()
    if is_tdp_mmu_active(vcpu):
        swapped = tdp_mmu_set_spte_atomic(cpu, vcpu.kvm, entry, new_spte)
    else:
        swapped = mmu_spte_cmpxchg(cpu, vcpu.kvm, entry.table, entry.index, entry.level, entry.spte, new_spte)
    if not swapped:
        return False
    if track:
        mark_page_dirty_in_slot(cpu, slot, fault.gfn)
    return True


def kvm_mmu_faultin_pfn(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault) -> int:
    """kvm_mmu_faultin_pfn(): sample the sequence, then check the slot's state, then look up the frame.

    A fault in a slot that is being deleted or moved retries; otherwise it would map pages that are being
    zapped.  A fault on a gfn that is being invalidated retries before it takes a page or mmu_lock.  L2 gets
    no mapping of L1's APIC-access page: vmcs02 does not turn accesses to it into exits.
    """
    kvm, slot = vcpu.kvm, fault.slot
    cpu.point("mmu_invalidate_seq", kvm.id, "read")
    fault.mmu_seq = lib.mmu_invalidate_seq(cpu.m, kvm.id)
    if slot is None:
        return kvm_handle_noslot_fault(fault)
    if slot.invalid:  # since 5.13 (e0c378684b65)
        cpu.stat(kvm.id, lib.STAT_SLOT_RETRIES)
        return RET_PF_RETRY
    if slot.id == APIC_ACCESS_PAGE_PRIVATE_MEMSLOT and vcpu.arch.guest_mode:
        cpu.stat(kvm.id, lib.STAT_APIC_WITHHELD)
        return kvm_handle_noslot_fault(fault)
    if mmu_invalidate_retry(cpu, kvm, fault):
        return RET_PF_RETRY
    r = __kvm_mmu_faultin_pfn(cpu, kvm, fault, slot)
    if r == RET_PF_CONTINUE and mmu_invalidate_retry(cpu, kvm, fault):
        return RET_PF_RETRY
    return r


def kvm_handle_noslot_fault(fault: KvmPageFault) -> int:
    """kvm_handle_noslot_fault(): let user space emulate the access; a shadow MMU first makes an MMIO SPTE."""
    if fault.is_tdp:
        return RET_PF_EMULATE
    fault.slot = None
    fault.pfn = PfnAndRights(KVM_PFN_NOSLOT, Custody(0), host_writable=HostWritable(False))
    return RET_PF_CONTINUE


def __kvm_mmu_faultin_pfn(cpu: Cpu, kvm: Kvm, fault: KvmPageFault, slot: KvmMemorySlot) -> int:
    """__kvm_mmu_faultin_pfn(), kvm_faultin_pfn(): look up the host's page for the gfn and its neighbours."""
    cpu.point("mm", (kvm.id, fault.gfn), "read")
    page, hva = cpu.page, slot.gfn_to_hva(fault.gfn)
    rc = lib.mm_fault(cpu.m, cpu.id, kvm.id, hva, fault.write, page)
    if rc == lib.MACHINE_AGAIN:
        if not page.cow:
            return EFAULT
        # The host's copy invokes the mmu_notifiers of this very VM; the fault then has to start over.
        assert kvm.mm is not None
        return RET_PF_RETRY if kvm.mm.wp_page_copy(cpu, hva) else ENOMEM
    if rc == lib.MACHINE_NOMEM:
        return ENOMEM
    cpu.check(rc)
    fault.pfn = PfnAndRights(page.hfn, page.tag, HostWritable(bool(page.writable)))
    around = min(kvm.params.fault_around, FAULT_AROUND_MAX)
    # No neighbours under dirty logging: they would become writable without being marked.
    if fault.is_tdp and around > 1 and page.level == PG_LEVEL_4K and not slot.dirty_track_enabled():
        fault.around_gfn, fault.around_n = fault_around_range(fault, around)
        cpu.point("mm", (kvm.id, fault.around_gfn), "read")
        cpu.check(
            lib.mm_fault_range(
                cpu.m,
                cpu.id,
                kvm.id,
                slot.gfn_to_hva(fault.around_gfn),
                fault.around_n,
                True,
                cpu.hfns,
                cpu.tags,
                cpu.writable,
            )
        )
    return RET_PF_CONTINUE


def mmu_invalidate_retry(cpu: Cpu, kvm: Kvm, fault: KvmPageFault) -> bool:
    """mmu_invalidate_retry_gfn() and its unlocked form: return whether the fault raced an invalidation.

    Decision fault_retry.
    """
    if kvm.policy.fault_retry(cpu, kvm, fault.gfn) == "none":
        return False
    retry = bool(lib.mmu_invalidate_retry_gfn(cpu.m, kvm.id, fault.mmu_seq, fault.gfn))
    cpu.stat(kvm.id, lib.STAT_INVALIDATE_RETRIES, retry)
    return retry


def is_page_fault_stale(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault) -> bool:
    """is_page_fault_stale(), under mmu_lock: return whether the root is invalid or the frame may be gone.

    A root without a shadow page carries no mark of being invalid.  It counts as invalid while a request to
    free obsolete roots is pending, even if the request is about another root.
    """
    sp = root_to_sp(vcpu.mmu.root)
    if sp is not None and is_obsolete_sp(vcpu.kvm, sp):
        return True
    if sp is None and kvm_test_request(cpu, vcpu, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS):
        return True
    if fault.slot is None:
        return False
    cpu.point("mmu_invalidate_seq", vcpu.kvm.id, "read")
    return mmu_invalidate_retry(cpu, vcpu.kvm, fault)
