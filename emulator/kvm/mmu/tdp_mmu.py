"""arch/x86/kvm/mmu/tdp_mmu.c: zaps of ranges, of roots, of everything.  Tables are freed by RCU callbacks."""

from __future__ import annotations

from collections.abc import Iterable

from emulator.kvm.mmu.structs import KvmMmuPage
from emulator.kvm.mmu.tdp_iter import TdpIter, tdp_mmu_iter_cond_resched
from emulator.kvm.mmu.tdp_remove import (
    tables_need_a_flush,
)
from emulator.kvm.mmu.tdp_roots import (
    KVM_ALL_ROOTS,
    KVM_VALID_ROOTS,
    changed_roots,
    flush_workqueue,
    for_each_tdp_mmu_root_rcu,
    for_each_tdp_mmu_root_yield_safe,
    kvm_tdp_mmu_invalidate_roots,
    kvm_tdp_mmu_put_root,
)
from emulator.kvm.mmu.tdp_zap import tdp_mmu_zap_root, tdp_mmu_zap_step
from emulator.kvm.notifications import walk_ends
from emulator.kvm.structs import Kvm, KvmMemorySlot
from emulator.kvm.virt.requests import kvm_flush_remote_tlbs
from emulator.machine.runtime import WRITE, Cpu, rcu_read_lock
from native import lib
from native.types import FlushReason, Gfn


def kvm_tdp_mmu_zap_invalidated_roots(cpu: Cpu, kvm: Kvm, shared: bool) -> None:
    """kvm_tdp_mmu_zap_invalidated_roots(): zap each invalidated root, then put the TDP MMU's reference.

    In this order mmu_notifiers find the root as long as it has SPTEs.  No flush since 5.18: the vCPUs were
    kicked off these roots, and loading a new root on one of their pages flushes.  Decision invalid_root_zap.
    """
    flush = False
    with kvm.mmu_lock.read_lock(cpu) if shared else kvm.mmu_lock.write_lock(cpu):
        for root in for_each_tdp_mmu_root_yield_safe(cpu, kvm, KVM_ALL_ROOTS):
            if not root.tdp_mmu_scheduled_root_to_zap:
                continue
            root.tdp_mmu_scheduled_root_to_zap = False
            flush |= tdp_mmu_zap_root(cpu, kvm, root, shared)
            kvm_tdp_mmu_put_root(cpu, kvm, root)
        if flush:
            kvm_flush_remote_tlbs(cpu, kvm, lib.REASON_REMOTE_ZAP)
    flush_workqueue(cpu, kvm)


def kvm_tdp_mmu_zap_all(cpu: Cpu, kvm: Kvm) -> None:
    """kvm_tdp_mmu_zap_all(): zap all roots at VM teardown, under mmu_lock for write.

    No flush is needed, because no vCPU can run the guest any more.
    """
    assert cpu.mmu_lock_held == WRITE
    for root in for_each_tdp_mmu_root_yield_safe(cpu, kvm, KVM_ALL_ROOTS):
        tdp_mmu_zap_root(cpu, kvm, root, shared=False)


def tdp_mmu_zap_leafs(
    cpu: Cpu,
    kvm: Kvm,
    root: KvmMmuPage,
    start: Gfn,
    end: Gfn,
    *,
    can_yield: bool,
    flush: bool,
    reason: FlushReason,
) -> bool:
    """tdp_mmu_zap_leafs(), before 5.18 zap_gfn_range(): zap; return whether a flush is pending, including one
    handed in.

    Decision zap_scope: zap only leafs; or, as before 5.18, also tables wholly inside the range.  With tables,
    the flush must be over before the walk leaves RCU, because callbacks free them, unless each table has a
    flush of its own or is left to the policy (decision zap).  With leafs alone it is enough that the caller
    flushes before it drops mmu_lock.
    """
    assert cpu.mmu_lock_held == WRITE
    tables_too = kvm.policy.zap_scope(cpu, kvm) == "leafs-and-tables"
    walk = lib.TDP_ZAP_RANGE if tables_too else lib.TDP_ZAP_LEAFS
    it = TdpIter(root, walk, start, end, shared=False, reason=reason)
    with rcu_read_lock(cpu):
        while not it.done:
            if can_yield and tdp_mmu_iter_cond_resched(cpu, kvm, it, flush):
                flush = False
                continue
            # Zapping SPTEs in invalid roots needs no flush: see kvm_tdp_mmu_zap_invalidated_roots.  Decision
            # invalid_roots.
            if tdp_mmu_zap_step(cpu, kvm, it) and (
                not root.role.invalid or kvm.policy.invalid_roots(cpu, kvm) == "include"
            ):
                flush = True
        if walk_ends(cpu, kvm, reason, flushed=False, can_yield=can_yield):
            flush = False
        if tables_too and flush and _flushes_inside_rcu(cpu, kvm):
            kvm_flush_remote_tlbs(cpu, kvm, reason)
            flush = False
    return flush


