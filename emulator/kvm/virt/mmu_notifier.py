"""virt/kvm/kvm_main.c: the mmu_notifier, by which the host takes back pages, or rights to them.

    kvm_mmu_notifier_invalidate_range_start(...)    on return no vCPU uses the range any more
    the host changes its page tables and frees frames
    kvm_mmu_notifier_invalidate_range_end(...)      from here on faults may map the range again

Ranges are host virtual pages, [start, end).
"""

from __future__ import annotations

from emulator.kvm.accounting import flush_elided
from emulator.kvm.kvm_host import KVM_MAX_NR_ADDRESS_SPACES
from emulator.kvm.mmu.mmu import kvm_age_gfn, kvm_mmu_invalidate_start, kvm_unmap_gfn_range
from emulator.kvm.structs import Kvm, KvmMemorySlot
from emulator.kvm.virt.requests import kvm_flush_remote_tlbs
from emulator.kvm.virt.slots import kvm_memslots
from emulator.machine.runtime import Cpu, wake
from native import lib
from native.types import NO_TICKET, CpuId, Gfn, Hva, PromiseKind

GfnRange = tuple[KvmMemorySlot, Gfn, Gfn]


def kvm_for_each_memslot_in_hva_range(cpu: Cpu, kvm: Kvm, start: Hva, end: Hva) -> list[GfnRange]:
    """kvm_for_each_memslot_in_hva_range(), under SRCU: return each slot that the range touches, with gfns.

    All address spaces are searched, and INVALID slots are included.
    """
    ranges = []
    for as_id in range(KVM_MAX_NR_ADDRESS_SPACES):
        for slot in kvm_memslots(cpu, kvm, as_id).slots:
            hva_start = max(start, slot.userspace_addr)
            hva_end = min(end, slot.userspace_addr + slot.npages)
            if hva_start < hva_end:
                ranges.append((slot, slot.hva_to_gfn(hva_start), slot.hva_to_gfn(hva_end)))
    return ranges


def kvm_mmu_notifier_invalidate_range_start(
    cpu: Cpu, kvm: Kvm, start: Hva, end: Hva, promise: PromiseKind = lib.PROMISE_NOTIFIER
) -> None:
    """kvm_mmu_notifier_invalidate_range_start()

    `promise` is the guarantee that the host needs: with PROMISE_NOTIFIER no vCPU uses the range, with
    PROMISE_NOTIFIER_WRITE none writes to it (mprotect, KSM, copy-on-write).  KVM unmaps for both.
    """
    with kvm.mn_invalidate_lock.held(cpu):
        kvm.mn_active_invalidate_count += 1
    index = cpu.check(lib.srcu_read_lock(cpu.m, cpu.id, kvm.id))
    try:
        ranges = kvm_for_each_memslot_in_hva_range(cpu, kvm, start, end)
        if ranges:
            kvm_handle_hva_range(cpu, kvm, ranges)
        for _, gfn_start, gfn_end in ranges:
            lib.oracle_revoke(cpu.m, cpu.id, kvm.id, gfn_start, gfn_end, promise, NO_TICKET)
    finally:
        lib.srcu_read_unlock(cpu.m, cpu.id, kvm.id, index)


def kvm_handle_hva_range(cpu: Cpu, kvm: Kvm, ranges: list[GfnRange]) -> None:
    """kvm_handle_hva_range() with kvm_mmu_unmap_gfn_range(): begin, unmap and flush in one critical section.

    As in the kernel, each slot's handler starts without a pending flush; one flush at the end serves all of
    them.
    """
    with kvm.mmu_lock.write_lock(cpu):
        kvm_mmu_invalidate_start(cpu, kvm, ((start, end) for _, start, end in ranges))
        flush = False
        for slot, gfn_start, gfn_end in ranges:
            lib.mmu_invalidate_range_add(cpu.m, kvm.id, gfn_start, gfn_end)
            flush |= kvm_unmap_gfn_range(cpu, kvm, slot, gfn_start, gfn_end)
        if flush:
            notifier_flush(cpu, kvm, ranges[0][1])


