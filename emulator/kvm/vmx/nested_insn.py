"""arch/x86/kvm/vmx/nested.c: the VMX instructions that L1 and L2 exit with."""

from __future__ import annotations

from typing import Final

from emulator.kvm.mmu.roots import mmu_roots
from emulator.kvm.structs import Vcpu
from emulator.kvm.vmx.nested import (
    enter_vmx_operation,
    free_nested,
    handle_invvpid,
    handle_vmclear,
    handle_vmptrld,
    handle_vmwrite,
    nested_vmx_run,
    nested_vmx_vmexit,
)
from emulator.kvm.vmx.nested_ept import handle_invept, nested_vmx_eptp_switching
from emulator.machine.runtime import Cpu
from native import lib
from native.types import VmStat

# Instructions of L1 that may free roots of guest_mmu.
_FREES_ROOTS: Final = (
    lib.GUEST_INSN_INVEPT,
    lib.GUEST_INSN_VMPTRLD,
    lib.GUEST_INSN_VMCLEAR,
    lib.GUEST_INSN_VMXOFF,
)
# The counters of instructions that are counted.
_STATS: Final[dict[int, VmStat]] = {
    lib.GUEST_INSN_VMLAUNCH: lib.STAT_NESTED_RUN,
    lib.GUEST_INSN_INVEPT: lib.STAT_NESTED_INVEPT,
    lib.GUEST_INSN_INVVPID: lib.STAT_NESTED_INVVPID,
}


def handle_vmx_instruction(cpu: Cpu, vcpu: Vcpu, insn: int, operand: int) -> None:
    """Emulate a VMX instruction of L1, or (VMCALL) let L2 exit to L1, and keep statistics of it."""
    roots = len(mmu_roots(vcpu.guest_mmu))
    emulate_vmx_instruction(cpu, vcpu, insn, operand)
    if insn in _STATS:
        cpu.stat(vcpu.kvm.id, _STATS[insn])
    if insn in _FREES_ROOTS:
        cpu.stat(vcpu.kvm.id, lib.STAT_NESTED_ROOTS_FREED, roots - len(mmu_roots(vcpu.guest_mmu)))


def emulate_vmx_instruction(cpu: Cpu, vcpu: Vcpu, insn: int, operand: int) -> None:
    """handle_vmxon(), handle_vmlaunch() and the other handlers of VMX instructions."""
    if insn == lib.GUEST_INSN_VMXON:
        enter_vmx_operation(cpu, vcpu)
    elif insn == lib.GUEST_INSN_VMXOFF:
        free_nested(cpu, vcpu)
    elif insn == lib.GUEST_INSN_VMPTRLD:
        handle_vmptrld(cpu, vcpu, operand)
    elif insn == lib.GUEST_INSN_VMCLEAR:
        handle_vmclear(cpu, vcpu, operand)
    elif insn == lib.GUEST_INSN_VMWRITE:
        handle_vmwrite(vcpu, vcpu.exit.invpcid_type, operand)
    elif insn == lib.GUEST_INSN_VMLAUNCH:
        nested_vmx_run(cpu, vcpu, vcpu.exit.invpcid_type)
    elif insn == lib.GUEST_INSN_VMCALL:
        nested_vmx_vmexit(cpu, vcpu)
    elif insn == lib.GUEST_INSN_VMWRITE_EPTP:
        vcpu.nested.vmcs12().ept_pointer = operand
    elif insn == lib.GUEST_INSN_VMFUNC:
        nested_vmx_eptp_switching(cpu, vcpu, operand)
    elif insn == lib.GUEST_INSN_INVEPT:
        handle_invept(cpu, vcpu, vcpu.exit.invpcid_type, operand)
    else:
        handle_invvpid(cpu, vcpu, vcpu.exit.invpcid_type, operand)
