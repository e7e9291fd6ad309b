"""arch/x86/kvm/mmu/tdp_mmu.c: installing SPTEs for page faults, under mmu_lock held for read.

All changes are compare-and-swap.  A fault that loses the race lets the guest fault again.
"""

from __future__ import annotations

from emulator.kvm.accounting import flush_elided
from emulator.kvm.kvm_host import PG_LEVEL_4K, SPTE_ENT_PER_PAGE, kvm_pages_per_hpage
from emulator.kvm.mmu.fault import (
    RET_PF_FIXED,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
    RET_PF_WRITE_PROTECTED,
    KvmPageFault,
    spte_permission_fault,
)
from emulator.kvm.mmu.spte import (
    is_frozen_spte,
    is_large_pte,
    is_last_spte,
    is_shadow_present_pte,
    leaf_spte_change_needs_tlb_flush,
    make_spte,
    remade_spte,
    root_to_sp,
    spte_to_child_pt,
)
from emulator.kvm.mmu.structs import KvmMmuPage
from emulator.kvm.mmu.tdp_iter import Entry
from emulator.kvm.mmu.tdp_remove import handle_removed_pt, tables_need_a_flush, tdp_mmu_zap_spte_atomic
from emulator.kvm.notifications import walk_ends
from emulator.kvm.structs import Kvm, Vcpu
from emulator.kvm.virt.requests import kvm_flush_remote_tlbs_range
from emulator.machine.runtime import Cpu, rcu_read_lock
from native import lib
from native.types import FlushReason, Gfn, Hfn, Level, SpteIndex


def tdp_entry(cpu: Cpu, root: KvmMmuPage, gfn: Gfn, goal_level: Level) -> Entry:
    """Return the deepest existing entry for gfn, not below goal_level.  Under rcu_read_lock."""
    cpu.point("sptes", (root.hfn, gfn), "read")
    walked = lib.tdp_mmu_get_walk(cpu.m, root.hfn, root.role.level, gfn, cpu.sptes, cpu.tables)
    level = max(walked, goal_level)
    return Entry(cpu.sptes[level], Hfn(cpu.tables[level]), level, gfn & -kvm_pages_per_hpage(level))


def tdp_mmu_set_spte_atomic(
    cpu: Cpu,
    kvm: Kvm,
    entry: Entry,
    new_spte: int,
    reason: FlushReason = lib.REASON_REMOTE_REPLACE,
) -> bool:
    """tdp_mmu_set_spte_atomic(): replace entry.spte by new_spte; return False if the SPTE has changed.

    As handle_changed_spte() does, take apart a table that loses its link, and leave it to RCU.
    """
    cpu.point("spte", (entry.table, entry.index), "write")
    rc = lib.tdp_mmu_set_spte_atomic(
        cpu.m, cpu.id, kvm.id, entry.table, entry.index, entry.level, entry.gfn, entry.spte, new_spte
    )
    if rc == lib.MACHINE_AGAIN:
        return False
    cpu.check(rc)
    if is_shadow_present_pte(entry.spte) and not is_last_spte(entry.spte, entry.level):
        handle_removed_pt(cpu, kvm, entry, shared=True, reason=reason)
    return True


def tdp_mmu_link_sp(cpu: Cpu, kvm: Kvm, entry: Entry) -> Entry | None:
    """tdp_mmu_link_sp() with tdp_mmu_alloc_sp(): link an empty table below `entry`; None if the SPTE
    changed."""
    table = tdp_mmu_alloc_sp(cpu)
    linked = tdp_mmu_set_spte_atomic(cpu, kvm, entry, lib.make_nonleaf_spte(cpu.m, table))
    return _below(cpu, entry, table, linked)


def tdp_mmu_alloc_sp(cpu: Cpu) -> Hfn:
    """tdp_mmu_alloc_sp(), tdp_mmu_alloc_sp_for_split().  Raises OutOfFrames."""
    cpu.point("frames", "table", "write")
    return Hfn(cpu.check(lib.ept_table_alloc(cpu.m, cpu.id, lib.FRAME_TABLE)))


def tdp_mmu_free_unused_sp(cpu: Cpu, table: Hfn) -> None:
    """tdp_mmu_free_unused_sp(), tdp_mmu_free_sp() up to 6.12: free a table that was never linked."""
    cpu.point("frames", "table", "write")
    lib.ept_table_free(cpu.m, cpu.id, table)


def tdp_mmu_split_huge_page(cpu: Cpu, kvm: Kvm, entry: Entry, table: Hfn) -> bool:
    """tdp_mmu_split_huge_page(): replace a huge SPTE by `table` with the same mappings and rights.

    No translation changes, so no flush is needed.  Return False if the SPTE has changed.
    """
    cpu.point("sptes", (table, 0), "write")
    cpu.check(lib.tdp_mmu_fill_split_table(cpu.m, cpu.id, table, entry.spte, entry.level))
    return tdp_mmu_set_spte_atomic(cpu, kvm, entry, lib.make_nonleaf_spte(cpu.m, table))


def _below(cpu: Cpu, entry: Entry, table: Hfn, linked: bool) -> Entry | None:
    """Return the entry in the table below `entry`; or free a table that was not linked, and return None."""
    if not linked:
        tdp_mmu_free_unused_sp(cpu, table)
        return None
    return Entry(0, table, entry.level - 1, entry.gfn)


def _step_down(cpu: Cpu, child: Entry, gfn: Gfn) -> Entry:
    """Move `child` to the entry for gfn in its table, and return it."""
    child.gfn = gfn & -kvm_pages_per_hpage(child.level)
    child.spte = lib.spte_read(cpu.m, child.table, child.index)
    return child


