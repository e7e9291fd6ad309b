"""arch/x86/kvm/vmx/nested.c: nested VMX.  L1 is a hypervisor; KVM runs its guests (L2) with vmcs02.

If L1 enables no EPT for L2, both share root_mmu: their roots differ in role.guest_mode, so their EP4TAs
differ.  If it does, L2 uses guest_mmu (nested_ept.py).  KVM_REQ_TLB_FLUSH_CURRENT and _GUEST flush the
context that is current when they are serviced.  So KVM services them before it changes the context, and
makes them for the next context only after it has changed is_guest_mode().
"""

from __future__ import annotations

from emulator.kvm.accounting import flush_elided
from emulator.kvm.kvm_host import KVM_REQ_TLB_FLUSH_CURRENT, KVM_REQ_TLB_FLUSH_GUEST
from emulator.kvm.mmu.fault import KvmPageFault
from emulator.kvm.mmu.roots import (
    kvm_init_mmu,
    kvm_mmu_free_guest_mode_roots,
    kvm_mmu_free_roots,
    kvm_mmu_new_pgd,
)
from emulator.kvm.structs import Vcpu, tdp_enabled
from emulator.kvm.tlb import kvm_service_local_tlb_flush_requests
from emulator.kvm.virt.requests import kvm_make_request
from emulator.kvm.virt.slots import gfn_to_memslot
from emulator.kvm.vmx.apic import apic_access_hfn
from emulator.kvm.vmx.nested_ept import (
    nested_ept_init_mmu_context,
    nested_ept_uninit_mmu_context,
    sync_violating_gpa,
)
from emulator.kvm.vmx.vmcs import (
    alloc_loaded_vmcs,
    allocate_vpid,
    free_loaded_vmcs,
    free_vpid,
    write_apic_access,
)
from emulator.kvm.vmx.vmcs12 import (
    ControlRegisters,
    Vmcs12,
    nested_cpu_has_ept,
    nested_cpu_has_vpid,
    nested_cpu_virtualizes_apic,
    nested_get_vpid02,
)
from emulator.kvm.vmx.vmx import vmx_switch_vmcs, vpid_sync, vpid_sync_vcpu_addr
from emulator.kvm.vmx.vmx_ops import VMX_VPID_EXTENT_INDIVIDUAL_ADDR
from emulator.machine.runtime import Cpu, OutOfFrames
from native import lib
from native.types import Gfn, Vpid

# --- VMXON, VMXOFF, and the current VMCS12 ------------------------------------------------------------------


def enter_vmx_operation(cpu: Cpu, vcpu: Vcpu) -> None:
    """enter_vmx_operation(), for VMXON: make vmcs02, with a VPID for nested guests if one is left.

    Another vCPU may have used the VPID.  last_vpid begins with a value that is no VPID of L1's, so the first
    VM entry with a VPID flushes.
    """
    nested, kvm = vcpu.nested, vcpu.kvm
    nested.vmcs02 = alloc_loaded_vmcs(cpu, vcpu.id, vcpu.vpid, ept=kvm.params.ept)
    try:
        nested.vpid02 = allocate_vpid(kvm.machine) if kvm.params.vpid else Vpid(0)
    except OutOfFrames:
        nested.vpid02 = Vpid(0)
    nested.last_vpid = 0
    nested.vmxon = True


def free_nested(cpu: Cpu, vcpu: Vcpu) -> None:
    """free_nested(), for VMXOFF: free vmcs02 and let vpid02 be reused."""
    nested, kvm = vcpu.nested, vcpu.kvm
    nested.vmxon = nested.smm_vmxon = nested.smm_guest_mode = False
    if nested.vpid02:
        free_vpid(kvm.machine, nested.vpid02)
        nested.vpid02 = Vpid(0)
    nested.current = None
    kvm_mmu_free_roots(cpu, kvm, vcpu.guest_mmu, lambda root: True)
    vmcs02, nested.vmcs02 = nested.vmcs02, None
    assert vmcs02 is not None
    free_loaded_vmcs(cpu, kvm.id, vmcs02)


