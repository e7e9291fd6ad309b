"""arch/x86/kvm/smm.c: system-management mode.  It has memory slots of its own, and so roots of its own.

kvm_inject_smi      user space, any thread
process_smi         the vCPU services the request
enter_smm           before the next entry: the guest runs its handler, without paging
emulator_leave_smm  the guest executed RSM
"""

from __future__ import annotations

from emulator.kvm.kvm_host import (
    EFER_LMA,
    KVM_REQ_EVENT,
    KVM_REQ_SMI,
    X86_CR0_PE,
    X86_CR0_PG,
    X86_CR3_PCID_MASK,
    X86_CR4_PAE,
    X86_CR4_PCIDE,
)
from emulator.kvm.mmu.roots import kvm_mmu_reset_context
from emulator.kvm.regs import kvm_set_cr0, kvm_set_cr3, kvm_set_cr4, set_efer
from emulator.kvm.structs import Vcpu
from emulator.kvm.virt.requests import kvm_make_request, kvm_vcpu_kick
from emulator.machine.runtime import Cpu
from native import lib


def kvm_inject_smi(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_inject_smi(): deliver an SMI to the vCPU, for KVM_SMI or an interrupt of that delivery mode."""
    kvm_make_request(cpu, vcpu, KVM_REQ_SMI)
    kvm_vcpu_kick(cpu, vcpu)


def process_smi(vcpu: Vcpu) -> None:
    """process_smi()"""
    vcpu.arch.smi_pending = True


def kvm_smm_changed(cpu: Cpu, vcpu: Vcpu, entering_smm: bool) -> None:
    """kvm_smm_changed(): switch the address space, and with it role and root; on leaving, request a latched
    INIT."""
    vcpu.arch.smm = entering_smm
    if not entering_smm and vcpu.arch.init_latched:
        vcpu.arch.init_latched = False
        kvm_make_request(cpu, vcpu, KVM_REQ_EVENT)
    kvm_mmu_reset_context(cpu, vcpu)


def enter_smm(cpu: Cpu, vcpu: Vcpu) -> None:
    """enter_smm(): save registers to SMRAM and turn paging off.

    CR0 and CR4 change without the flush requests of kvm_set_cr0() and kvm_set_cr4(), so the guest's cached
    translations are still there after RSM, as after an SMI on hardware.
    """
    cpu.stat(vcpu.kvm.id, lib.STAT_SMIS)
    arch = vcpu.arch
    arch.smram = (arch.cr0, arch.cr3, arch.cr4, arch.efer)
    vcpu.kvm.x86_ops.enter_smm(cpu, vcpu)
    kvm_smm_changed(cpu, vcpu, entering_smm=True)
    arch.cr0 &= ~(X86_CR0_PE | X86_CR0_PG)
    arch.cr4 = arch.efer = 0
    lib.vcpu_set_smm(cpu.m, vcpu.id, True)
    kvm_mmu_reset_context(cpu, vcpu)


def emulator_leave_smm(cpu: Cpu, vcpu: Vcpu) -> None:
    """emulator_leave_smm(): return to real mode first, then restore the registers from SMRAM."""
    arch = vcpu.arch
    kvm_smm_changed(cpu, vcpu, entering_smm=False)
    lib.vcpu_set_smm(cpu.m, vcpu.id, False)
    arch.leaving_smm = True
    try:
        if arch.cr4 & X86_CR4_PCIDE:
            kvm_set_cr4(cpu, vcpu, arch.cr4 & ~X86_CR4_PCIDE)
        if arch.cr0 & X86_CR0_PE:
            kvm_set_cr0(cpu, vcpu, arch.cr0 & ~(X86_CR0_PG | X86_CR0_PE))
        if arch.cr4 & X86_CR4_PAE:
            kvm_set_cr4(cpu, vcpu, arch.cr4 & ~X86_CR4_PAE)
        set_efer(cpu, vcpu, 0)
        vcpu.kvm.x86_ops.leave_smm(cpu, vcpu)
        *registers, efer = arch.smram
        set_efer(cpu, vcpu, efer & ~EFER_LMA)
        rsm_enter_protected_mode(cpu, vcpu, *registers)
    finally:
        arch.leaving_smm = False


def rsm_enter_protected_mode(cpu: Cpu, vcpu: Vcpu, cr0: int, cr3: int, cr4: int) -> None:
    """rsm_enter_protected_mode(): set CR4.PCIDE only once paging is on, with CR3[11:0] clear until then."""
    pcid = 0
    if cr4 & X86_CR4_PCIDE:
        pcid = cr3 & X86_CR3_PCID_MASK
        cr3 &= ~X86_CR3_PCID_MASK
    kvm_set_cr3(cpu, vcpu, cr3)
    kvm_set_cr4(cpu, vcpu, cr4 & ~X86_CR4_PCIDE)
    kvm_set_cr0(cpu, vcpu, cr0)
    if cr4 & X86_CR4_PCIDE:
        kvm_set_cr4(cpu, vcpu, cr4)
        if pcid:
            kvm_set_cr3(cpu, vcpu, cr3 | pcid)
