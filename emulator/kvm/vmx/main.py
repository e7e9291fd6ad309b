"""arch/x86/kvm/vmx/main.c: Intel's operations, as kvm-intel.ko registers them."""

from __future__ import annotations

from typing import Final

from emulator.kvm.kvm_host import ExitToUser
from emulator.kvm.structs import Kvm, Vcpu
from emulator.kvm.vmx import apic, exits, nested, nested_smm, vmx
from emulator.kvm.x86_ops import KvmX86Ops
from emulator.machine.runtime import Cpu
from native.types import FlushReason, Hfn, Level


class VtX86Ops:
    """struct kvm_x86_ops vt_x86_ops; see KvmX86Ops.

    Each operation finds its function in the module when it is called: a policy may have replaced it there.
    """

    __slots__ = ()

    def vcpu_create(self, cpu: Cpu, kvm: Kvm) -> Vcpu:
        return vmx.vmx_vcpu_create(cpu, kvm)

    def vcpu_free(self, cpu: Cpu, vcpu: Vcpu) -> None:
        nested.nested_vmx_free_vcpu(cpu, vcpu)
        vmx.vmx_vcpu_free(cpu, vcpu)

    def vcpu_reset(self, cpu: Cpu, vcpu: Vcpu) -> None:
        vmx.vmx_vcpu_reset(cpu, vcpu)

    def vcpu_load(self, cpu: Cpu, vcpu: Vcpu) -> None:
        vmx.vmx_vcpu_load_vmcs(cpu, vcpu)

    def set_cr0(self, cpu: Cpu, vcpu: Vcpu, old_cr0: int, cr0: int) -> None:
        vmx.vmx_set_cr0(cpu, vcpu, old_cr0, cr0)

    def set_cr4(self, cpu: Cpu, vcpu: Vcpu) -> None:
        vmx.vmx_set_cr4(cpu, vcpu)

    def enter_smm(self, cpu: Cpu, vcpu: Vcpu) -> None:
        nested_smm.vmx_enter_smm(cpu, vcpu)

    def leave_smm(self, cpu: Cpu, vcpu: Vcpu) -> None:
        nested_smm.vmx_leave_smm(cpu, vcpu)

    def set_virtual_apic_mode(self, cpu: Cpu, vcpu: Vcpu) -> None:
        apic.vmx_set_virtual_apic_mode(cpu, vcpu)

    def set_apic_access_page_addr(self, cpu: Cpu, vcpu: Vcpu) -> None:
        apic.vmx_set_apic_access_page_addr(cpu, vcpu)

    def handle_exit(self, cpu: Cpu, vcpu: Vcpu) -> ExitToUser | None:
        return exits.vmx_handle_exit(cpu, vcpu)

    def load_mmu_pgd(self, cpu: Cpu, vcpu: Vcpu, root_hfn: Hfn, root_level: Level) -> None:
        vmx.vmx_load_mmu_pgd(cpu, vcpu, root_hfn, root_level)

    def flush_tlb_all(self, cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
        vmx.vmx_flush_tlb_all(cpu, vcpu, reason)

    def flush_tlb_current(self, cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
        vmx.vmx_flush_tlb_current(cpu, vcpu, reason)

    def flush_tlb_guest(self, cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
        vmx.vmx_flush_tlb_guest(cpu, vcpu, reason)

    def flush_tlb_gva(self, cpu: Cpu, vcpu: Vcpu, addr: int) -> None:
        vmx.vmx_flush_tlb_gva(cpu, vcpu, addr)


vt_x86_ops: Final[KvmX86Ops] = VtX86Ops()
