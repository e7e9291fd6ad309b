"""arch/x86/kvm/vmx/vmx.c: exits, of L1 and of L2."""

from __future__ import annotations

from emulator.kvm.emulate import emulate_store
from emulator.kvm.kvm_host import ExitToUser
from emulator.kvm.mmu.fault import (
    EFAULT,
    ENOMEM,
    RET_PF_EMULATE,
    RET_PF_RETRY,
    RET_PF_WRITE_PROTECTED,
)
from emulator.kvm.mmu.page_fault import ept_error_code, kvm_mmu_page_fault
from emulator.kvm.regs import (
    kvm_handle_invpcid,
    kvm_mmu_invlpg,
    kvm_set_cr0,
    kvm_set_cr3,
    kvm_set_cr4,
    set_efer,
)
from emulator.kvm.smm import emulator_leave_smm
from emulator.kvm.structs import Vcpu
from emulator.kvm.vmx.nested import nested_vmx_vmexit
from emulator.kvm.vmx.nested_insn import handle_vmx_instruction
from emulator.kvm.vmx.vmcs12 import nested_cpu_virtualizes_apic
from emulator.machine.runtime import Cpu, MachineError, cpu_relax
from native import lib


def vmx_handle_exit(cpu: Cpu, vcpu: Vcpu) -> ExitToUser | None:
    """vmx_handle_exit(): handle the exit; return why KVM_RUN ends, or None to enter again."""
    reason = vcpu.exit.reason
    cpu.stat(vcpu.kvm.id, lib.STAT_EXITS)
    if reason == lib.EXIT_EPT_VIOLATION:
        return handle_ept_violation(cpu, vcpu)
    if reason == lib.EXIT_EXCEPTION:
        return vmx_handle_page_fault(cpu, vcpu)
    if reason == lib.EXIT_INSTRUCTION:
        return handle_instruction(cpu, vcpu, vcpu.exit.access, vcpu.exit.linear)
    if reason == lib.EXIT_APIC_ACCESS:
        handle_apic_access(cpu, vcpu)
    if reason == lib.EXIT_TRIPLE_FAULT:
        return ExitToUser("shutdown")
    if reason == lib.EXIT_EPT_MISCONFIG:
        raise MachineError(f"EPT misconfiguration of {vcpu!r} at {vcpu.exit.gpa:#x}")
    return None


def handle_ept_violation(cpu: Cpu, vcpu: Vcpu) -> ExitToUser | None:
    """handle_ept_violation()

    If L1 stores to a write-protected table of the EPT that it has for a nested guest, the store is emulated.
    """
    exit_info = vcpu.exit
    gpa, access = exit_info.gpa, exit_info.access
    r = kvm_mmu_page_fault(cpu, vcpu, gpa, access, bool(exit_info.rights))
    if r == RET_PF_WRITE_PROTECTED:
        r = emulate_store(cpu, vcpu, gpa, ept_error_code(access))
    if r == RET_PF_RETRY:
        # The guest will fault again at once, as long as the invalidation is in progress.
        cpu_relax(cpu)
    return exit_after_fault(r, gpa, access)


def vmx_handle_page_fault(cpu: Cpu, vcpu: Vcpu) -> ExitToUser | None:
    """vmx_handle_page_fault(): handle the guest's #PF, which exits without EPT.

    A store to a guest's table that must stay read-only is emulated.
    """
    exit_info = vcpu.exit
    linear, access, error_code = exit_info.linear, exit_info.access, exit_info.error_code
    present = bool(error_code & lib.PFERR_PRESENT)
    r = kvm_mmu_page_fault(cpu, vcpu, linear, access, present, error_code)
    if r == RET_PF_WRITE_PROTECTED:
        r = emulate_store(cpu, vcpu, linear, error_code)
    if r == RET_PF_RETRY:
        cpu_relax(cpu)
    return exit_after_fault(r, linear, access)


def exit_after_fault(r: int, addr: int, access: int) -> ExitToUser | None:
    """Return why KVM_RUN ends after a fault with the result `r`, or None to enter again."""
    if r == RET_PF_EMULATE:
        return ExitToUser("mmio", addr, access == lib.ACCESS_WRITE)
    if r == EFAULT:
        return ExitToUser("fault", addr, access == lib.ACCESS_WRITE)
    if r == ENOMEM:
        return ExitToUser("no-memory", addr)
    return None


def handle_apic_access(cpu: Cpu, vcpu: Vcpu) -> None:
    """handle_apic_access(): emulate an access to L1's APIC; no translation changes, so nothing is done here.

    If L2 accesses the APIC-access page of its VMCS12, KVM hands the exit to L1.
    """
    if vcpu.arch.guest_mode and nested_cpu_virtualizes_apic(vcpu.nested.vmcs12()):
        nested_vmx_vmexit(cpu, vcpu)


def handle_instruction(cpu: Cpu, vcpu: Vcpu, insn: int, operand: int) -> ExitToUser | None:
    """handle_cr(), and the emulation of other instructions that exit; return why KVM_RUN ends.

    A general-protection fault ends it (kvm_complete_insn_gp): the guest's OS handles none, so that a third
    fault follows.  So does OUT, after which user space calls KVM_RUN again.
    """
    if insn >= lib.GUEST_INSN_VMXON:
        handle_vmx_instruction(cpu, vcpu, insn, operand)
    elif insn == lib.GUEST_INSN_OUT:
        return ExitToUser("io")
    elif insn == lib.GUEST_INSN_CPUID:
        pass  # the answer depends on no translation
    elif insn == lib.GUEST_INSN_RSM:
        emulator_leave_smm(cpu, vcpu)
    elif insn == lib.GUEST_INSN_INVLPG:
        kvm_mmu_invlpg(cpu, vcpu, operand)
    elif insn == lib.GUEST_INSN_INVPCID:
        kvm_handle_invpcid(cpu, vcpu, vcpu.exit.invpcid_type, vcpu.exit.invpcid_pcid, operand)
    elif not handle_cr(cpu, vcpu, insn, operand):
        return ExitToUser("shutdown")
    return None


def handle_cr(cpu: Cpu, vcpu: Vcpu, insn: int, value: int) -> bool:
    """handle_cr(), kvm_emulate_wrmsr(): handle an exit by MOV to a control register, or WRMSR of EFER; return
    False if the guest gets a general-protection fault."""
    if insn == lib.GUEST_INSN_MOV_CR0:
        return kvm_set_cr0(cpu, vcpu, value)
    if insn == lib.GUEST_INSN_MOV_CR3:
        return kvm_set_cr3(cpu, vcpu, value)
    if insn == lib.GUEST_INSN_WRMSR_EFER:
        return set_efer(cpu, vcpu, value)
    return kvm_set_cr4(cpu, vcpu, value)
