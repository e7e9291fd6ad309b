"""arch/x86/kvm/mmu/tdp_mmu.c: changes of a memslot's SPTEs when dirty logging is armed, read and ended.

Write-protecting and splitting do not flush here; the callers flush once, before they return to user space.
"""

from __future__ import annotations

from emulator.kvm.kvm_host import SPTE_ENT_PER_PAGE, kvm_pages_per_hpage
from emulator.kvm.mmu.hugepage import huge_custody, kvm_mmu_max_mapping_level
from emulator.kvm.mmu.spte import (
    PT_PAGE_SIZE_MASK,
    PT_WRITABLE_MASK,
    SHADOW_MMU_WRITABLE_MASK,
    is_last_spte,
    is_shadow_present_pte,
    spte_to_child_pt,
)
from emulator.kvm.mmu.structs import KvmMmuPage
from emulator.kvm.mmu.tdp_iter import Entry, TdpIter, tdp_mmu_iter_cond_resched
from emulator.kvm.mmu.tdp_map import (
    tdp_entry,
    tdp_mmu_alloc_sp,
    tdp_mmu_free_unused_sp,
    tdp_mmu_set_spte_atomic,
    tdp_mmu_split_huge_page,
)
from emulator.kvm.mmu.tdp_remove import (
    tdp_mmu_set_spte,
    tdp_mmu_zap_spte_atomic,
)
from emulator.kvm.mmu.tdp_roots import (
    KVM_VALID_ROOTS,
    changed_roots,
    for_each_tdp_mmu_root_yield_safe,
    kvm_tdp_mmu_put_root,
    root_matches,
)
from emulator.kvm.notifications import walk_ends
from emulator.kvm.structs import Kvm, KvmMemorySlot
from emulator.kvm.virt.requests import kvm_flush_remote_tlbs_memslot
from emulator.machine.runtime import READ, WRITE, Cpu, OutOfFrames, rcu_enter, rcu_leave, rcu_read_lock
from native import lib
from native.types import Custody, Gfn, Hfn, Level, SpteIndex, span

_HFN_SHIFT = lib.SPTE_HFN_SHIFT


def kvm_tdp_mmu_wrprot_slot(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, min_level: Level) -> bool:
    """kvm_tdp_mmu_wrprot_slot(), wrprot_gfn_range(): return whether some SPTE lost W; yields do not flush."""
    spte_set = False
    for root in for_each_tdp_mmu_root_yield_safe(cpu, kvm, KVM_VALID_ROOTS, slot.as_id):
        it = TdpIter(root, lib.TDP_WRPROT, slot.base_gfn, slot.end_gfn, shared=True, level=min_level)
        with rcu_read_lock(cpu):
            while not it.done:
                if tdp_mmu_iter_cond_resched(cpu, kvm, it, flush=False):
                    continue
                if it.step(cpu, kvm):
                    spte_set = True
    return spte_set


def kvm_tdp_mmu_clear_dirty_pt_masked(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, mask: int) -> int:
    """kvm_tdp_mmu_clear_dirty_pt_masked(wrprot=true), under mmu_lock for write: take W from the 4K SPTEs of
    the gfns in mask; return how many lost it."""
    assert cpu.mmu_lock_held == WRITE
    changed, types = 0, changed_roots(cpu, kvm)
    for root in kvm.tdp_mmu_roots:
        if not root_matches(root, types, slot.as_id):
            continue
        it = TdpIter(root, lib.TDP_CLEAR_DIRTY, gfn, gfn + 64, shared=False, mask=mask)
        with rcu_read_lock(cpu):
            while not it.done:
                changed += it.step(cpu, kvm)
    return changed