def notifier_flush(cpu: Cpu, kvm: Kvm, gfn: Gfn) -> None:
    """Flush under mmu_lock, before the host goes on; or too late, or never.  Decision notifier_flush."""
    answer = kvm.policy.notifier_flush(cpu, kvm, gfn)
    if answer == "before-return":
        kvm_flush_remote_tlbs(cpu, kvm, lib.REASON_REMOTE_NOTIFIER)
    elif answer == "at-range-end":
        kvm.mn_flush_at_end = True
    else:
        flush_elided(cpu, kvm, lib.REASON_REMOTE_NOTIFIER, gfn)


def kvm_mmu_notifier_invalidate_range_end(cpu: Cpu, kvm: Kvm, start: Hva, end: Hva) -> None:
    """kvm_mmu_notifier_invalidate_range_end(): end the invalidation, then install a waiting memslot update.

    The sequence is incremented before in_progress drops, so that a fault that sees no invalidation in
    progress sees the new sequence.  range_start found the same slots, because a memslot update waits until
    mn_active_invalidate_count is 0.
    """
    index = cpu.check(lib.srcu_read_lock(cpu.m, cpu.id, kvm.id))
    try:
        if kvm_for_each_memslot_in_hva_range(cpu, kvm, start, end):
            with kvm.mmu_lock.write_lock(cpu):
                if kvm.mn_flush_at_end:
                    kvm.mn_flush_at_end = False
                    kvm_flush_remote_tlbs(cpu, kvm, lib.REASON_REMOTE_NOTIFIER)
                cpu.point("mmu_invalidate_seq", kvm.id, "write")
                lib.mmu_invalidate_end(cpu.m, kvm.id)
    finally:
        lib.srcu_read_unlock(cpu.m, cpu.id, kvm.id, index)
    waiter = CpuId(-1)
    with kvm.mn_invalidate_lock.held(cpu):
        kvm.mn_active_invalidate_count -= 1
        if not kvm.mn_active_invalidate_count and kvm.mn_memslots_update is not None:
            install, waiter = kvm.mn_memslots_update
            kvm.mn_memslots_update = None
            install()
    if waiter >= 0:
        wake(kvm.machine, waiter)


def kvm_mmu_notifier_clear_flush_young(cpu: Cpu, kvm: Kvm, start: Hva, end: Hva) -> bool:
    """kvm_mmu_notifier_clear_flush_young(): as clear_young, for reclaim, which then unmaps unused pages.

    Decision age_flush.
    """
    return kvm_age_hva_range(cpu, kvm, start, end, flush_on_ret=True)


def kvm_mmu_notifier_clear_young(cpu: Cpu, kvm: Kvm, start: Hva, end: Hva) -> bool:
    """kvm_mmu_notifier_clear_young(): return whether the guest has used the range since the last call.  No
    flush."""
    return kvm_age_hva_range(cpu, kvm, start, end, flush_on_ret=False)


def kvm_age_hva_range(cpu: Cpu, kvm: Kvm, start: Hva, end: Hva, *, flush_on_ret: bool) -> bool:
    """kvm_age_hva_range(), before 6.15 kvm_handle_hva_range(): age each slot's part of the range.

    Decision age_lock: walk without mmu_lock; or, as before 6.15, walk and flush with mmu_lock held for write.
    """
    index = cpu.check(lib.srcu_read_lock(cpu.m, cpu.id, kvm.id))
    try:
        ranges = kvm_for_each_memslot_in_hva_range(cpu, kvm, start, end)
        if not ranges:
            return False
        if kvm.policy.age_lock(cpu, kvm, ranges[0][1]) == "rcu":
            return _age_gfn_ranges(cpu, kvm, ranges, flush_on_ret)
        with kvm.mmu_lock.write_lock(cpu):
            return _age_gfn_ranges(cpu, kvm, ranges, flush_on_ret)
    finally:
        lib.srcu_read_unlock(cpu.m, cpu.id, kvm.id, index)


def _age_gfn_ranges(cpu: Cpu, kvm: Kvm, ranges: list[GfnRange], flush_on_ret: bool) -> bool:
    young = False
    for slot, gfn_start, gfn_end in ranges:
        young |= kvm_age_gfn(cpu, kvm, slot, gfn_start, gfn_end)
    if young and flush_on_ret and kvm.policy.age_flush(cpu, kvm, ranges[0][1]) == "if-young":
        kvm_flush_remote_tlbs(cpu, kvm, lib.REASON_REMOTE_NOTIFIER)
    return young
