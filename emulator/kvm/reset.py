"""lapic.c, x86.c: INIT, by which one vCPU makes another boot again.

apic_send_init          another vCPU's ICR write, as in the INIT-SIPI-SIPI of a reboot or of kexec; any thread
kvm_apic_accept_events  the vCPU serves the request
kvm_vcpu_reset          registers as after INIT; the guest's translations are gone
"""

from __future__ import annotations

from emulator.kvm.kvm_host import EFER_LMA, KVM_REQ_EVENT, KVM_REQ_TLB_FLUSH_GUEST, X86_CR0_PG, X86_CR4_PCIDE
from emulator.kvm.mmu.roots import kvm_mmu_reset_context
from emulator.kvm.structs import Vcpu, tdp_enabled
from emulator.kvm.virt.requests import kvm_make_request, kvm_vcpu_kick
from emulator.machine.runtime import Cpu
from native import lib


def apic_send_init(cpu: Cpu, vcpu: Vcpu) -> None:
    """__apic_accept_irq() for APIC_DM_INIT: deliver an INIT to `vcpu`.

    INIT is the only event in this model, so KVM_REQ_EVENT alone stands for it.
    """
    kvm_make_request(cpu, vcpu, KVM_REQ_EVENT)
    kvm_vcpu_kick(cpu, vcpu)


def kvm_apic_accept_events(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_apic_accept_events(): reset the vCPU on INIT; in SMM, latch the INIT until RSM.

    The SIPI is taken to have arrived with the INIT, so the vCPU never waits for it.
    """
    if vcpu.arch.smm:
        vcpu.arch.init_latched = True
        return
    kvm_vcpu_reset(cpu, vcpu, init_event=True)


def power_on(cpu: Cpu, vcpu: Vcpu, *, paging: bool, pcid: bool) -> None:
    """Put a new vCPU into the state after power-up, which its guest leaves by enabling paging itself.

    Without EPT each of these steps exits to KVM.  With EPT a vCPU starts behind them (KVM_SET_SREGS), because
    nothing of it concerns KVM.  `paging`: the guest's OS has set CR0.PG by then; `pcid`: CR4.PCIDE, too.
    """
    if tdp_enabled(vcpu.kvm):
        if not paging:
            vcpu.arch.cr0 &= ~X86_CR0_PG
            vcpu.arch.efer &= ~EFER_LMA
        if pcid:
            vcpu.arch.cr4 |= X86_CR4_PCIDE
        return
    vcpu.arch.cr0 = vcpu.arch.cr3 = vcpu.arch.cr4 = vcpu.arch.efer = 0
    kvm_mmu_reset_context(cpu, vcpu)
    lib.guest_power_on(cpu.m, vcpu.id)


def kvm_vcpu_reset(cpu: Cpu, vcpu: Vcpu, init_event: bool) -> None:
    """kvm_vcpu_reset(): reset the registers that decide about roots and flushes.

    Roots are freed only if CR0.PG was set.  A guest flush is requested if CR0.PG was set, and always on INIT,
    which drops all translations by the SDM (vol. 3A, 10.1) and in KVM (df37ed38e6c2, 5.15).
    """
    arch = vcpu.arch
    old_cr0 = arch.cr0
    cpu.stat(vcpu.kvm.id, lib.STAT_RESETS)
    arch.smi_pending = False
    vcpu.kvm.x86_ops.vcpu_reset(cpu, vcpu)
    arch.cr3 = arch.cr0 = arch.cr4 = 0
    vcpu.kvm.x86_ops.set_cr0(cpu, vcpu, old_cr0, arch.cr0)
    arch.efer = 0
    vcpu.kvm.x86_ops.set_cr4(cpu, vcpu)
    if old_cr0 & X86_CR0_PG:
        kvm_make_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST)
        kvm_mmu_reset_context(cpu, vcpu)
    if init_event:
        kvm_make_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST)
    # RIP points at the reset vector.
    lib.guest_boot(cpu.m, vcpu.id)
