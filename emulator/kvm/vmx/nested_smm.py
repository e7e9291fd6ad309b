"""arch/x86/kvm/vmx/vmx.c: system-management mode of a vCPU in VMX operation.

SMM is outside of VMX operation: its handler runs as L1, with L1's VMCS and the root of its own address space.
KVM leaves a nested guest as for a VM exit, of which L1 hears nothing, and enters it again at RSM.  So both
make the flushes of a transition between L1 and L2.
"""

from __future__ import annotations

from emulator.kvm.structs import Vcpu
from emulator.kvm.vmx.nested import nested_vmx_enter_non_root_mode, nested_vmx_vmexit
from emulator.machine.runtime import Cpu


def vmx_enter_smm(cpu: Cpu, vcpu: Vcpu) -> None:
    """vmx_enter_smm(): leave a nested guest, and VMX operation."""
    nested = vcpu.nested
    nested.smm_guest_mode = vcpu.arch.guest_mode
    if nested.smm_guest_mode:
        nested_vmx_vmexit(cpu, vcpu)
    nested.smm_vmxon, nested.vmxon = nested.vmxon, False


def vmx_leave_smm(cpu: Cpu, vcpu: Vcpu) -> None:
    """vmx_leave_smm(): go back into VMX operation, and enter the nested guest again.

    Its VMCS12 has L2's registers, which RSM then loads from SMRAM once more.
    """
    nested = vcpu.nested
    nested.vmxon, nested.smm_vmxon = nested.vmxon or nested.smm_vmxon, False
    if nested.smm_guest_mode:
        nested_vmx_enter_non_root_mode(cpu, vcpu)
        nested.smm_guest_mode = False
