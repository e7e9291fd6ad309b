"""arch/x86/kvm/vmx/vmcs.h and vmx.c: the VMCS, the pCPU that it is loaded on, and VPIDs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.machine.runtime import Cpu, Machine, OutOfFrames
from native import lib
from native.types import CpuId, Vpid

if TYPE_CHECKING:
    from emulator.kvm.structs import Vcpu


class LoadedVmcs:
    """struct loaded_vmcs: the pCPU on which it was loaded last, or -1.

    by_generation: when it was loaded there, the policy answered `migration` with root-tlb-gen.
    """

    __slots__ = ("by_generation", "cpu")

    def __init__(self) -> None:
        self.cpu = CpuId(-1)
        self.by_generation = False


def allocate_vpid(machine: Machine) -> Vpid:
    """allocate_vpid()"""
    try:
        return machine.vmx_vpids.pop()
    except IndexError:
        raise OutOfFrames("no VPID is left") from None


def free_vpid(machine: Machine, vpid: Vpid) -> None:
    """free_vpid(): release the VPID; its next vCPU flushes when its VMCS is loaded for the first time."""
    machine.vmx_vpids.append(vpid)


def loaded_vmcs_clear(cpu: Cpu, vcpu: Vcpu) -> None:
    """loaded_vmcs_clear(): execute VMCLEAR on the pCPU where the VMCS is loaded, by IPI with wait."""
    target = vcpu.loaded_vmcs.cpu
    if target != -1:
        argument = vcpu.kvm.id << 32 | vcpu.id
        cpu.check(lib.smp_call_function_single(cpu.m, cpu.id, target, lib.IPI_VMCS_CLEAR, argument, 1))
    vcpu.loaded_vmcs.cpu = CpuId(-1)
