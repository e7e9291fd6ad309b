"""The host's own work between two flushes, which takes longer than the vCPUs need to service the first one.

On a real host a kicked vCPU is back in the guest before the host reaches the next page.  Recorded under
emulation: 24 ms from page to page of a reclaim, and 0.12 ms from exit to entry; with copy-on-write, 6.6 ms
and 0.012 ms.  In this emulator all threads share one interpreter: a host thread that keeps the
GIL makes sixty requests before a vCPU runs again, one entry services them all, and the cost of a burst is up
to chance.

Before each next page the host therefore waits until no loaded vCPU has KVM_REQ_TLB_FLUSH pending.  It does
not wait for a vCPU that does host work itself, for a fault, because such a vCPU services no request until it
is done.  Hence no two CPUs wait for each other, and requests to that vCPU merge, as on a real host.  The
waiting thread holds no lock that an entry takes.

Only machines with freely running vCPUs use this (KvmParams.host_takes_time).  A litmus test prescribes its
order, and explore tries every order.
"""

from __future__ import annotations

from contextlib import suppress

from emulator.kvm.kvm_host import KVM_REQ_TLB_FLUSH
from emulator.kvm.structs import Kvm, Vcpu
from emulator.kvm.virt.requests import kvm_test_request
from emulator.machine.runtime import Cpu, wait_until, wake
from native.types import CpuId


def host_works(cpu: Cpu, kvm: Kvm) -> bool:
    """Wait until every loaded vCPU has serviced its flush requests, except the caller's own and vCPUs that do
    host work themselves.

    Return whether the caller had to wait: it must then revalidate, because other threads ran meanwhile.  The
    caller may hold SRCU, and mutexes that vCPUs do not take, but no other lock.
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
    """Return whether any vCPU has a flush to service, halted and scheduled-out vCPUs included."""
    return any(kvm_test_request(cpu, vcpu, KVM_REQ_TLB_FLUSH) for vcpu in kvm.vcpus)


def vcpus_went_on(kvm: Kvm) -> None:
    """End the waits that are over because a vCPU has serviced its flush or was unloaded.

    A waiter leaves the list here, not when it runs again: if it is a vCPU's thread, that vCPU is on its way
    to an entry from now on, and other waiters must wait for it.
    """
    for waiter in kvm.at_host_work.copy():
        if not _are_behind(kvm.machine.cpus[waiter], kvm):
            _take_off(kvm.at_host_work, waiter)
            wake(kvm.machine, waiter)


def _take_off(at_work: list[CpuId], cpu_id: CpuId) -> None:
    """Take a waiter off the list; another thread that found the wait over may have done so already."""
    with suppress(ValueError):
        at_work.remove(cpu_id)


def _are_behind(cpu: Cpu, kvm: Kvm) -> bool:
    """Return whether a vCPU other than this CPU's own still has to service a flush."""
    return any(_is_behind(cpu, vcpu) for vcpu in kvm.vcpus)


def _is_behind(cpu: Cpu, vcpu: Vcpu) -> bool:
    """Return whether the vCPU owes a flush and is on its way to an entry."""
    if not vcpu.loaded or vcpu is cpu.vcpu or not kvm_test_request(cpu, vcpu, KVM_REQ_TLB_FLUSH):
        return False
    # A loaded vCPU's thread runs on the pCPU that its VMCS is loaded on.
    return vcpu.loaded_vmcs.cpu not in vcpu.kvm.at_host_work
