"""arch/x86/kvm/mmu/tdp_mmu.c: the life of roots.

kvm.tdp_mmu_roots lists a root as long as it has references: one of each vCPU that uses it, and the TDP MMU's
own until the root is invalidated.  Its page is freed by an RCU callback, never at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Final

from emulator.kvm.mmu.structs import KvmMmuPage, KvmMmuPageRole
from emulator.kvm.mmu.tdp_zap import tdp_mmu_zap_root
from emulator.kvm.structs import Kvm
from emulator.kvm.virt.requests import kvm_flush_remote_tlbs
from emulator.machine.runtime import READ, WRITE, Cpu
from native import lib
from native.types import Hfn

# enum kvm_tdp_mmu_root_types
KVM_VALID_ROOTS: Final = 1
KVM_INVALID_ROOTS: Final = 2
KVM_ALL_ROOTS: Final = KVM_VALID_ROOTS | KVM_INVALID_ROOTS
# as_id of the iterators: both address spaces.
ALL_ADDRESS_SPACES: Final = -1

# --- references ---------------------------------------------------------------------------------------------


def root_lock(cpu: Cpu, kvm: Kvm) -> AbstractContextManager[None]:
    """Return mmu_lock, to be held as vCPUs hold it that take or drop roots.  Decision root_lock."""
    if kvm.policy.root_lock(cpu, kvm) == "read":
        return kvm.mmu_lock.read_lock(cpu)
    return kvm.mmu_lock.write_lock(cpu)


def kvm_tdp_mmu_get_root(cpu: Cpu, root: KvmMmuPage) -> bool:
    """kvm_tdp_mmu_get_root(): take a reference; return False if the last one is gone."""
    return root.tdp_mmu_root_count.inc_not_zero(cpu)


def kvm_tdp_mmu_put_root(cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> None:
    """kvm_tdp_mmu_put_root(), under mmu_lock: drop a reference; the last put unlinks the root and leaves its
    page to RCU.

    Decision root_put.  No flush is needed, because kvm_mmu_load() flushes when the page is loaded as a root
    again.  No zap is needed either if the TDP MMU holds a reference of its own, which it puts only after the
    root was invalidated and zapped.
    """
    assert cpu.mmu_lock_held
    if not root.tdp_mmu_root_count.dec_and_test(cpu):
        return
    if kvm.heard.root_released is not None:
        kvm.heard.root_released(cpu, kvm, root)
    answer = kvm.policy.root_put(cpu, kvm, root)
    if answer == "async":
        if not root.role.invalid:
            tdp_mmu_schedule_zap_root(cpu, kvm, root)
            return
    elif answer == "inline":
        _unlink_root(cpu, kvm, root)
        _zap_unlinked_root(cpu, kvm, root)
        _free_root(cpu, kvm, root)
        return
    elif not root.role.invalid:
        raise AssertionError(f"KVM_BUG_ON: the last reference of valid {root!r} was put")
    if answer == "flush":
        kvm_flush_remote_tlbs(cpu, kvm, lib.REASON_ROOT_PUT)
    _unlink_root(cpu, kvm, root)
    _free_root(cpu, kvm, root)


def _unlink_root(cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> None:
    with kvm.tdp_mmu_pages_lock.held(cpu):
        cpu.point("tdp_mmu_roots", kvm.id, "write")
        kvm.tdp_mmu_roots = tuple(other for other in kvm.tdp_mmu_roots if other is not root)


def _free_root(cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> None:
    cpu.event(lib.EVENT_ROOT_FREE, root.hfn, 0, kvm.id)
    cpu.point("call_rcu", root.hfn, "write")
    cpu.check(lib.ept_table_free_rcu(cpu.m, cpu.id, root.hfn))


def _zap_unlinked_root(cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> None:
    """Zap a root that mmu_notifiers do not find any more, as kvm_tdp_mmu_put_root() did before 5.18.

    mmu_notifiers need mmu_lock for write, so the zap does not yield before the whole root is zapped.
    """
    tdp_mmu_zap_root(cpu, kvm, root, shared=cpu.mmu_lock_held == READ, can_yield=False)


# --- the worker of 5.18 to 6.5 ------------------------------------------------------------------------------


def tdp_mmu_schedule_zap_root(cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> None:
    """tdp_mmu_schedule_zap_root() (5.18 to 6.5): invalidate the root, with one reference, for the worker.

    No other reference can be taken: readers use refcount_inc_not_zero()
    (include/linux/refcount.h), writers need mmu_lock.
    """
    root.invalidate()
    cpu.event(lib.EVENT_ROOT_INVALID, root.hfn, 0, kvm.id)
    root.tdp_mmu_root_count.value = 1
    kvm.tdp_mmu_zap_works.append(root)


def tdp_mmu_zap_root_work(cpu: Cpu, kvm: Kvm) -> bool:
    """tdp_mmu_zap_root_work() (5.18 to 6.5): zap one root and drop the reference, on the worker's thread.

    Return False if no root was scheduled.
    """
    try:
        root = kvm.tdp_mmu_zap_works.popleft()
    except IndexError:
        return False
    with kvm.mmu_lock.read_lock(cpu):
        tdp_mmu_zap_root(cpu, kvm, root, shared=True)
        kvm_tdp_mmu_put_root(cpu, kvm, root)
    return True


def flush_workqueue(cpu: Cpu, kvm: Kvm) -> None:
    """flush_workqueue(kvm->arch.tdp_mmu_zap_wq): do the worker's work on the thread that waits for it."""
    while tdp_mmu_zap_root_work(cpu, kvm):
        pass