def kvm_tdp_mmu_write_protect_gfn(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, min_level: Level
) -> bool:
    """kvm_tdp_mmu_write_protect_gfn(), write_protect_gfn(), under mmu_lock for write: take W and
    MMU-writable from the leaf, if it is at min_level or above.  Decision invalid_roots."""
    assert cpu.mmu_lock_held == WRITE
    spte_set, types = False, changed_roots(cpu, kvm)
    for root in kvm.tdp_mmu_roots:
        if not root_matches(root, types, slot.as_id):
            continue
        with rcu_read_lock(cpu):
            entry = tdp_entry(cpu, root, gfn, min_level)
            if not is_shadow_present_pte(entry.spte) or not is_last_spte(entry.spte, entry.level):
                continue
            new_spte = entry.spte & ~(PT_WRITABLE_MASK | SHADOW_MMU_WRITABLE_MASK)
            if new_spte != entry.spte:
                tdp_mmu_set_spte(cpu, kvm, entry, new_spte)
                spte_set = True
    return spte_set


def kvm_tdp_mmu_try_split_huge_pages(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, start: Gfn, end: Gfn, target_level: Level, shared: bool
) -> None:
    """kvm_tdp_mmu_try_split_huge_pages(): split huge pages until no table page is left; faults split the
    rest."""
    assert cpu.mmu_lock_held == (READ if shared else WRITE)
    for root in for_each_tdp_mmu_root_yield_safe(cpu, kvm, KVM_VALID_ROOTS, slot.as_id):
        if not tdp_mmu_split_huge_pages_root(cpu, kvm, root, start, end, target_level, shared):
            kvm_tdp_mmu_put_root(cpu, kvm, root)
            break


def tdp_mmu_split_huge_pages_root(
    cpu: Cpu, kvm: Kvm, root: KvmMmuPage, start: Gfn, end: Gfn, target_level: Level, shared: bool
) -> bool:
    """tdp_mmu_split_huge_pages_root(): return False if no table page was left.

    Decision split_alloc.  A walk that dropped mmu_lock for a table looks at the SPTE again.
    """
    it = TdpIter(root, lib.TDP_FIND_HUGE, start, end, shared=shared, level=target_level)
    table: Hfn | None = None
    with rcu_read_lock(cpu):
        while not it.done:
            if tdp_mmu_iter_cond_resched(cpu, kvm, it, flush=False):
                continue
            it.step(cpu, kvm)
            entry = it.found()
            if entry is None:
                continue
            if table is None and kvm.policy.split_alloc(cpu, kvm) == "locked":
                table = _alloc_table(cpu)
            if table is None:
                rcu_leave(cpu)
                table = _alloc_table_unlocked(cpu, kvm)
                if table is None:
                    return False
                rcu_enter(cpu)
                it.retry(entry.gfn)
            elif tdp_mmu_split_huge_page(cpu, kvm, entry, table):
                table = None
            else:
                it.retry(entry.gfn)
    if table is not None:
        tdp_mmu_free_unused_sp(cpu, table)
    return True


def _alloc_table(cpu: Cpu) -> Hfn | None:
    try:
        return tdp_mmu_alloc_sp(cpu)
    except OutOfFrames:
        return None


def _alloc_table_unlocked(cpu: Cpu, kvm: Kvm) -> Hfn | None:
    """Allocate a table without mmu_lock, because the allocation may reclaim memory, which calls KVM's
    mmu_notifiers."""
    how = cpu.mmu_lock_held
    kvm.mmu_lock.unlock(cpu)
    table = _alloc_table(cpu)
    kvm.mmu_lock.lock(cpu, how)
    return table


