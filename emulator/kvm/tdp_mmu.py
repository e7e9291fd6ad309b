"""arch/x86/kvm/mmu/tdp_mmu.c: the life of roots, and zaps.

A root is found through kvm.tdp_mmu_roots as long as somebody holds a reference: each vCPU that uses it, and
the TDP MMU itself until the root is invalidated.  Its pages are freed by RCU callbacks, never at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from emulator.kvm.kvm_host import PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K
from emulator.kvm.requests import kvm_flush_remote_tlbs
from emulator.kvm.structs import Kvm, KvmMmuPage, KvmMmuPageRole
from emulator.kvm.tdp_iter import TdpIter, tdp_mmu_iter_cond_resched
from emulator.runtime import WRITE, Cpu, rcu_read_lock
from native import lib

# enum kvm_tdp_mmu_root_types
KVM_VALID_ROOTS: Final = 1
KVM_INVALID_ROOTS: Final = 2
KVM_ALL_ROOTS: Final = KVM_VALID_ROOTS | KVM_INVALID_ROOTS


def kvm_tdp_mmu_get_root(cpu: Cpu, root: KvmMmuPage) -> bool:
    """kvm_tdp_mmu_get_root(): False if the last reference is gone."""
    return root.root_count.inc_not_zero(cpu)


def kvm_tdp_mmu_put_root(cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> None:
    """kvm_tdp_mmu_put_root(): the last one unlinks the root and leaves its page to RCU.  No flush, no zap:
    whoever makes the page a root again flushes when it is loaded (kvm_mmu_load)."""
    if not root.root_count.dec_and_test(cpu):
        return
    if not root.role.invalid:
        raise AssertionError(f"KVM_BUG_ON: the last reference of valid {root!r} was put")
    with kvm.tdp_mmu_pages_lock.held(cpu):
        kvm.tdp_mmu_roots = tuple(other for other in kvm.tdp_mmu_roots if other is not root)
    cpu.event(lib.EVENT_ROOT_FREE, root.hfn, kvm.id)
    cpu.check(lib.ept_table_free_rcu(cpu.m, cpu.id, root.hfn))


def tdp_mmu_next_root(cpu: Cpu, kvm: Kvm, prev: KvmMmuPage | None, types: int) -> KvmMmuPage | None:
    """tdp_mmu_next_root(): takes a reference on the next root of these types, then drops that on `prev`."""
    roots = kvm.tdp_mmu_roots
    found = None
    for root in roots if prev is None else roots[roots.index(prev) + 1 :]:
        kind = KVM_INVALID_ROOTS if root.role.invalid else KVM_VALID_ROOTS
        if kind & types and kvm_tdp_mmu_get_root(cpu, root):
            found = root
            break
    if prev is not None:
        kvm_tdp_mmu_put_root(cpu, kvm, prev)
    return found


def for_each_tdp_mmu_root_yield_safe(cpu: Cpu, kvm: Kvm, types: int) -> Iterator[KvmMmuPage]:
    """for_each_tdp_mmu_root_yield_safe(): mmu_lock may be dropped in the loop.

    Loops run to the end (leaving one early would keep a reference); an exception leaves the reference,
    which only happens when the machine stops.
    """
    root = tdp_mmu_next_root(cpu, kvm, None, types)
    while root is not None:
        yield root
        root = tdp_mmu_next_root(cpu, kvm, root, types)


def kvm_tdp_mmu_find_root(cpu: Cpu, kvm: Kvm, role: KvmMmuPageRole) -> KvmMmuPage | None:
    """A valid root of that role, with a reference."""
    for root in kvm.tdp_mmu_roots:
        if root.role == role and kvm_tdp_mmu_get_root(cpu, root):
            return root
    return None


def kvm_tdp_mmu_alloc_root(cpu: Cpu, kvm: Kvm, role: KvmMmuPageRole) -> KvmMmuPage:
    """kvm_tdp_mmu_alloc_root(): a valid root of this role, found or new, with a reference for the caller.

    May be invalidated before the caller stores it: then KVM_REQ_MMU_FREE_OBSOLETE_ROOTS is pending and
    keeps the vCPU from entering with it.  Raises OutOfFrames.
    """
    with kvm.mmu_lock.read_lock(cpu):
        root = kvm_tdp_mmu_find_root(cpu, kvm, role)
        if root is not None:
            return root
        with kvm.tdp_mmu_pages_lock.held(cpu):
            root = kvm_tdp_mmu_find_root(cpu, kvm, role)
            if root is not None:
                return root
            hfn = cpu.check(lib.ept_table_alloc(cpu.m, cpu.id, lib.FRAME_ROOT))
            root = KvmMmuPage(hfn, role)
            cpu.stat(kvm.id, lib.STAT_ROOTS_ALLOCATED)
            cpu.point("tdp_mmu_roots", kvm.id, "write")
            kvm.tdp_mmu_roots = (root, *kvm.tdp_mmu_roots)
            return root


def kvm_tdp_mmu_invalidate_roots(cpu: Cpu, kvm: Kvm) -> None:
    """kvm_tdp_mmu_invalidate_roots(), under mmu_lock for write: from here on nobody finds them or maps into
    them.  The TDP MMU's own references pass to kvm_tdp_mmu_zap_invalidated_roots."""
    assert cpu.mmu_lock_held == WRITE
    for root in kvm.tdp_mmu_roots:
        if not root.role.invalid:
            cpu.point("role", root.hfn, "write")
            root.tdp_mmu_scheduled_root_to_zap = True
            root.invalidate()


