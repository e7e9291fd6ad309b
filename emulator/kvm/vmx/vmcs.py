"""arch/x86/kvm/vmx/vmcs.h and vmx.c: the VMCS, the pCPU that it is loaded on, and VPIDs."""

from __future__ import annotations

from emulator.machine.runtime import Cpu, Machine, OutOfFrames
from native import lib
from native.types import CpuId, Hfn, VcpuId, VmcsId, VmId, Vpid


class LoadedVmcs:
    """struct loaded_vmcs: a VMCS, and the pCPU on which it was loaded last, or -1.

    `vmcs`: the VMCS's number.  `cpu`: the number of that pCPU.
    virtualize_apic: the control "virtualize APIC accesses".  apic_access_hfn: APIC_ACCESS_ADDR.
    """

    __slots__ = ("apic_access_hfn", "cpu", "virtualize_apic", "vmcs")

    def __init__(self, vmcs: VmcsId) -> None:
        self.vmcs = vmcs
        self.cpu = CpuId(-1)
        self.virtualize_apic = False
        self.apic_access_hfn = Hfn(0)


def alloc_loaded_vmcs(cpu: Cpu, vcpu: VcpuId, vpid: Vpid, *, ept: bool) -> LoadedVmcs:
    """alloc_loaded_vmcs(): make a VMCS with the vCPU's VPID (0: none) and the control "enable EPT"."""
    vmcs = VmcsId(cpu.check(lib.vmcs_create(cpu.m, vcpu, vpid)))
    if not ept:
        lib.vmcs_enable_ept(cpu.m, vmcs, False)
    return LoadedVmcs(vmcs)


def write_apic_access(cpu: Cpu, loaded_vmcs: LoadedVmcs) -> None:
    """Write the control "virtualize APIC accesses" and APIC_ACCESS_ADDR into the VMCS."""
    hfn = loaded_vmcs.apic_access_hfn if loaded_vmcs.virtualize_apic else Hfn(0)
    lib.vmcs_write_apic_page(cpu.m, loaded_vmcs.vmcs, hfn)


def free_loaded_vmcs(cpu: Cpu, vm: VmId, loaded_vmcs: LoadedVmcs) -> None:
    """free_loaded_vmcs(): free the VMCS, which must not stay active on any pCPU."""
    loaded_vmcs_clear(cpu, vm, loaded_vmcs)
    cpu.check(lib.vmcs_destroy(cpu.m, cpu.id, loaded_vmcs.vmcs))


def allocate_vpid(machine: Machine) -> Vpid:
    """allocate_vpid()"""
    try:
        return machine.vmx_vpids.pop()
    except IndexError:
        raise OutOfFrames("no VPID is left") from None


def free_vpid(machine: Machine, vpid: Vpid) -> None:
    """free_vpid(): release the VPID; its next vCPU flushes when its VMCS is loaded for the first time."""
    machine.vmx_vpids.append(vpid)


def loaded_vmcs_clear(cpu: Cpu, vm: VmId, loaded_vmcs: LoadedVmcs) -> None:
    """loaded_vmcs_clear(): execute VMCLEAR on the pCPU where the VMCS is loaded, by IPI with wait."""
    target = loaded_vmcs.cpu
    if target != -1:
        argument = vm << 32 | loaded_vmcs.vmcs
        cpu.check(
            lib.smp_call_function_single(cpu.m, cpu.id, target, lib.IPI_VMCS_CLEAR, argument, lib.IPI_WAIT)
        )
    loaded_vmcs.cpu = CpuId(-1)