# --- iteration ----------------------------------------------------------------------------------------------


def root_matches(root: KvmMmuPage, types: int, as_id: int) -> bool:
    """tdp_mmu_root_match()"""
    if as_id not in (ALL_ADDRESS_SPACES, root.role.smm):
        return False
    return bool((KVM_INVALID_ROOTS if root.role.invalid else KVM_VALID_ROOTS) & types)


def changed_roots(cpu: Cpu, kvm: Kvm) -> int:
    """Return the types of roots that zaps of ranges and write-protection change.  Decision invalid_roots."""
    return KVM_VALID_ROOTS if kvm.policy.invalid_roots(cpu, kvm) == "skip" else KVM_ALL_ROOTS


def _roots_after(kvm: Kvm, prev: KvmMmuPage | None) -> tuple[KvmMmuPage, ...]:
    """list_for_each_entry_continue_rcu() (include/linux/rculist.h): return the roots behind `prev`, which
    must still be on the list."""
    roots = kvm.tdp_mmu_roots
    if prev is None:
        return roots
    if prev not in roots:
        raise AssertionError(f"KASAN: a walk over the roots goes on from {prev!r}, which was freed")
    return roots[roots.index(prev) + 1 :]


def tdp_mmu_next_root(
    cpu: Cpu, kvm: Kvm, prev: KvmMmuPage | None, types: int, as_id: int = ALL_ADDRESS_SPACES
) -> KvmMmuPage | None:
    """tdp_mmu_next_root(), under mmu_lock: take a reference on the next root of these types, then drop that
    on `prev`."""
    assert cpu.mmu_lock_held
    cpu.point("tdp_mmu_roots", kvm.id, "read")
    found = None
    for root in _roots_after(kvm, prev):
        if root_matches(root, types, as_id) and kvm_tdp_mmu_get_root(cpu, root):
            found = root
            break
    if prev is not None:
        kvm_tdp_mmu_put_root(cpu, kvm, prev)
    return found


def for_each_tdp_mmu_root_yield_safe(
    cpu: Cpu, kvm: Kvm, types: int, as_id: int = ALL_ADDRESS_SPACES
) -> Iterator[KvmMmuPage]:
    """for_each_tdp_mmu_root_yield_safe(): mmu_lock may be dropped in the loop.

    Callers must run the loop to its end, because leaving early keeps a reference.  An exception keeps it,
    too, but occurs only when the machine stops.
    """
    root = tdp_mmu_next_root(cpu, kvm, None, types, as_id)
    while root is not None:
        yield root
        root = tdp_mmu_next_root(cpu, kvm, root, types, as_id)