def kvm_tdp_mmu_zap_invalidated_roots(cpu: Cpu, kvm: Kvm, shared: bool) -> None:
    """kvm_tdp_mmu_zap_invalidated_roots(): zap what was invalidated, then put the TDP MMU's reference; in
    this order, so that mmu_notifiers find the root while its SPTEs are there.

    No flush: the vCPUs were kicked off these roots, and a new life of their pages begins with one.
    """
    with kvm.mmu_lock.read_lock(cpu) if shared else kvm.mmu_lock.write_lock(cpu):
        for root in for_each_tdp_mmu_root_yield_safe(cpu, kvm, KVM_ALL_ROOTS):
            if not root.tdp_mmu_scheduled_root_to_zap:
                continue
            root.tdp_mmu_scheduled_root_to_zap = False
            tdp_mmu_zap_root(cpu, kvm, root, shared)
            kvm_tdp_mmu_put_root(cpu, kvm, root)


def tdp_mmu_zap_root(cpu: Cpu, kvm: Kvm, root: KvmMmuPage, shared: bool) -> None:
    """tdp_mmu_zap_root(): level by level, so that no single step removes a deep tree."""
    with rcu_read_lock(cpu):
        for zap_level in (PG_LEVEL_4K, PG_LEVEL_2M, PG_LEVEL_1G, root.role.level):
            _tdp_mmu_zap_root(cpu, kvm, root, shared, zap_level)


def _tdp_mmu_zap_root(cpu: Cpu, kvm: Kvm, root: KvmMmuPage, shared: bool, zap_level: int) -> None:
    """__tdp_mmu_zap_root()"""
    end = 1 << (9 * root.role.level)  # tdp_mmu_max_gfn_exclusive()
    it = TdpIter(root, lib.TDP_ZAP_LEVEL, 0, end, shared=shared, level=zap_level)
    while not it.done:
        if tdp_mmu_iter_cond_resched(cpu, kvm, it, flush=False):
            continue
        it.step(cpu, kvm)


def kvm_tdp_mmu_zap_all(cpu: Cpu, kvm: Kvm) -> None:
    """kvm_tdp_mmu_zap_all(): VM teardown, under mmu_lock for write.  No flush: nobody can run the guest."""
    assert cpu.mmu_lock_held == WRITE
    for root in for_each_tdp_mmu_root_yield_safe(cpu, kvm, KVM_ALL_ROOTS):
        tdp_mmu_zap_root(cpu, kvm, root, shared=False)


def tdp_mmu_zap_leafs(
    cpu: Cpu,
    kvm: Kvm,
    root: KvmMmuPage,
    start: int,
    end: int,
    *,
    can_yield: bool,
    flush: bool,
    reason: int,
) -> bool:
    """tdp_mmu_zap_leafs(): returns whether a flush is pending; one handed in is included.

    Decision zap_scope: only leafs go; or, as to 5.17, tables wholly inside the range too.  Then the flush
    must be over before RCU is left, because callbacks free the tables; with leafs alone it is enough that the
    caller flushes before it drops mmu_lock.
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
            # Zapping SPTEs in invalid roots needs no flush: see kvm_tdp_mmu_zap_invalidated_roots.
            if it.step(cpu, kvm) and not root.role.invalid:
                flush = True
        if tables_too and flush and kvm.policy.zap_yield(cpu, kvm) == "flush-then-unlock":
            kvm_flush_remote_tlbs(cpu, kvm, reason)
            flush = False
    return flush


def kvm_tdp_mmu_zap_leafs(cpu: Cpu, kvm: Kvm, start: int, end: int, flush: bool, reason: int) -> bool:
    """kvm_tdp_mmu_zap_leafs(): all valid roots; the pending flush is threaded through (see a835429cda91)."""
    for root in for_each_tdp_mmu_root_yield_safe(cpu, kvm, KVM_VALID_ROOTS):
        flush = tdp_mmu_zap_leafs(cpu, kvm, root, start, end, can_yield=True, flush=flush, reason=reason)
    cpu.stat(kvm.id, lib.STAT_ZAPS)
    return flush


def kvm_tdp_mmu_unmap_gfn_range(
    cpu: Cpu, kvm: Kvm, start: int, end: int, flush: bool, reason: int, may_block: bool = True
) -> bool:
    """kvm_tdp_mmu_unmap_gfn_range(): for mmu_notifiers; invalid roots too, the host's page must go
    from everywhere."""
    for root in for_each_tdp_mmu_root_yield_safe(cpu, kvm, KVM_ALL_ROOTS):
        flush = tdp_mmu_zap_leafs(cpu, kvm, root, start, end, can_yield=may_block, flush=flush, reason=reason)
    cpu.stat(kvm.id, lib.STAT_ZAPS)
    return flush
