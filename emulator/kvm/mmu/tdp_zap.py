"""arch/x86/kvm/mmu/tdp_mmu.c: the steps of a zapping walk, and the zap of a whole root.

The life of roots (tdp_roots.py) and the zaps of ranges (tdp_mmu.py) are built on these.
"""

from __future__ import annotations

from emulator.kvm.kvm_host import PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K, SPTE_LEVEL_BITS
from emulator.kvm.mmu.structs import KvmMmuPage
from emulator.kvm.mmu.tdp_iter import TdpIter, tdp_mmu_iter_cond_resched
from emulator.kvm.mmu.tdp_remove import handle_removed_pt, sets_pfn, tdp_mmu_zap_frozen
from emulator.kvm.notifications import walk_ends
from emulator.kvm.structs import Kvm
from emulator.machine.runtime import Cpu, rcu_read_lock
from native import lib
from native.types import Gfn, Level


def tdp_mmu_zap_root(cpu: Cpu, kvm: Kvm, root: KvmMmuPage, shared: bool, can_yield: bool = True) -> bool:
    """tdp_mmu_zap_root(): zap in passes, small pages first, so that it can yield between small steps.

    Decision zap_root.  Return whether a flush is pending, which the caller makes or not (decision
    invalid_root_zap).
    """
    answer = kvm.policy.zap_root(cpu, kvm, root)
    passes: tuple[Level, ...] = (PG_LEVEL_4K, PG_LEVEL_2M, PG_LEVEL_1G, root.role.level)
    if answer == "1g-root":
        passes = (PG_LEVEL_1G, root.role.level)
    elif answer == "root":
        passes = (root.role.level,)
    flush = False
    with rcu_read_lock(cpu):
        for zap_level in passes:
            flush = _tdp_mmu_zap_root(cpu, kvm, root, shared, zap_level, can_yield, flush)
    return flush


def _tdp_mmu_zap_root(
    cpu: Cpu, kvm: Kvm, root: KvmMmuPage, shared: bool, zap_level: Level, can_yield: bool, flush: bool
) -> bool:
    """__tdp_mmu_zap_root()"""
    end = Gfn(1 << (SPTE_LEVEL_BITS * root.role.level))  # tdp_mmu_max_gfn_exclusive()
    reason = lib.REASON_REMOTE_ZAP
    it = TdpIter(root, lib.TDP_ZAP_LEVEL, Gfn(0), end, shared=shared, level=zap_level, reason=reason)
    while not it.done:
        if can_yield and tdp_mmu_iter_cond_resched(cpu, kvm, it, flush):
            flush = False
            continue
        if tdp_mmu_zap_step(cpu, kvm, it):
            flush = kvm.policy.invalid_root_zap(cpu, kvm, root) == "flush"
    walk_ends(cpu, kvm, reason, flushed=False, can_yield=can_yield)
    return flush


def tdp_mmu_zap_step(cpu: Cpu, kvm: Kvm, it: TdpIter) -> bool:
    """Do one step of a zapping walk; take apart a table that lost its link.  Return whether SPTEs changed.

    Before 6.13 a zap under mmu_lock for read froze each SPTE until a flush of its own was over
    (tdp_mmu_zap_spte_atomic).
    """
    it.chunk.set_pfn = sets_pfn(cpu, kvm)
    it.chunk.freeze = it.shared and kvm.policy.zap(cpu, kvm) != "rcu-proxy"
    changed = it.step(cpu, kvm) > 0
    entry = it.found()
    if entry is None:
        return changed
    if it.chunk.freeze:
        tdp_mmu_zap_frozen(cpu, kvm, entry, it.reason)
    else:
        handle_removed_pt(cpu, kvm, entry, it.shared, it.reason)
    return True
