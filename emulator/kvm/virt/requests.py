"""virt/kvm/kvm_main.c: requests, kicks and remote TLB flushes.

A request is a bit that the vCPU checks between `mode = IN_GUEST_MODE` and VM entry; a kick makes it check
again.  Requester: set the bit, then read the mode.  vCPU: store the mode, then read the bits.  At least one
of the two sees the other's store (Documentation/virt/kvm/vcpu-requests.rst).
"""

from __future__ import annotations

from emulator.kvm.kvm_host import (
    IN_GUEST_MODE,
    KVM_REQ_TLB_FLUSH,
    KVM_REQUEST_MASK,
    KVM_REQUEST_NO_ACTION,
    KVM_REQUEST_WAIT,
    OUTSIDE_GUEST_MODE,
    READING_SHADOW_PAGE_TABLES,
)
from emulator.kvm.kvm_onhyperv import ALL_PAGES, hv_flush_remote_tlbs_range, hv_flushes_remotely
from emulator.kvm.structs import Kvm, KvmMemorySlot, Vcpu
from emulator.machine.runtime import Cpu, timed
from native import lib
from native.types import CpuId, FlushReason, Gfn


def kvm_make_request(cpu: Cpu, vcpu: Vcpu, req: int) -> None:
    """__kvm_make_request(): set the bit, after the change that it announces has become visible."""
    cpu.point("requests", vcpu.id, "write")
    lib.kvm_make_request(cpu.m, vcpu.id, req & KVM_REQUEST_MASK)
    cpu.event(lib.EVENT_REQUEST, vcpu.id, req & KVM_REQUEST_MASK)


def kvm_check_request(cpu: Cpu, vcpu: Vcpu, req: int) -> bool:
    """kvm_check_request(): test and clear the bit."""
    return bool(lib.kvm_check_request(cpu.m, vcpu.id, req & KVM_REQUEST_MASK))


def kvm_test_request(cpu: Cpu, vcpu: Vcpu, req: int) -> bool:
    return bool(lib.kvm_test_request(cpu.m, vcpu.id, req & KVM_REQUEST_MASK))


def set_mode(cpu: Cpu, vcpu: Vcpu, mode: int) -> None:
    """Store vcpu->mode, on the vCPU's own thread."""
    cpu.point("mode", vcpu.id, "write")
    lib.vcpu_set_mode(cpu.m, vcpu.id, mode)


def kvm_request_needs_ipi(cpu: Cpu, vcpu: Vcpu, req: int) -> bool:
    """kvm_request_needs_ipi(): move IN_GUEST_MODE to EXITING_GUEST_MODE, then decide by the old mode.

    A requester with KVM_REQUEST_WAIT must also wait for a vCPU that is already EXITING, because that is not
    OUTSIDE yet, and for one that is READING_SHADOW_PAGE_TABLES, because it may be in a page that the
    requester is about to free.  The cmpxchg is the barrier between the request and the read of the mode.
    """
    cpu.point("mode", vcpu.id, "write")
    mode: int = lib.vcpu_exiting_guest_mode(cpu.m, vcpu.id)
    if req & KVM_REQUEST_WAIT:
        cpu.stat(vcpu.kvm.id, lib.STAT_READERS_AWAITED, mode == READING_SHADOW_PAGE_TABLES)
        return mode != OUTSIDE_GUEST_MODE
    return mode == IN_GUEST_MODE


def kvm_make_vcpu_request(cpu: Cpu, vcpu: Vcpu, req: int) -> int:
    """kvm_make_vcpu_request(): make the request; return the pCPU to interrupt, or -1.

    All requests made here are NO_WAKEUP: a blocked vCPU sees them when it runs again.  The caller's own pCPU
    is never interrupted, because a vCPU with that ->cpu is not in guest mode.
    """
    if not req & KVM_REQUEST_NO_ACTION:
        kvm_make_request(cpu, vcpu, req)
    if not kvm_request_needs_ipi(cpu, vcpu, req):
        return -1
    cpu.point("vcpu->cpu", vcpu.id, "read")
    target = lib.vcpu_cpu(cpu.m, vcpu.id)
    return target if target != cpu.id else -1


def kvm_make_all_cpus_request(cpu: Cpu, kvm: Kvm, req: int) -> bool:
    """kvm_make_all_cpus_request(): return whether some pCPU was interrupted.

    Decision remote_kick: interrupt the pCPUs of vCPUs that are not OUTSIDE, or all pCPUs.
    """
    cpu.stat(kvm.id, lib.STAT_MAKE_ALL_CPUS_REQUEST)
    mask = cpu.kick_mask
    for word in range(cpu.kick_mask_words):
        mask[word] = 0
    called = False
    for vcpu in kvm.vcpus:
        target = kvm_make_vcpu_request(cpu, vcpu, req)
        if target >= 0:
            mask[target >> 6] |= 1 << (target & 63)
            called = True
    answer = kvm.policy.remote_kick(cpu, kvm)
    if answer == "done":
        called = any(mask[word] for word in range(cpu.kick_mask_words))
    elif answer == "all-pcpus":
        called = _kick_all(cpu)
    return called and kvm_kick_many_cpus(cpu, kvm, bool(req & KVM_REQUEST_WAIT))