def nested_vmx_free_vcpu(cpu: Cpu, vcpu: Vcpu) -> None:
    """nested_vmx_free_vcpu(): leave nested VMX for good; the vCPU runs no more, and no flush is due to it."""
    if vcpu.arch.guest_mode:
        leave_guest_mode(cpu, vcpu)
        nested_ept_uninit_mmu_context(vcpu)
        vcpu.loaded_vmcs = vcpu.vmcs01
    if vcpu.nested.vmxon or vcpu.nested.smm_vmxon:
        free_nested(cpu, vcpu)


def nested_release_vmcs12(cpu: Cpu, vcpu: Vcpu) -> None:
    """nested_release_vmcs12(): the current VMCS12 is current no more."""
    if vcpu.nested.current is None:
        return
    kvm_mmu_free_roots(cpu, vcpu.kvm, vcpu.guest_mmu, lambda root: True)
    vcpu.nested.current = None


def handle_vmptrld(cpu: Cpu, vcpu: Vcpu, vmptr: int) -> None:
    """handle_vmptrld()"""
    nested = vcpu.nested
    if nested.current is not None and nested.current.number == vmptr:
        return
    nested_release_vmcs12(cpu, vcpu)
    nested.current = nested.vmcs12s.setdefault(vmptr, Vmcs12(vmptr))


def handle_vmclear(cpu: Cpu, vcpu: Vcpu, vmptr: int) -> None:
    """handle_vmclear()"""
    if vcpu.nested.current is not None and vcpu.nested.current.number == vmptr:
        nested_release_vmcs12(cpu, vcpu)


def handle_vmwrite(vcpu: Vcpu, field: int, value: int) -> None:
    """handle_vmwrite(): write a field of the current VMCS12; 0 also clears the control that enables it."""
    vmcs12 = vcpu.nested.vmcs12()
    if field == lib.VMCS12_VPID:
        vmcs12.virtual_processor_id = value
    else:
        vmcs12.apic_access_gfn = Gfn(value)


# --- VM entry and VM exit of L2 -----------------------------------------------------------------------------


def enter_guest_mode(cpu: Cpu, vcpu: Vcpu) -> None:
    """enter_guest_mode(): is_guest_mode() is true from here on."""
    vcpu.arch.guest_mode = True
    lib.vcpu_set_guest_mode(cpu.m, vcpu.id, vcpu.nested.vmcs12().number)


def leave_guest_mode(cpu: Cpu, vcpu: Vcpu) -> None:
    """leave_guest_mode()"""
    vcpu.arch.guest_mode = False
    lib.vcpu_set_guest_mode(cpu.m, vcpu.id, 0)


def nested_has_guest_tlb_tag(vcpu: Vcpu) -> bool:
    """nested_has_guest_tlb_tag(): return whether the translations of L1 and of L2 have different tags.

    With EPT their EP4TAs differ, even where they share a VPID.
    """
    nested = vcpu.nested
    return tdp_enabled(vcpu.kvm) or (nested_cpu_has_vpid(nested.vmcs12()) and bool(nested.vpid02))


