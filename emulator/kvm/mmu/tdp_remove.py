"""arch/x86/kvm/mmu/tdp_mmu.c: tables that have lost their link, taken apart and freed (handle_removed_pt()).

Their pages are freed by RCU callbacks.  Guest mode is no RCU read section, so RCU alone does not keep a CPU
from walking a free page; a flush between the loss of the link and the callback does.  Decision zap: where
that flush comes, and how many there are.
"""

from __future__ import annotations

from emulator.kvm.kvm_host import SPTE_ENT_PER_PAGE, kvm_pages_per_hpage
from emulator.kvm.mmu.spte import FROZEN_SPTE, is_last_spte
from emulator.kvm.mmu.tdp_iter import Entry
from emulator.kvm.notifications import walk_ends
from emulator.kvm.structs import Kvm
from emulator.kvm.virt.requests import kvm_flush_remote_tlbs_range
from emulator.machine.runtime import Cpu, cpu_relax
from native import ffi, lib
from native.types import FlushReason, Gfn, Hfn


def handle_removed_pt(cpu: Cpu, kvm: Kvm, entry: Entry, shared: bool, reason: FlushReason) -> None:
    """handle_removed_pt(): freeze all entries of the unlinked table at `entry` and of the tables below it.

    Each page goes to RCU; children come before their parent.  The removal does not yield.  An entry that is
    already frozen will still be written by the thread that froze it, so the removal waits for that write.
    """
    removal = ffi.new("struct tdp_removal *")
    cpu.check(
        lib.tdp_removal_begin(cpu.m, cpu.id, kvm.id, removal, entry.spte, entry.level, entry.gfn, shared)
    )
    removal.single = kvm.params.single
    removal.set_pfn = sets_pfn(cpu, kvm)
    # One table per call: other CPUs still see its entries change one by one, as on a real machine.
    most = 1 if kvm.params.chunk == 1 and not kvm.params.single else SPTE_ENT_PER_PAGE
    while removal.level:
        cpu.point("spte", (removal.table[removal.level], removal.index[removal.level]), "write")
        rc = lib.tdp_removal_step(cpu.m, cpu.id, kvm.id, removal, most)
        if rc == lib.MACHINE_AGAIN:
            cpu_relax(cpu)
            continue
        cpu.check(rc)
        if removal.page:
            pages = kvm_pages_per_hpage(removal.page_level + 1)
            removed_page(cpu, kvm, removal.page, removal.gfn - pages, pages, reason)


def removed_page(
    cpu: Cpu,
    kvm: Kvm,
    table: Hfn,
    gfn: Gfn,
    pages: int,
    reason: FlushReason,
) -> None:
    """Flush for a removed table page that mapped `pages` from `gfn` on, and give it to RCU.  Decision zap.

    With rcu-proxy the caller owes a flush before it leaves RCU.
    """
    answer = kvm.policy.zap(cpu, kvm)
    if answer == "done":
        if kvm.heard.table_removed is not None:
            kvm.heard.table_removed(cpu, kvm, table)
        return
    if answer != "rcu-proxy":
        kvm_flush_remote_tlbs_range(cpu, kvm, gfn, pages, reason)
    tdp_mmu_free_sp_rcu(cpu, table)


def tdp_mmu_set_spte(cpu: Cpu, kvm: Kvm, entry: Entry, new_spte: int) -> None:
    """tdp_mmu_set_spte(): store an SPTE under mmu_lock for write, or as the thread that froze it."""
    assert cpu.rcu_depth, "suspicious RCU usage: an SPTE is stored outside of a read section"
    cpu.point("spte", (entry.table, entry.index), "write")
    lib.tdp_mmu_set_spte(cpu.m, cpu.id, kvm.id, entry.table, entry.index, entry.level, entry.gfn, new_spte)


def tdp_mmu_zap_frozen(cpu: Cpu, kvm: Kvm, entry: Entry, reason: FlushReason) -> None:
    """Do the rest of tdp_mmu_zap_spte_atomic() for `entry`, a leaf or a link to a table, now FROZEN.

    Flush, then clear the SPTE so that faults may use it, then take a table apart: after the flush no CPU can
    reach the table, so its pages may go to RCU at once.  Or take the table apart before the flush, which
    RCU's read section makes as good.  Decision frozen_zap.
    """
    table = not is_last_spte(entry.spte, entry.level)
    tables_first = table and kvm.policy.frozen_zap(cpu, kvm) == "tables-first"
    if tables_first:
        handle_removed_pt(cpu, kvm, entry, shared=True, reason=reason)
    kvm_flush_remote_tlbs_range(cpu, kvm, entry.gfn, kvm_pages_per_hpage(entry.level), reason)
    tdp_mmu_set_spte(cpu, kvm, entry, 0)
    if table and not tables_first:
        handle_removed_pt(cpu, kvm, entry, shared=True, reason=reason)
    if table:
        walk_ends(cpu, kvm, reason, flushed=True)


def tdp_mmu_zap_spte_atomic(cpu: Cpu, kvm: Kvm, entry: Entry, reason: FlushReason) -> bool:
    """tdp_mmu_zap_spte_atomic(), 5.13 to 6.12: freeze the SPTE until the flush is over.

    So no fault installs a translation while stale ones exist.  Return False if the SPTE changed.
    """
    cpu.point("spte", (entry.table, entry.index), "write")
    rc = lib.tdp_mmu_set_spte_atomic(
        cpu.m, cpu.id, kvm.id, entry.table, entry.index, entry.level, entry.gfn, entry.spte, FROZEN_SPTE
    )
    if rc == lib.MACHINE_AGAIN:
        return False
    cpu.check(rc)
    tdp_mmu_zap_frozen(cpu, kvm, entry, reason)
    return True


def tdp_mmu_free_sp_rcu(cpu: Cpu, table: Hfn) -> None:
    """call_rcu(&sp->rcu_head, tdp_mmu_free_sp_rcu_callback)"""
    cpu.point("call_rcu", table, "write")
    cpu.check(lib.ept_table_free_rcu(cpu.m, cpu.id, table))


def sets_pfn(cpu: Cpu, kvm: Kvm) -> bool:
    """Return whether KVM marks the host pages of zapped leafs dirty and accessed.  Decision zapped_pfn."""
    return kvm.policy.zapped_pfn(cpu, kvm) == "set-dirty-accessed"


def tables_need_a_flush(cpu: Cpu, kvm: Kvm) -> bool:
    """Return whether a table that was removed waits for the caller's flush."""
    return kvm.policy.zap(cpu, kvm) == "rcu-proxy"
