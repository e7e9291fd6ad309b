"""The host's own work between two flushes: long enough for the vCPUs to serve the first one.

On a real host a vCPU that was kicked is back in the guest before the next page's turn comes.  Recorded under
emulation: 24 ms from page to page of a reclaim, 0.12 ms from exit to entry; 6.6 ms and 0.012 ms for pages
that are copied on write.  In this emulator all of that shares one interpreter: a host thread that keeps the
GIL makes sixty requests before a vCPU runs again, one entry serves them all, and what a burst costs is up to
chance.

So the host waits before it goes on to the next page, for the vCPUs' progress instead of a time: until no
loaded vCPU has KVM_REQ_TLB_FLUSH pending.  A vCPU that is in such work of its own, for a fault, serves
nothing meanwhile and is not waited for.  Hence no two CPUs wait for each other; requests to that vCPU merge,
as on a real host.  The waiter holds no lock that an entry takes.

This is for machines whose vCPUs run by themselves (KvmParams.host_takes_time).  A litmus test says itself
what happens in which order, and explore tries every order.
"""

from __future__ import annotations

from contextlib import suppress

from emulator.kvm.kvm_host import KVM_REQ_TLB_FLUSH
from emulator.kvm.requests import kvm_test_request
from emulator.kvm.structs import Kvm, Vcpu
from emulator.machine.runtime import Cpu, wait_until, wake
from native.types import CpuId


def host_works(cpu: Cpu, kvm: Kvm) -> bool:
    """Wait until the vCPUs have served the host's last flush; on a vCPU's own thread, until the others have.
    Return whether that took time, in which anything may have happened.

    The caller holds nothing but SRCU and mutexes that vCPUs do not take.
    """
    if not kvm.params.host_takes_time or not _are_behind(cpu, kvm):
        return False
    at_work = kvm.at_host_work
    at_work.append(cpu.id)
    try:
        wait_until(cpu, lambda: cpu.id not in at_work or not _are_behind(cpu, kvm), "vCPUs to serve a flush")
    finally:
        _take_off(at_work, cpu.id)
    return True


def owe_a_flush(cpu: Cpu, kvm: Kvm) -> bool:
    """Return whether any vCPU has still to serve a flush, be it halted or scheduled away."""
    return any(kvm_test_request(cpu, vcpu, KVM_REQ_TLB_FLUSH) for vcpu in kvm.vcpus)


def vcpus_went_on(kvm: Kvm) -> None:
    """End the waits that are over because a vCPU has served its flush or was unloaded.

    A waiter is taken off the list here, not when it runs again: from now on its own vCPU is on its way to an
    entry, and others wait for that.
    """
    for waiter in kvm.at_host_work.copy():
        if not _are_behind(kvm.machine.cpus[waiter], kvm):
            _take_off(kvm.at_host_work, waiter)
            wake(kvm.machine, waiter)


def _take_off(at_work: list[CpuId], cpu_id: CpuId) -> None:
    """Two threads may find at once that a wait is over."""
    with suppress(ValueError):
        at_work.remove(cpu_id)


def _are_behind(cpu: Cpu, kvm: Kvm) -> bool:
    """Return whether a vCPU other than this CPU's own still has to serve a flush."""
    return any(_is_behind(cpu, vcpu) for vcpu in kvm.vcpus)


def _is_behind(cpu: Cpu, vcpu: Vcpu) -> bool:
    """Return whether the vCPU owes a flush and is on its way to an entry."""
    if not vcpu.loaded or vcpu is cpu.vcpu or not kvm_test_request(cpu, vcpu, KVM_REQ_TLB_FLUSH):
        return False
    # Its thread is where it is loaded.
    return vcpu.loaded_vmcs.cpu not in vcpu.kvm.at_host_work