def _flushes_inside_rcu(cpu: Cpu, kvm: Kvm) -> bool:
    """Return whether the walk must flush before it leaves RCU (zap=rcu-proxy).

    Other policies have flushed for each table by then, and the caller flushes once more.
    """
    return kvm.policy.zap_yield(cpu, kvm) == "flush-then-unlock" and tables_need_a_flush(cpu, kvm)


def _zap_leafs_of(
    cpu: Cpu,
    kvm: Kvm,
    roots: Iterable[KvmMmuPage],
    start: Gfn,
    end: Gfn,
    flush: bool,
    reason: FlushReason,
    can_yield: bool,
) -> bool:
    """Zap the range in all these roots, threading the pending flush through; return whether it is pending.

    A flush that was handed in and then made at a yield is no longer pending.
    """
    for root in roots:
        flush = tdp_mmu_zap_leafs(cpu, kvm, root, start, end, can_yield=can_yield, flush=flush, reason=reason)
    cpu.stat(kvm.id, lib.STAT_ZAPS)
    return flush


def kvm_tdp_mmu_zap_leafs(cpu: Cpu, kvm: Kvm, start: Gfn, end: Gfn, flush: bool, reason: FlushReason) -> bool:
    """kvm_tdp_mmu_zap_leafs(): zap the range in all valid roots; return whether a flush is pending.

    Decision invalid_roots.
    """
    roots = for_each_tdp_mmu_root_yield_safe(cpu, kvm, changed_roots(cpu, kvm))
    return _zap_leafs_of(cpu, kvm, roots, start, end, flush, reason, can_yield=True)


def kvm_tdp_mmu_unmap_gfn_range(
    cpu: Cpu,
    kvm: Kvm,
    slot: KvmMemorySlot,
    start: Gfn,
    end: Gfn,
    flush: bool,
    reason: FlushReason,
    may_block: bool = True,
) -> bool:
    """kvm_tdp_mmu_unmap_gfn_range(): zap the range for mmu_notifiers, in the slot's address space.

    Invalid roots are included, because no SPTE may map the host's page any more.
    """
    roots = for_each_tdp_mmu_root_yield_safe(cpu, kvm, KVM_ALL_ROOTS, slot.as_id)
    return _zap_leafs_of(cpu, kvm, roots, start, end, flush, reason, may_block)


def kvm_tdp_mmu_age_gfn_range(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, start: Gfn, end: Gfn) -> bool:
    """kvm_tdp_mmu_age_gfn_range(): return whether the guest used the range since the last call.

    Decision age_lock: one RCU read section keeps roots and tables, and the walk takes no references, which it
    could not put without mmu_lock.  A caller that holds mmu_lock for write, as before 6.15, includes invalid
    roots, as before 6.13.

    No flush (since 6.13): a translation that stays in a TLB makes a used page look unused, which costs
    little.  As a consequence, an SPTE without a permission does not prove that no TLB has it.
    """
    walk = lib.TDP_AGE if kvm.params.eptad else lib.TDP_ACCESS_TRACK
    locked = cpu.mmu_lock_held == WRITE
    types = KVM_ALL_ROOTS if locked else KVM_VALID_ROOTS
    young = False
    with rcu_read_lock(cpu):
        for root in for_each_tdp_mmu_root_rcu(cpu, kvm, types, slot.as_id):
            it = TdpIter(root, walk, start, end, shared=not locked)
            while not it.done:
                it.step(cpu, kvm)
                young |= it.chunk.young > 0
    return young


def kvm_mmu_uninit_tdp_mmu(cpu: Cpu, kvm: Kvm) -> None:
    """kvm_mmu_uninit_tdp_mmu(): put the TDP MMU's own references, and with them free the last roots."""
    with kvm.mmu_lock.write_lock(cpu):
        kvm_tdp_mmu_invalidate_roots(cpu, kvm)
    kvm_tdp_mmu_zap_invalidated_roots(cpu, kvm, shared=False)
    if kvm.tdp_mmu_roots:
        raise AssertionError(f"{kvm!r} ends with roots {kvm.tdp_mmu_roots}")
    cpu.check(lib.rcu_barrier(cpu.m, cpu.id))
