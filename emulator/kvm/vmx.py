"""arch/x86/kvm/vmx/vmx.c: the flush hooks, EPT_POINTER, VPIDs, and loading a VMCS on a pCPU."""

from __future__ import annotations

from emulator.kvm.kvm_host import KVM_REQ_TLB_FLUSH
from emulator.kvm.requests import flush_elided, kvm_make_request
from emulator.kvm.structs import Kvm, KvmMmuPage, Vcpu
from emulator.runtime import Cpu, Machine, OutOfFrames
from native import lib


def allocate_vpid(machine: Machine) -> int:
    """allocate_vpid()"""
    try:
        return machine.vmx_vpids.pop()
    except IndexError:
        raise OutOfFrames("no VPID is left") from None


def free_vpid(machine: Machine, vpid: int) -> None:
    """free_vpid(): whoever gets it next flushes when its VMCS is loaded for the first time."""
    machine.vmx_vpids.append(vpid)


def vmx_flush_tlb_all(cpu: Cpu, vcpu: Vcpu, reason: int) -> None:
    """vmx_flush_tlb_all(): INVEPT global, because neither INVVPID nor VM entry drops guest-physical mappings.
    It hits every VM on this pCPU."""
    cpu.stat(vcpu.kvm.id, lib.STAT_FLUSH_ALL)
    cpu.point("tlb", cpu.id, "write")
    lib.flush_invept_global(cpu.m, cpu.id, vcpu.kvm.id, reason)


def vmx_flush_tlb_current(cpu: Cpu, vcpu: Vcpu, reason: int) -> None:
    """vmx_flush_tlb_current(): INVEPT single on the current root; nothing without one."""
    if vcpu.mmu.root is None:
        return
    cpu.stat(vcpu.kvm.id, lib.STAT_FLUSH_CURRENT)
    cpu.point("tlb", cpu.id, "write")
    lib.flush_invept_single(cpu.m, cpu.id, vcpu.kvm.id, vcpu.mmu.root.hfn, reason)


def vmx_flush_tlb_roots(cpu: Cpu, vcpu: Vcpu, reason: int) -> None:
    """INVEPT single on each root that this vCPU can use without kvm_mmu_load, as proposed on the list in
    2025."""
    for root in (vcpu.mmu.root, *vcpu.mmu.prev_roots):
        if root is not None:
            cpu.point("tlb", cpu.id, "write")
            lib.flush_invept_single(cpu.m, cpu.id, vcpu.kvm.id, root.hfn, reason)


def vmx_flush_tlb_guest(cpu: Cpu, vcpu: Vcpu, reason: int) -> None:
    """vmx_flush_tlb_guest(): INVVPID single-context of the current VPID, never INVEPT."""
    cpu.stat(vcpu.kvm.id, lib.STAT_FLUSH_GUEST)
    cpu.point("tlb", cpu.id, "write")
    lib.flush_invvpid_single(cpu.m, cpu.id, vcpu.kvm.id, vcpu.vpid, reason)


def vmx_load_mmu_pgd(cpu: Cpu, vcpu: Vcpu, root: KvmMmuPage) -> None:
    """vmx_load_mmu_pgd(): writes EPT_POINTER."""
    lib.vcpu_set_eptp(cpu.m, vcpu.id, root.hfn, root.role.level)


def loaded_vmcs_clear(cpu: Cpu, vcpu: Vcpu) -> None:
    """loaded_vmcs_clear(): VMCLEAR on the pCPU where it is loaded, by IPI with wait."""
    target = vcpu.loaded_vmcs.cpu
    if target != -1:
        cpu.check(lib.smp_call_function_single(cpu.m, cpu.id, target, lib.IPI_VMCS_CLEAR, vcpu.id, 1))
    vcpu.loaded_vmcs.cpu = -1


def vmx_vcpu_load_vmcs(cpu: Cpu, vcpu: Vcpu) -> None:
    """vmx_vcpu_load_vmcs(): what a vCPU's move to another pCPU costs.

    Compares loaded_vmcs.cpu, not vcpu->cpu: coming back to the pCPU on which it ran last is free.  Both
    halves of today's flush are due here: what KVM changed in SPTEs, and what the guest invalidated natively,
    while this vCPU was elsewhere.
    """
    last = vcpu.loaded_vmcs.cpu
    if last == cpu.id:
        return
    loaded_vmcs_clear(cpu, vcpu)
    cpu.event(lib.EVENT_LOAD, vcpu.id, last & 0xFFFFFFFF)
    if last != -1:
        cpu.stat(vcpu.kvm.id, lib.STAT_MIGRATIONS)
    migration_ept(cpu, vcpu)
    migration_vpid(cpu, vcpu)
    vcpu.loaded_vmcs.cpu = cpu.id


def migration_ept(cpu: Cpu, vcpu: Vcpu) -> None:
    """Decision `migration`: guest-physical mappings, and the combined ones with them."""
    kvm = vcpu.kvm
    answer = kvm.policy.migration(cpu, vcpu)
    if answer == "all-contexts":
        request_tlb_flush(cpu, vcpu, lib.REASON_MIGRATION)
    elif answer == "active-roots":
        vmx_flush_tlb_roots(cpu, vcpu, lib.REASON_MIGRATION)
    else:
        flush_elided(cpu, kvm, lib.REASON_MIGRATION, vcpu.id)


def migration_vpid(cpu: Cpu, vcpu: Vcpu) -> None:
    """Decision `migration_vpid`: combined mappings under this vCPU's VPID."""
    if vcpu.kvm.policy.migration_vpid(cpu, vcpu) == "invvpid":
        cpu.point("tlb", cpu.id, "write")
        lib.flush_invvpid_single(cpu.m, cpu.id, vcpu.kvm.id, vcpu.vpid, lib.REASON_MIGRATION)


def request_tlb_flush(cpu: Cpu, vcpu: Vcpu, reason: int) -> None:
    """kvm_make_request(KVM_REQ_TLB_FLUSH) on the vCPU that is being loaded."""
    lib.vcpu_add_flush_reason(cpu.m, vcpu.id, reason)
    kvm_make_request(cpu, vcpu, KVM_REQ_TLB_FLUSH)


def vmx_vcpu_free(cpu: Cpu, kvm: Kvm, vcpu: Vcpu) -> None:
    """vmx_vcpu_free(): the VMCS must not stay loaded anywhere, the VPID is anybody's."""
    loaded_vmcs_clear(cpu, vcpu)
    free_vpid(kvm.machine, vcpu.vpid)
