"""arch/x86/kvm/mmu/mmu.c: zaps of whole slots and ranges, aging, and dirty logging, for all MMUs of a VM.

Code outside mmu/ calls the functions here, which serve every MMU.  As in the kernel, each handles shadow
pages first, through their rmaps, and then the TDP MMU's, and passes a pending flush on from the former to the
latter.  Without EPT only shadow pages exist.  With EPT the TDP MMU's pages exist, and shadow pages for those
nested guests for which L1 has an EPT.

Roles and roots of vCPUs: roots.py.  Page faults: page_fault.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from emulator.kvm.accounting import flush_elided
from emulator.kvm.kvm_host import (
    APIC_ACCESS_PAGE_PRIVATE_MEMSLOT,
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_MAX_NR_ADDRESS_SPACES,
    KVM_REQ_APIC_PAGE_RELOAD,
    KVM_REQ_MMU_FREE_OBSOLETE_ROOTS,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    kvm_pages_per_hpage,
)
from emulator.kvm.mmu.mmio import MMIO_SPTE_GEN_MASK
from emulator.kvm.mmu.page_track import kvm_mmu_slot_gfn_write_protect
from emulator.kvm.mmu.rmap import kvm_rmap_age_gfn_range, kvm_rmap_zap_gfn_range
from emulator.kvm.mmu.shadow import free_special_pages, kvm_zap_obsolete_pages, shadow_mmu_zap_all
from emulator.kvm.mmu.shadow_slots import (
    kvm_mmu_zap_memslot_pages_and_flush,
    kvm_rmap_zap_collapsible_sptes,
    rmap_write_protect_masked,
    shadow_zap_gfn_range,
    slot_rmap_write_protect,
)
from emulator.kvm.mmu.tdp_dirty import (
    kvm_tdp_mmu_clear_dirty_pt_masked,
    kvm_tdp_mmu_recover_huge_pages,
    kvm_tdp_mmu_try_split_huge_pages,
    kvm_tdp_mmu_wrprot_slot,
)
from emulator.kvm.mmu.tdp_mmu import (
    kvm_mmu_uninit_tdp_mmu,
    kvm_tdp_mmu_age_gfn_range,
    kvm_tdp_mmu_unmap_gfn_range,
    kvm_tdp_mmu_zap_all,
    kvm_tdp_mmu_zap_invalidated_roots,
    kvm_tdp_mmu_zap_leafs,
)
from emulator.kvm.mmu.tdp_roots import kvm_tdp_mmu_invalidate_roots
from emulator.kvm.structs import (
    Kvm,
    KvmMemorySlot,
    kvm_memslots_have_rmaps,
    tdp_enabled,
    tdp_mmu_enabled,
)
from emulator.kvm.virt.requests import (
    kvm_flush_remote_tlbs_memslot,
    kvm_flush_remote_tlbs_range,
    kvm_make_all_cpus_request,
)
from emulator.machine.runtime import WRITE, Cpu
from native import lib
from native.types import NO_TICKET, FlushReason, Gfn, Level

# --- zaps ---------------------------------------------------------------------------------------------------


def kvm_mmu_zap_all_fast_front(cpu: Cpu, kvm: Kvm) -> None:
    """Do the front half of kvm_mmu_zap_all_fast(), under mmu_lock for write.

    Invalidating the roots and kicking all vCPUs off them is one critical section; otherwise a vCPU could pick
    an old root again and miss the kick.
    """
    with kvm.mmu_lock.write_lock(cpu):
        kvm.shadow.mmu_valid_gen ^= 1
        if tdp_mmu_enabled(kvm):
            kvm_tdp_mmu_invalidate_roots(cpu, kvm)
        kvm_make_all_cpus_request(cpu, kvm, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS)
        kvm_zap_obsolete_pages(cpu, kvm)


def kvm_mmu_zap_all_fast_back(cpu: Cpu, kvm: Kvm) -> None:
    """Do the back half of kvm_mmu_zap_all_fast(), without mmu_lock; vCPUs fault on new roots meanwhile."""
    if tdp_mmu_enabled(kvm):
        kvm_tdp_mmu_zap_invalidated_roots(cpu, kvm, shared=True)


def kvm_mmu_zap_all_fast(cpu: Cpu, kvm: Kvm) -> None:
    """kvm_mmu_zap_all_fast(), under slots_lock: invalidate and zap all roots, without a flush for the TDP
    MMU's."""
    kvm_mmu_zap_all_fast_front(cpu, kvm)
    kvm_mmu_zap_all_fast_back(cpu, kvm)