def _kick_all(cpu: Cpu) -> bool:
    """Add all other pCPUs to the mask: remote_kick=all-pcpus."""
    called = False
    for target in range(cpu.machine.pcpus):
        if target != cpu.id:
            cpu.kick_mask[target >> 6] |= 1 << (target & 63)
            called = True
    return called


def kvm_kick_many_cpus(cpu: Cpu, kvm: Kvm, wait: bool) -> bool:
    """kvm_kick_many_cpus(): interrupt the pCPUs of the mask.  Decision kick_wait: wait for acknowledgement?

    The called function is empty: the interrupt itself ends guest mode, and the acknowledgement proves it.
    """
    waits = lib.IPI_WAIT if wait and kvm.policy.kick_wait(cpu, kvm) == "wait" else lib.IPI_NO_WAIT
    cpu.point("call_queue", kvm.id, "write")
    cpu.check(lib.smp_call_function_many(cpu.m, cpu.id, cpu.kick_mask, lib.IPI_ACK_KICK, kvm.id << 32, waits))
    return True


def kvm_vcpu_kick(cpu: Cpu, vcpu: Vcpu) -> None:
    """__kvm_vcpu_kick(wait=false): send a reschedule IPI to a vCPU in guest mode; no request, no flush."""
    cpu.point("mode", vcpu.id, "write")
    if lib.vcpu_exiting_guest_mode(cpu.m, vcpu.id) != IN_GUEST_MODE:
        return
    cpu.point("vcpu->cpu", vcpu.id, "read")
    target = CpuId(lib.vcpu_cpu(cpu.m, vcpu.id))
    if target not in (cpu.id, -1):
        argument = vcpu.kvm.id << 32
        cpu.check(
            lib.smp_call_function_single(cpu.m, cpu.id, target, lib.IPI_ACK_KICK, argument, lib.IPI_NO_WAIT)
        )


def kvm_flush_remote_tlbs(cpu: Cpu, kvm: Kvm, reason: FlushReason) -> None:
    """kvm_flush_remote_tlbs(): make every vCPU flush before it runs guest code again.

    On return every vCPU is outside guest mode with the request pending, or has entered again after flushing.
    Stale entries may still exist, but no vCPU will use them.  On Hyper-V, hypercalls have flushed all pCPUs
    instead, and no vCPU has a request.  `reason` (enum flush_reason) is for the accounts.
    """
    with timed(cpu, lib.HISTOGRAM_REMOTE_FLUSH):
        cpu.stat(kvm.id, lib.STAT_REMOTE_TLB_FLUSH_REQUESTS)
        if kvm.heard.remote_flush_due is not None:
            kvm.heard.remote_flush_due(cpu, kvm, reason)
        if hv_flushes_remotely(cpu, kvm):
            hv_flush_remote_tlbs_range(cpu, kvm, ALL_PAGES, reason)
            cpu.stat(kvm.id, lib.STAT_REMOTE_TLB_FLUSH)
            return
        for vcpu in kvm.vcpus:
            lib.vcpu_add_flush_reason(cpu.m, vcpu.id, reason)
        if kvm_make_all_cpus_request(cpu, kvm, KVM_REQ_TLB_FLUSH):
            cpu.stat(kvm.id, lib.STAT_REMOTE_TLB_FLUSH)


def kvm_flush_remote_tlbs_range(cpu: Cpu, kvm: Kvm, gfn: Gfn, nr_pages: int, reason: FlushReason) -> None:
    """kvm_flush_remote_tlbs_range(): flush the whole VM, because bare metal has no range hook; Hyper-V has.

    As in the kernel, such a hypercall counts in none of the VM's statistics.
    """
    if not hv_flushes_remotely(cpu, kvm):
        kvm_flush_remote_tlbs(cpu, kvm, reason)
        return
    if kvm.heard.remote_flush_due is not None:
        kvm.heard.remote_flush_due(cpu, kvm, reason)
    hv_flush_remote_tlbs_range(cpu, kvm, (gfn, nr_pages), reason)


def kvm_flush_remote_tlbs_memslot(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, reason: FlushReason) -> None:
    """kvm_flush_remote_tlbs_memslot(), under slots_lock: flush for the slot, without mmu_lock.

    slots_lock keeps other operations on the slot, which rely on the flush, out until it is complete.
    """
    assert kvm.slots_lock.is_held(cpu), "slots_lock is not held"
    kvm_flush_remote_tlbs_range(cpu, kvm, slot.base_gfn, slot.npages, reason)


def request_tlb_flush(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """Make KVM_REQ_TLB_FLUSH of the vCPU that is being loaded."""
    lib.vcpu_add_flush_reason(cpu.m, vcpu.id, reason)
    kvm_make_request(cpu, vcpu, KVM_REQ_TLB_FLUSH)