def nested_vmx_transition_tlb_flush(cpu: Cpu, vcpu: Vcpu, vmcs12: Vmcs12, is_vmenter: bool) -> None:
    """nested_vmx_transition_tlb_flush(): request the flush that VM entry or VM exit owes to the guest that it
    enters.

    Without a VPID, VM entry and VM exit invalidate the mappings of VPID 0.  vpid02 stands for any VPID of
    L1's, so a VPID that differs from the last one must not find mappings under it.  Decisions
    nested_transition, vpid02_reuse.
    """
    nested, has_vpid = vcpu.nested, nested_cpu_has_vpid(vmcs12)
    is_new = has_vpid and is_vmenter and vmcs12.virtual_processor_id != nested.last_vpid
    if is_new:
        nested.last_vpid = vmcs12.virtual_processor_id
    answer = vcpu.kvm.policy.nested_transition(cpu, vcpu)
    if answer == "always":
        request_nested_flush(cpu, vcpu, KVM_REQ_TLB_FLUSH_CURRENT, wanted=True)
    elif not has_vpid:
        request_nested_flush(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST, wanted=answer != "none")
    elif is_new:
        wanted = vcpu.kvm.policy.vpid02_reuse(cpu, vcpu) == "flush"
        request_nested_flush(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST, wanted=wanted)
    elif not nested_has_guest_tlb_tag(vcpu):
        request_nested_flush(cpu, vcpu, KVM_REQ_TLB_FLUSH_CURRENT, wanted=answer != "none")
    if answer == "apic-access-flush" and nested_cpu_virtualizes_apic(vmcs12):
        request_nested_flush(cpu, vcpu, KVM_REQ_TLB_FLUSH_CURRENT, wanted=True)


def request_nested_flush(cpu: Cpu, vcpu: Vcpu, req: int, *, wanted: bool) -> None:
    """Request a flush for the guest that is entered, or account for one that the policy elides."""
    if not wanted:
        flush_elided(cpu, vcpu.kvm, lib.REASON_GUEST, vcpu.id)
        return
    cpu.stat(vcpu.kvm.id, lib.STAT_NESTED_TRANSITION_FLUSHES)
    vcpu.flush_current_reason = lib.REASON_GUEST
    kvm_make_request(cpu, vcpu, req)


def nested_vmx_load_cr3(cpu: Cpu, vcpu: Vcpu, *, nested_ept: bool) -> None:
    """nested_vmx_load_cr3(): compute the role of the guest that is entered; switch to a cached root of it.

    If L1 has an EPT for L2, the root does not depend on CR3: nested_ept_new_eptp() has switched already.
    """
    kvm_init_mmu(vcpu)
    if not nested_ept:
        kvm_mmu_new_pgd(cpu, vcpu, vcpu.arch.cr3)


def prepare_vmcs02_early(cpu: Cpu, vcpu: Vcpu, vmcs12: Vmcs12) -> None:
    """prepare_vmcs02_early(): write VIRTUAL_PROCESSOR_ID, which is L1's for a guest without one."""
    vpid = nested_get_vpid02(vcpu) if nested_cpu_has_vpid(vmcs12) else vcpu.vpid
    lib.vmcs_write_vpid(cpu.m, vcpu.loaded_vmcs.vmcs, vpid)


def nested_get_vmcs12_pages(cpu: Cpu, vcpu: Vcpu, vmcs12: Vmcs12) -> None:
    """nested_get_vmcs12_pages(): write the APIC-access page of L2's VMCS12, or none, into vmcs02.

    Linux pins the page while L2 is active.  The model does not: litmus tests with such a page may not let the
    host take pages.
    """
    vmcs02, kvm = vcpu.loaded_vmcs, vcpu.kvm
    vmcs02.virtualize_apic = nested_cpu_virtualizes_apic(vmcs12)
    if vmcs02.virtualize_apic:
        slot = gfn_to_memslot(cpu, kvm, vmcs12.apic_access_gfn)
        assert slot is not None
        hfn = apic_access_hfn(cpu, kvm, slot, vmcs12.apic_access_gfn)
        if hfn is None:
            raise OutOfFrames("no frame for the APIC-access page of a VMCS12")
        vmcs02.apic_access_hfn = hfn
    write_apic_access(cpu, vmcs02)


def control_registers(vcpu: Vcpu) -> ControlRegisters:
    """Return the registers that VM entry to L2 and VM exit from it replace."""
    arch = vcpu.arch
    return ControlRegisters(arch.cr0, arch.cr3, arch.cr4, arch.efer, arch.pdptrs)


