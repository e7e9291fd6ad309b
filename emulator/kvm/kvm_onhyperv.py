"""arch/x86/kvm/kvm_onhyperv.c: flushes of an EPT where KVM's host is itself a guest of Hyper-V.

Hyper-V shadows KVM's EPTs, and flushes one on all pCPUs for a hypercall, without an exit of the vCPUs to KVM.
So a remote flush is a hypercall for each root in use, and makes no request.  A vCPU tells its root whenever
its VMCS gets an EPT_POINTER; roots that it has only cached are not told.
"""

from __future__ import annotations

from typing import Final

from emulator.kvm.structs import Kvm, Vcpu
from emulator.machine.runtime import Cpu
from native import lib
from native.types import FlushReason, Gfn, Hfn

# Of a hypercall that flushes all pages: HvCallFlushGuestPhysicalAddressSpace.
ALL_PAGES: Final = (Gfn(0), 0)


def hv_flushes(kvm: Kvm) -> bool:
    """Return whether Hyper-V offers the hypercalls (HV_X64_NESTED_GUEST_MAPPING_FLUSH), and KVM uses EPT."""
    return kvm.params.hyperv and kvm.params.ept


def hv_remote_flush_root_tdp(
    cpu: Cpu, kvm: Kvm, root: Hfn, pages: tuple[Gfn, int], reason: FlushReason
) -> None:
    """hv_remote_flush_root_tdp(): flush a root on all pCPUs.  pages: the first gfn and their number."""
    cpu.point("call_queue", kvm.id, "write")
    cpu.check(lib.hv_flush_guest_mapping(cpu.m, cpu.id, kvm.id, root, pages[0], pages[1], reason))


def hv_flush_remote_tlbs_range(cpu: Cpu, kvm: Kvm, pages: tuple[Gfn, int], reason: FlushReason) -> None:
    """__hv_flush_remote_tlbs_range(): flush all roots that vCPUs have told of, each once.

    If all vCPUs have one root, kvm.hv_root_tdp is that root.  The first root that is found is remembered, so
    that it is not flushed again for the next vCPUs; roots that differ from it may be flushed several times.
    """
    with kvm.hv_root_tdp_lock.held(cpu):
        if kvm.hv_root_tdp is not None:
            hv_remote_flush_root_tdp(cpu, kvm, kvm.hv_root_tdp, pages, reason)
            return
        nr_unique_valid_roots = 0
        for vcpu in kvm.vcpus:
            root = vcpu.hv_root_tdp
            if root is None or root == kvm.hv_root_tdp:
                continue
            nr_unique_valid_roots += 1
            if nr_unique_valid_roots == 1:
                kvm.hv_root_tdp = root
            hv_remote_flush_root_tdp(cpu, kvm, root, pages, reason)
        if nr_unique_valid_roots > 1:
            kvm.hv_root_tdp = None


def hv_track_root_tdp(cpu: Cpu, vcpu: Vcpu, root_tdp: Hfn) -> None:
    """hv_track_root_tdp(): note the root of this vCPU; the vCPUs have no common root if it is another one."""
    kvm = vcpu.kvm
    if not hv_flushes(kvm):
        return
    with kvm.hv_root_tdp_lock.held(cpu):
        vcpu.hv_root_tdp = root_tdp
        if root_tdp != kvm.hv_root_tdp:
            kvm.hv_root_tdp = None


def hv_flushes_remotely(cpu: Cpu, kvm: Kvm) -> bool:
    """Return whether a remote flush is made by hypercalls.  Decision hv_remote_flush."""
    return hv_flushes(kvm) and kvm.policy.hv_remote_flush(cpu, kvm) == "tracked-roots"
