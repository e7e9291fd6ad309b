"""Masks and generations that record per root which pCPUs have flushed it, so that flushes can be elided.

Proposed on the list in August 2025 as root.cpu_flushed_mask; here with two repairs.  All three variants state
of a root and a pCPU: this pCPU has dropped the entries that it had cached under the root's EP4TA, and no
entry that it may have cached since is stale.  A remote flush makes this statement false for every pCPU on
which no vCPU of the VM services its request, because entries stay there.  The flusher itself therefore resets
the records of all pCPUs, after the SPTEs have changed and before any vCPU can have serviced the request
(kvm_flush_remote_tlbs).

    flusher                                vCPU, coming to a pCPU
    SPTEs change                           mask or generation is read
    masks are cleared, generations move    INVEPT, if that says so
    requests are made                      mode = IN_GUEST_MODE
    vCPUs are kicked                       requests are read

A vCPU that reads before the flusher clears finds the request later; a vCPU that reads afterwards flushes.

The flush is recorded before the INVEPT, with preemption disabled over both, so that no other vCPU runs on the
pCPU in between.  A flusher that clears in between only makes the next flush superfluous.  (A generation may
be recorded after the INVEPT if it was read before; a bit may not be set after it.)
"""

from __future__ import annotations

from emulator.kvm.decisions import Tracking
from emulator.kvm.mmu.structs import KvmMmu, KvmMmuRootInfo, RootTracking
from emulator.kvm.structs import Kvm, Vcpu
from emulator.machine.runtime import Cpu
from native import lib


def mmu_roots(mmu: KvmMmu) -> list[KvmMmuRootInfo]:
    """Return the roots that can become current without kvm_mmu_load."""
    return [root for root in (mmu.root, *mmu.prev_roots) if root is not None]


def active_roots(vcpu: Vcpu) -> list[KvmMmuRootInfo]:
    """Return the roots of root_mmu and guest_mmu.  (nested_mmu never maps anything into a TLB.)"""
    return mmu_roots(vcpu.root_mmu) + mmu_roots(vcpu.guest_mmu)


def alloc_root_cpu_mask(cpu: Cpu, kvm: Kvm) -> RootTracking | None:
    """kvm_x86_call(alloc_root_cpu_mask): make the records of a new root, which no pCPU has flushed yet."""
    if not kvm.tracks_roots:
        return None
    return RootTracking(cpu.machine.pcpus)


def roots_tlb_changed(cpu: Cpu, kvm: Kvm) -> None:
    """Reset the records of every pCPU and every linked root of this VM, because a remote flush is due.

    Linked roots suffice, because a zap finds SPTEs through them only; invalid roots among them do no harm.
    atomic64_inc_return() is also the barrier before the modes of the vCPUs are read.
    """
    cpu.point("tdp_mmu_roots", kvm.id, "read")
    for root in kvm.tdp_mmu_roots:
        if root.tracking is not None:
            cpu.point("root_tlb", root.hfn, "write")
            lib.bitmap_clear(root.tracking.cpu_clean_mask, root.tracking.words)
            cpu.point("root_tlb", root.hfn, "write")
            lib.atomic64_inc_return(root.tracking.tlb_gen)


def test_and_set_flushed(cpu: Cpu, root: KvmMmuRootInfo, how: Tracking) -> bool:
    """Return whether `cpu` has flushed `root` already; if not, record that it has.

    The caller then executes the INVEPT at once, with preemption disabled.  `how`: the answer to decision
    `migration`.  A root without a shadow page has no record, and must be flushed.
    """
    tracking = None if root.sp is None else root.sp.tracking
    if tracking is None:
        return False
    cpu.point("root_tlb", root.hfn, "write")
    if how == "cpu-flushed-mask":
        return bool(lib.test_and_set_bit(tracking.cpu_flushed_mask, cpu.id))
    if how == "cpu-flushed-mask-cleared":
        return bool(lib.test_and_set_bit(tracking.cpu_clean_mask, cpu.id))
    gen = lib.atomic64_read(tracking.tlb_gen)
    if tracking.cpu_tlb_gen[cpu.id] == gen:
        return True
    tracking.cpu_tlb_gen[cpu.id] = gen
    return False


def record_flush(cpu: Cpu, kvm: Kvm, roots: list[KvmMmuRootInfo]) -> None:
    """Record that `cpu` is about to flush these roots for another reason than a migration.

    The sketch of 2025 does not record such flushes; a missing bit would only cost a flush.
    """
    if not kvm.tracks_roots:
        return
    for root in roots:
        test_and_set_flushed(cpu, root, "cpu-flushed-mask-cleared")
        test_and_set_flushed(cpu, root, "root-tlb-gen")


def root_tlb_gen_is_old(cpu: Cpu, vcpu: Vcpu) -> bool:
    """Return whether the current root's generation has moved on since this pCPU flushed it.

    Checked last before VM entry, with interrupts off and mode IN_GUEST_MODE, however the root became current:
    by kvm_mmu_load, from the cache or by a move.  If it has moved on, the flush is recorded, and the caller
    executes the INVEPT at once.
    """
    root = vcpu.mmu.root
    return root is not None and not test_and_set_flushed(cpu, root, "root-tlb-gen")