def load_control_registers(vcpu: Vcpu, state: ControlRegisters) -> None:
    """Put the registers of the guest that is entered into vcpu.arch.  The core's guests keep their own."""
    arch = vcpu.arch
    arch.cr0, arch.cr3, arch.cr4, arch.efer, arch.pdptrs = state


def first_guest_state(vcpu: Vcpu) -> ControlRegisters:
    """Return the registers with which L2 begins: without EPT those after power-up (power_on(), reset.py);
    with EPT L1's, because KVM's roots do not depend on them."""
    if tdp_enabled(vcpu.kvm):
        return control_registers(vcpu)
    return ControlRegisters(0, 0, 0, 0, (0, 0, 0, 0))


def prepare_vmcs02(cpu: Cpu, vcpu: Vcpu, vmcs12: Vmcs12) -> None:
    """prepare_vmcs02()"""
    nested_vmx_transition_tlb_flush(cpu, vcpu, vmcs12, is_vmenter=True)
    if nested_cpu_has_ept(vmcs12):
        vcpu.guest_mmu.inject_page_fault = nested_ept_inject_page_fault
        nested_ept_init_mmu_context(cpu, vcpu)
    load_control_registers(vcpu, vmcs12.guest_state or first_guest_state(vcpu))
    nested_vmx_load_cr3(cpu, vcpu, nested_ept=nested_cpu_has_ept(vmcs12))


def nested_vmx_run(cpu: Cpu, vcpu: Vcpu, fails: int) -> None:
    """nested_vmx_run(), for VMLAUNCH and VMRESUME.  fails: the check that fails, of enum vmentry_check.

    A control that is wrong is found before any state changes: the instruction fails, and L1 goes on.  If L2
    is in the activity state HLT, the vCPU blocks before it enters L2, and the event that wakes it makes L2
    exit.
    """
    if fails != lib.VMENTRY_CONTROLS:
        vcpu.nested.vmcs12().host_state = control_registers(vcpu)
        nested_vmx_enter_non_root_mode(cpu, vcpu, fails)
    if fails == lib.VMENTRY_HALTED:
        nested_vmx_vmexit(cpu, vcpu)


def nested_vmx_enter_non_root_mode(cpu: Cpu, vcpu: Vcpu, fails: int = lib.VMENTRY_SUCCEEDS) -> None:
    """nested_vmx_enter_non_root_mode(): the vCPU enters L2 next, or, if a check fails, L1 as after a VM exit.

    RSM also enters L2 by it.
    """
    vmcs12, vmcs02 = vcpu.nested.vmcs12(), vcpu.nested.vmcs02
    assert vmcs02 is not None
    kvm_service_local_tlb_flush_requests(cpu, vcpu)
    vmx_switch_vmcs(cpu, vcpu, vmcs02)
    prepare_vmcs02_early(cpu, vcpu, vmcs12)
    nested_get_vmcs12_pages(cpu, vcpu, vmcs12)
    if fails == lib.VMENTRY_GUEST_STATE:
        vmentry_fail_vmexit(cpu, vcpu, vmcs12)
        return
    enter_guest_mode(cpu, vcpu)
    prepare_vmcs02(cpu, vcpu, vmcs12)
    if fails == lib.VMENTRY_MSR_LOAD:
        vmentry_fail_vmexit_guest_mode(cpu, vcpu, vmcs12)


def vmentry_fail_vmexit_guest_mode(cpu: Cpu, vcpu: Vcpu, vmcs12: Vmcs12) -> None:
    """vmentry_fail_vmexit_guest_mode (label): undo a VM entry that has entered guest mode.

    prepare_vmcs02() may have requested a flush for L2, and last_vpid says already that it was made.  So it is
    serviced here, while L2's context is current: later it would flush L1's.
    """
    kvm_service_local_tlb_flush_requests(cpu, vcpu)
    leave_guest_mode(cpu, vcpu)
    vmentry_fail_vmexit(cpu, vcpu, vmcs12)