def kvm_tdp_mmu_recover_huge_pages(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> None:
    """kvm_tdp_mmu_recover_huge_pages(), before 6.13 kvm_tdp_mmu_zap_collapsible_sptes(): make the slot's
    tables huge again.  Decision huge_recovery.  Under mmu_lock for read."""
    assert cpu.mmu_lock_held == READ
    in_place = kvm.policy.huge_recovery(cpu, kvm) == "in-place"
    for root in for_each_tdp_mmu_root_yield_safe(cpu, kvm, KVM_VALID_ROOTS, slot.as_id):
        if in_place:
            recover_huge_pages_range(cpu, kvm, root, slot)
        else:
            zap_collapsible_spte_range(cpu, kvm, root, slot)


def recover_huge_pages_range(cpu: Cpu, kvm: Kvm, root: KvmMmuPage, slot: KvmMemorySlot) -> None:
    """recover_huge_pages_range(): replace each table by a huge leaf if the host maps its range huge.

    RCU frees the tables, so the flush must be over before the walk leaves RCU, here and at each yield; or
    before they are given to RCU (decision zap).
    """
    reason = lib.REASON_REMOTE_RECOVER
    it = TdpIter(root, lib.TDP_FIND_TABLE, slot.base_gfn, slot.end_gfn, shared=True, reason=reason)
    flush = False
    with rcu_read_lock(cpu):
        while not it.done:
            if tdp_mmu_iter_cond_resched(cpu, kvm, it, flush):
                flush = False
                continue
            it.step(cpu, kvm)
            entry = _collapsible(cpu, kvm, slot, it)
            if entry is None:
                continue
            huge_spte = tdp_mmu_make_huge_spte(cpu, kvm, slot, entry)
            if huge_spte is None:
                continue
            if not tdp_mmu_set_spte_atomic(cpu, kvm, entry, huge_spte, reason):
                it.retry(entry.gfn)
                continue
            flush = kvm.policy.zap(cpu, kvm) != "flush-per-table"
        if flush and kvm.policy.zap_yield(cpu, kvm) != "unlock-then-flush":
            kvm_flush_remote_tlbs_memslot(cpu, kvm, slot, reason)
            flush = False
    if flush:
        kvm_flush_remote_tlbs_memslot(cpu, kvm, slot, reason)
    walk_ends(cpu, kvm, reason, flushed=True)


def _collapsible(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, it: TdpIter) -> Entry | None:
    """Return the table at which the walk stopped, if its range lies in the slot and the host maps it huge."""
    entry = it.found()
    if entry is None or not slot.base_gfn <= entry.gfn < slot.end_gfn:
        return None
    if kvm_mmu_max_mapping_level(cpu, kvm, slot, entry.gfn) < entry.level:
        return None
    return entry


def tdp_mmu_make_huge_spte(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, parent: Entry) -> int | None:
    """tdp_mmu_make_huge_spte(), make_huge_spte(): build it from the first present child; None without one."""
    table = spte_to_child_pt(parent.spte)
    cpu.point("sptes", (table, 0), "read")
    if not lib.tdp_table_holds(cpu.m, cpu.id, kvm.id, parent.spte, parent.level, parent.gfn):
        return None  # the table was freed during the walk, and that has been reported
    for index in span(SpteIndex(0), SpteIndex(SPTE_ENT_PER_PAGE)):
        small_spte = lib.spte_read(cpu.m, table, index)
        if is_shadow_present_pte(small_spte):
            break
    else:
        return None
    pages = kvm_pages_per_hpage(parent.level)
    first = spte_to_child_pt(small_spte) - index
    if first & (pages - 1):
        return None
    custody = Custody(small_spte >> lib.SPTE_CUSTODY_SHIFT & lib.FRAME_TAG_MASK)
    of_block = huge_custody(cpu, kvm, slot, parent.gfn + index, Hfn(first + index), custody)
    if of_block is None:
        return None
    huge_spte = int(small_spte - (index << _HFN_SHIFT)) | PT_PAGE_SIZE_MASK
    return huge_spte + int(of_block - custody << lib.SPTE_CUSTODY_SHIFT)


def zap_collapsible_spte_range(cpu: Cpu, kvm: Kvm, root: KvmMmuPage, slot: KvmMemorySlot) -> None:
    """zap_collapsible_spte_range(), before 6.13: zap each such table, with a flush for each."""
    it = TdpIter(root, lib.TDP_FIND_TABLE, slot.base_gfn, slot.end_gfn, shared=True)
    with rcu_read_lock(cpu):
        while not it.done:
            if tdp_mmu_iter_cond_resched(cpu, kvm, it, flush=False):
                continue
            it.step(cpu, kvm)
            entry = _collapsible(cpu, kvm, slot, it)
            if entry is not None and not tdp_mmu_zap_spte_atomic(cpu, kvm, entry, lib.REASON_REMOTE_RECOVER):
                it.retry(entry.gfn)