def kvm_mmu_invalidate_mmio_sptes(cpu: Cpu, kvm: Kvm, gen: int) -> None:
    """kvm_mmu_invalidate_mmio_sptes(): zap all if the generation, as far as MMIO SPTEs hold it, has wrapped.

    Only the shadow MMU makes MMIO SPTEs here.
    """
    gen &= MMIO_SPTE_GEN_MASK & ~(KVM_MAX_NR_ADDRESS_SPACES - 1)
    if not gen and not tdp_enabled(kvm):
        kvm_mmu_zap_all_fast(cpu, kvm)


def kvm_arch_flush_shadow_memslot(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> None:
    """kvm_arch_flush_shadow_memslot(): zap a slot that has been marked INVALID.

    Decision slot_delete: all roots; or the slot's leafs, since 6.12 with KVM_X86_QUIRK_SLOT_ZAP_ALL disabled.
    """
    if kvm.policy.slot_delete(cpu, kvm, slot) == "zap-all-roots":
        kvm_mmu_zap_all_fast(cpu, kvm)
        return
    with kvm.mmu_lock.write_lock(cpu):
        flush = kvm_unmap_gfn_range(cpu, kvm, slot, slot.base_gfn, slot.end_gfn, lib.REASON_REMOTE_ZAP)
        kvm_mmu_zap_memslot_pages_and_flush(cpu, kvm, slot, flush)


def kvm_mmu_zap_all(cpu: Cpu, kvm: Kvm) -> None:
    """kvm_mmu_zap_all(), kvm_arch_flush_shadow_all(): zap every root, as the VM's user memory goes away."""
    with kvm.mmu_lock.write_lock(cpu):
        shadow_mmu_zap_all(cpu, kvm)
        if tdp_mmu_enabled(kvm):
            kvm_tdp_mmu_zap_all(cpu, kvm)


def kvm_mmu_invalidate_start(cpu: Cpu, kvm: Kvm, ranges: Iterable[tuple[Gfn, Gfn]]) -> None:
    """kvm_mmu_invalidate_start() (kvm_mmu_invalidate_begin() before 7.x), under mmu_lock for write.

    Count those of `ranges` that overlap an invalidation in progress.  The caller adds each range to the
    invalidation before it zaps it.
    """
    assert cpu.mmu_lock_held == WRITE, "mmu_lock is not held for write"
    cpu.point("mmu_invalidate_seq", kvm.id, "write")
    lib.mmu_invalidate_begin(cpu.m, kvm.id)
    if any(lib.mmu_invalidate_overlaps(cpu.m, kvm.id, start, end) for start, end in ranges):
        cpu.stat(kvm.id, lib.STAT_OVERLAPS)


def kvm_zap_gfn_range(cpu: Cpu, kvm: Kvm, gfn_start: Gfn, gfn_end: Gfn) -> None:
    """kvm_zap_gfn_range(): zap a range, bracketed as an invalidation so that faults in the range retry.

    The guest keeps the frames, but their mapping has to change (APICv, memory types).  A fault that looked
    its frame up before the zap would otherwise install the old mapping again.  No huge page may lie across an
    end of the range: a fault next to the range does not retry, and would map all of the huge page again when
    the zap yields mmu_lock.
    """
    reason = lib.REASON_REMOTE_ZAP
    with kvm.mmu_lock.write_lock(cpu):
        kvm_mmu_invalidate_start(cpu, kvm, ((gfn_start, gfn_end),))
        lib.mmu_invalidate_range_add(cpu.m, kvm.id, gfn_start, gfn_end)
        flush = shadow_zap_gfn_range(cpu, kvm, gfn_start, gfn_end, reason)
        if tdp_mmu_enabled(kvm):
            flush = kvm_tdp_mmu_zap_leafs(cpu, kvm, gfn_start, gfn_end, flush, reason)
        if flush:
            kvm_flush_remote_tlbs_range(cpu, kvm, gfn_start, gfn_end - gfn_start, reason)
        # Revoke before in_progress ends: no fault may have installed anything until then, later ones may.
        lib.oracle_revoke(cpu.m, cpu.id, kvm.id, gfn_start, gfn_end, lib.PROMISE_ZAP_RANGE, NO_TICKET)
        cpu.point("mmu_invalidate_seq", kvm.id, "write")
        lib.mmu_invalidate_end(cpu.m, kvm.id)


def kvm_unmap_gfn_range(
    cpu: Cpu,
    kvm: Kvm,
    slot: KvmMemorySlot,
    start: Gfn,
    end: Gfn,
    reason: FlushReason = lib.REASON_REMOTE_NOTIFIER,
) -> bool:
    """kvm_unmap_gfn_range(), for mmu_notifiers: zap a range; return whether a flush is pending.

    VMCSs hold the address of the APIC-access page.  No flush updates them, so each vCPU gets a request to.

    reason: why a flush is made, if the zap has to flush before it yields.
    """
    flush = False
    if kvm_memslots_have_rmaps(kvm):
        flush = kvm_rmap_zap_gfn_range(cpu, kvm, slot, start, end, reason)
    if tdp_mmu_enabled(kvm):
        flush = kvm_tdp_mmu_unmap_gfn_range(cpu, kvm, slot, start, end, flush, reason)
    if slot.id == APIC_ACCESS_PAGE_PRIVATE_MEMSLOT:
        kvm_make_all_cpus_request(cpu, kvm, KVM_REQ_APIC_PAGE_RELOAD)
    return flush


def kvm_age_gfn(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, start: Gfn, end: Gfn) -> bool:
    """kvm_age_gfn(): return whether the guest has used the range since the last call."""
    young = False
    if tdp_mmu_enabled(kvm):
        young = kvm_tdp_mmu_age_gfn_range(cpu, kvm, slot, start, end)
    if kvm_memslots_have_rmaps(kvm):
        young |= kvm_rmap_age_gfn_range(cpu, kvm, slot, start, end)
    return young


def kvm_mmu_uninit_vm(cpu: Cpu, kvm: Kvm) -> None:
    """kvm_mmu_uninit_vm()"""
    if tdp_mmu_enabled(kvm):
        kvm_mmu_uninit_tdp_mmu(cpu, kvm)
    if kvm.shadow.dummy_root is not None:
        free_special_pages(cpu, (kvm.shadow.dummy_root,))


# --- dirty logging ------------------------------------------------------------------------------------------


def kvm_dirty_log_manual_protect_and_init_set(kvm: Kvm) -> bool:
    """kvm_dirty_log_manual_protect_and_init_set()"""
    return bool(kvm.dirty_log_manual & KVM_DIRTY_LOG_INITIALLY_SET)


def kvm_mmu_slot_remove_write_access(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, level: Level) -> bool:
    """kvm_mmu_slot_remove_write_access(): return whether some SPTE of the TDP MMU lost W.  The caller
    flushes."""
    if kvm_memslots_have_rmaps(kvm):
        with kvm.mmu_lock.write_lock(cpu):
            slot_rmap_write_protect(cpu, kvm, slot, level)
    if not tdp_mmu_enabled(kvm):
        return False
    with kvm.mmu_lock.read_lock(cpu):
        return kvm_tdp_mmu_wrprot_slot(cpu, kvm, slot, level)


def kvm_mmu_write_protect_pt_masked(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn_offset: int, mask: int
) -> int:
    """kvm_mmu_write_protect_pt_masked(), under mmu_lock for write: return how many 4K SPTEs lost W."""
    protected = 0
    if tdp_mmu_enabled(kvm):
        protected = kvm_tdp_mmu_clear_dirty_pt_masked(cpu, kvm, slot, slot.base_gfn + gfn_offset, mask)
    if kvm_memslots_have_rmaps(kvm):
        rmap_write_protect_masked(cpu, kvm, slot, slot.base_gfn + gfn_offset, mask)
    return protected


def kvm_mmu_try_split_huge_pages(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, start: Gfn, end: Gfn, target_level: Level
) -> None:
    """kvm_mmu_try_split_huge_pages(), under mmu_lock for write."""
    kvm_tdp_mmu_try_split_huge_pages(cpu, kvm, slot, start, end, target_level, shared=False)


def kvm_mmu_slot_try_split_huge_pages(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, target_level: Level) -> None:
    """kvm_mmu_slot_try_split_huge_pages(): split without a flush, because no translation changes."""
    with kvm.mmu_lock.read_lock(cpu):
        kvm_tdp_mmu_try_split_huge_pages(
            cpu, kvm, slot, slot.base_gfn, slot.end_gfn, target_level, shared=True
        )


def splits_eagerly(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> bool:
    """Return whether to split huge pages eagerly: decision eager_split, if the module parameter allows it.

    The shadow MMU's are split by faults alone, as long as no nested guest uses it.
    """
    return (
        tdp_mmu_enabled(kvm)
        and kvm.params.eager_page_split
        and kvm.policy.eager_split(cpu, kvm, slot) == "split"
    )


def kvm_mmu_recover_huge_pages(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> None:
    """kvm_mmu_recover_huge_pages()"""
    if kvm_memslots_have_rmaps(kvm):
        with kvm.mmu_lock.write_lock(cpu):
            kvm_rmap_zap_collapsible_sptes(cpu, kvm, slot)
    if not tdp_mmu_enabled(kvm):
        return
    with kvm.mmu_lock.read_lock(cpu):
        kvm_tdp_mmu_recover_huge_pages(cpu, kvm, slot)


def write_protect_flush(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, changed: bool) -> None:
    """Flush once for a slot after its SPTEs were write-protected, without mmu_lock.  Decision write_protect.

    `changed`: some SPTE lost W just now.  If none did, a flush may still be due: TLBs may hold writable
    translations of SPTEs that had lost W earlier.
    """
    answer = kvm.policy.write_protect(cpu, kvm, slot)
    if answer == "flush" or (answer == "if-changed" and changed):
        kvm_flush_remote_tlbs_memslot(cpu, kvm, slot, lib.REASON_REMOTE_PROTECT)
    else:
        flush_elided(cpu, kvm, lib.REASON_REMOTE_PROTECT, slot.base_gfn)


def kvm_mmu_slot_apply_flags(cpu: Cpu, kvm: Kvm, old: KvmMemorySlot, new: KvmMemorySlot) -> None:
    """kvm_mmu_slot_apply_flags(): begin or end dirty logging of an existing slot.

    With INITIALLY_SET nothing is write-protected now: all pages count as dirty until they are cleared.
    """
    if old.log_dirty_pages == new.log_dirty_pages:
        return
    if not new.log_dirty_pages:
        kvm_mmu_recover_huge_pages(cpu, kvm, new)
        return
    if kvm_dirty_log_manual_protect_and_init_set(kvm):
        return
    if splits_eagerly(cpu, kvm, new):
        kvm_mmu_slot_try_split_huge_pages(cpu, kvm, new, PG_LEVEL_4K)
    changed = kvm_mmu_slot_remove_write_access(cpu, kvm, new, PG_LEVEL_4K)
    ticket = lib.oracle_ticket(cpu.m, kvm.id)
    write_protect_flush(cpu, kvm, new, changed)
    lib.oracle_revoke(cpu.m, cpu.id, kvm.id, new.base_gfn, new.end_gfn, lib.PROMISE_DIRTY_LOG, ticket)


def kvm_arch_mmu_enable_log_dirty_pt_masked(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn_offset: int, mask: int
) -> int:
    """kvm_arch_mmu_enable_log_dirty_pt_masked(), under mmu_lock for write: write-protect the gfns in mask;
    return how many 4K SPTEs lost W.

    With INITIALLY_SET huge pages were left alone when logging was armed.  They are split here; a huge page
    that could not be split is write-protected, so that the first write splits it.
    """
    base = slot.base_gfn + gfn_offset
    if kvm_dirty_log_manual_protect_and_init_set(kvm):
        start = base + (mask & -mask).bit_length() - 1
        end = base + mask.bit_length() - 1
        if splits_eagerly(cpu, kvm, slot):
            kvm_mmu_try_split_huge_pages(cpu, kvm, slot, start, end + 1, PG_LEVEL_4K)
        kvm_mmu_slot_gfn_write_protect(cpu, kvm, slot, start, PG_LEVEL_2M)
        pages = kvm_pages_per_hpage(PG_LEVEL_2M)
        if start // pages != end // pages:
            kvm_mmu_slot_gfn_write_protect(cpu, kvm, slot, end, PG_LEVEL_2M)
    return kvm_mmu_write_protect_pt_masked(cpu, kvm, slot, gfn_offset, mask)