def vmentry_fail_vmexit(cpu: Cpu, vcpu: Vcpu, vmcs12: Vmcs12) -> None:
    """vmentry_fail_vmexit (label): L1 goes on as after a VM exit, for which host state is loaded."""
    vmx_switch_vmcs(cpu, vcpu, vcpu.vmcs01)
    load_vmcs12_host_state(cpu, vcpu, vmcs12)


def load_vmcs12_host_state(cpu: Cpu, vcpu: Vcpu, vmcs12: Vmcs12) -> None:
    """load_vmcs12_host_state()"""
    assert vmcs12.host_state is not None
    nested_ept_uninit_mmu_context(vcpu)
    load_control_registers(vcpu, vmcs12.host_state)
    nested_vmx_load_cr3(cpu, vcpu, nested_ept=False)
    nested_vmx_transition_tlb_flush(cpu, vcpu, vmcs12, is_vmenter=False)


def nested_vmx_vmexit(cpu: Cpu, vcpu: Vcpu) -> None:
    """__nested_vmx_vmexit(): L2 exits to L1, which the vCPU enters next."""
    vmcs12 = vcpu.nested.vmcs12()
    kvm_service_local_tlb_flush_requests(cpu, vcpu)
    leave_guest_mode(cpu, vcpu)
    vmcs12.guest_state = control_registers(vcpu)  # sync_vmcs02_to_vmcs12()
    vmx_switch_vmcs(cpu, vcpu, vcpu.vmcs01)
    load_vmcs12_host_state(cpu, vcpu, vmcs12)


def nested_ept_inject_page_fault(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault, error_code: int) -> None:
    """nested_ept_inject_page_fault(): exit from L2 to L1, because L1's EPT forbids L2 the access.

    error_code: a misconfiguration or a violation, which L1 handles alike.
    """
    if not error_code & lib.PFERR_RSVD:
        sync_violating_gpa(cpu, vcpu, fault)
    mapped = error_code & lib.PFERR_PRESENT and not error_code & lib.PFERR_RSVD
    lib.vcpu_nested_ept_violation(cpu.m, vcpu.id, fault.addr, bool(mapped))
    nested_vmx_vmexit(cpu, vcpu)


# --- invalidations by L1 ------------------------------------------------------------------------------------


def handle_invvpid(cpu: Cpu, vcpu: Vcpu, kind: int, gla: int) -> None:
    """handle_invvpid(): flush vpid02, whichever VPID L1 names.

    If vmcs02 was loaded on another pCPU last, the flush is deferred to the next VM entry by forgetting
    last_vpid, because it must be made where L2 runs (6d00e67326d8).  Without EPT L2's tables are shadowed
    below roots of guest_mode, whose next load syncs them.  Decision nested_invvpid.
    """
    nested = vcpu.nested
    assert nested.vmcs02 is not None
    answer = vcpu.kvm.policy.nested_invvpid(cpu, vcpu)
    if answer == "none":
        flush_elided(cpu, vcpu.kvm, lib.REASON_GUEST, vcpu.id)
    elif answer == "pcpu-of-vmcs02" and cpu.id != nested.vmcs02.cpu:
        nested.last_vpid = 0
    elif kind == VMX_VPID_EXTENT_INDIVIDUAL_ADDR:
        vpid_sync_vcpu_addr(cpu, vcpu.kvm, nested_get_vpid02(vcpu), gla)
    else:
        vpid_sync(cpu, vcpu.kvm, nested_get_vpid02(vcpu), lib.REASON_GUEST)
    if not tdp_enabled(vcpu.kvm) and answer != "none":
        kvm_mmu_free_guest_mode_roots(cpu, vcpu.kvm, vcpu.root_mmu)