def kvm_tdp_mmu_map(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault) -> int:
    """kvm_tdp_mmu_map(): link or split down to goal_level, then install the leaf.  Raises OutOfFrames.

    Decision fault_split: split or zap a huge leaf above goal_level.
    """
    kvm, root = vcpu.kvm, root_to_sp(vcpu.mmu.root)
    assert root is not None
    with rcu_read_lock(cpu):
        entry = tdp_entry(cpu, root, fault.gfn, fault.goal_level)
        while True:
            if is_frozen_spte(entry.spte):
                cpu.stat(kvm.id, lib.STAT_FROZEN_RETRIES)
                return RET_PF_RETRY
            if entry.level == fault.goal_level:
                return tdp_mmu_map_handle_target_level(cpu, vcpu, fault, entry)
            if is_shadow_present_pte(entry.spte):
                # Present above the goal: a huge leaf, or a table that was linked since the walk.
                if not is_large_pte(entry.spte):
                    child: Entry | None = Entry(0, spte_to_child_pt(entry.spte), entry.level - 1, Gfn(0))
                elif kvm.policy.fault_split(cpu, kvm, fault.gfn) == "split":
                    table = tdp_mmu_alloc_sp(cpu)
                    split = tdp_mmu_split_huge_page(cpu, kvm, entry, table)
                    child = _below(cpu, entry, table, split)
                elif tdp_mmu_zap_spte_atomic(cpu, kvm, entry, lib.REASON_REMOTE_REPLACE):
                    entry.spte = lib.spte_read(cpu.m, entry.table, entry.index)
                    continue
                else:
                    return RET_PF_RETRY
            else:
                child = tdp_mmu_link_sp(cpu, kvm, entry)
            if child is None:
                return RET_PF_RETRY
            entry = _step_down(cpu, child, fault.gfn)


def tdp_mmu_map_handle_target_level(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault, entry: Entry) -> int:
    """tdp_mmu_map_handle_target_level(): install the leaf.

    Decision mapped_fault.  Replacing a non-present SPTE needs no flush.  Replacing a table does, because CPUs
    may still hold pointers to the table page, which RCU frees.  Decision map_replace.  Unless zap=rcu-proxy,
    that flush is made when the table is taken apart.
    """
    kvm, old_spte = vcpu.kvm, entry.spte
    assert fault.slot is not None
    present = is_shadow_present_pte(old_spte)
    last = is_last_spte(old_spte, entry.level)
    remade = False
    if present and last and not spte_permission_fault(fault, old_spte):
        remade = kvm.policy.mapped_fault(cpu, kvm, fault.gfn) == "remake"
        if not remade:
            return RET_PF_SPURIOUS
    new_spte = make_spte(
        cpu, fault.slot, fault.gfn, entry.level, fault.pfn, wrprot=fault.write_protected
    )
    if remade:
        new_spte = remade_spte(kvm, old_spte, new_spte)
    wrprot = fault.write_protected and fault.write
    if new_spte == old_spte:
        return RET_PF_WRITE_PROTECTED if wrprot else RET_PF_SPURIOUS
    if not tdp_mmu_set_spte_atomic(cpu, kvm, entry, new_spte):
        return RET_PF_RETRY
    if present and not last:
        walk_ends(cpu, kvm, lib.REASON_REMOTE_REPLACE, flushed=False)
    if present and (
        leaf_spte_change_needs_tlb_flush(old_spte, new_spte) if last else tables_need_a_flush(cpu, kvm)
    ):
        map_replace_flush(cpu, kvm, entry)
    # A neighbour that is a table of L1's would become writable.
    if fault.around_n and entry.level == PG_LEVEL_4K and not kvm.shadow.indirect_shadow_pages:
        tdp_mmu_map_around(cpu, kvm, fault, entry.table)
    return RET_PF_WRITE_PROTECTED if wrprot else RET_PF_FIXED


def map_replace_flush(cpu: Cpu, kvm: Kvm, entry: Entry) -> None:
    """Flush after a leaf was replaced, or elide it.  Decision map_replace."""
    if kvm.policy.map_replace(cpu, kvm, entry.gfn) == "flush":
        pages = kvm_pages_per_hpage(entry.level)
        kvm_flush_remote_tlbs_range(cpu, kvm, entry.gfn, pages, lib.REASON_REMOTE_REPLACE)
    else:
        flush_elided(cpu, kvm, lib.REASON_REMOTE_REPLACE, entry.gfn)


def tdp_mmu_map_around(cpu: Cpu, kvm: Kvm, fault: KvmPageFault, table: Hfn) -> None:
    """Map the neighbours that faultin looked up, in the same table, where no SPTE is present yet.

    Real KVM prefetches only for shadow paging; without fault-around, storms of zaps crawl.  If a neighbour is
    in a range that is being invalidated, none is mapped, though the faulting gfn is in no such range.
    """
    end = fault.around_gfn + fault.around_n
    cpu.point("mmu_invalidate_seq", kvm.id, "read")
    if kvm.policy.fault_retry(cpu, kvm, fault.gfn) == "invalidate-seq" and lib.mmu_invalidate_retry_range(
        cpu.m, kvm.id, fault.mmu_seq, fault.around_gfn, end
    ):
        return
    index = SpteIndex(fault.around_gfn & (SPTE_ENT_PER_PAGE - 1))
    cpu.point("spte", (table, index), "write")
    cpu.check(
        lib.tdp_mmu_map_around(
            cpu.m,
            cpu.id,
            kvm.id,
            table,
            index,
            fault.around_gfn,
            fault.around_n,
            cpu.hfns,
            cpu.tags,
            cpu.writable,
        )
    )