def for_each_tdp_mmu_root_rcu(
    cpu: Cpu, kvm: Kvm, types: int, as_id: int = ALL_ADDRESS_SPACES
) -> Iterator[KvmMmuPage]:
    """for_each_tdp_mmu_root_rcu(): iterate without references, in one RCU read section, maybe without
    mmu_lock.

    A root may be invalidated, zapped and unlinked in the loop.  Its page stays until the section ends, and an
    unlinked root still leads to the next one (list_del_rcu).
    """
    cpu.point("tdp_mmu_roots", kvm.id, "read")
    roots = kvm.tdp_mmu_roots
    while roots:
        root, roots = roots[0], roots[1:]
        cpu.point("role", root.hfn, "read")
        if root_matches(root, types, as_id):
            yield root
        cpu.point("tdp_mmu_roots", kvm.id, "read")
        now = kvm.tdp_mmu_roots
        if root in now:
            roots = now[now.index(root) + 1 :]


# --- allocation ---------------------------------------------------------------------------------------------


def kvm_tdp_mmu_find_root(cpu: Cpu, kvm: Kvm, role: KvmMmuPageRole) -> KvmMmuPage | None:
    """Return a valid root of that role, with a reference taken, or None."""
    cpu.point("tdp_mmu_roots", kvm.id, "read")
    for root in kvm.tdp_mmu_roots:
        if root.role == role and kvm_tdp_mmu_get_root(cpu, root):
            return root
    return None


def kvm_tdp_mmu_alloc_root(cpu: Cpu, kvm: Kvm, role: KvmMmuPageRole) -> KvmMmuPage:
    """kvm_tdp_mmu_alloc_root(): find or make a valid root of this role; return it with a reference taken.

    It may be invalidated before the caller stores it: then KVM_REQ_MMU_FREE_OBSOLETE_ROOTS is pending and
    keeps the vCPU from entering with it.  Raises OutOfFrames.
    """
    with root_lock(cpu, kvm):
        root = kvm_tdp_mmu_find_root(cpu, kvm, role)
        if root is not None:
            return root
        with kvm.tdp_mmu_pages_lock.held(cpu):
            root = kvm_tdp_mmu_find_root(cpu, kvm, role)
            if root is not None:
                return root
            root = tdp_mmu_init_root(cpu, kvm, role)
            if kvm.heard.root_created is not None:
                kvm.heard.root_created(cpu, kvm, root)
            kvm.policy.root_alloc(cpu, kvm, root)
            cpu.point("tdp_mmu_roots", kvm.id, "write")
            kvm.tdp_mmu_roots = (root, *kvm.tdp_mmu_roots)
            return root


def tdp_mmu_init_root(cpu: Cpu, kvm: Kvm, role: KvmMmuPageRole) -> KvmMmuPage:
    """tdp_mmu_alloc_sp(), tdp_mmu_init_sp()"""
    cpu.point("frames", "root", "write")
    hfn = Hfn(cpu.check(lib.ept_table_alloc(cpu.m, cpu.id, lib.FRAME_ROOT)))
    root = KvmMmuPage(
        hfn,
        role,
        tdp_mmu_page=True,
        parent_spte=lib.make_nonleaf_spte(cpu.m, hfn),
        policy_data=kvm.policy.new_data("root", hfn, cpu.machine.pcpus),
    )
    answer = kvm.policy.root_put(cpu, kvm, root)
    if answer == "async" or answer == "inline":
        root.has_tdp_ref = False
        root.tdp_mmu_root_count.value = 1
    cpu.stat(kvm.id, lib.STAT_ROOTS_ALLOCATED)
    return root


def kvm_tdp_mmu_invalidate_roots(cpu: Cpu, kvm: Kvm) -> None:
    """kvm_tdp_mmu_invalidate_roots(), under mmu_lock for write: invalidate all roots.

    From here on no vCPU finds them or maps into them.  kvm_tdp_mmu_zap_invalidated_roots puts the TDP MMU's
    own references; where the TDP MMU has none, as before 6.4, one is taken here for that.
    """
    assert cpu.mmu_lock_held == WRITE
    for root in kvm.tdp_mmu_roots:
        if root.role.invalid:
            continue
        if not root.has_tdp_ref and not kvm_tdp_mmu_get_root(cpu, root):
            continue
        cpu.point("role", root.hfn, "write")
        root.tdp_mmu_scheduled_root_to_zap = True
        root.invalidate()
        cpu.event(lib.EVENT_ROOT_INVALID, root.hfn, 0, kvm.id)
