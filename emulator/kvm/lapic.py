"""arch/x86/kvm/lapic.c: the local APIC's mode, and the page through which a guest accesses it in xAPIC mode.

A guest reads and writes the registers of its xAPIC at one guest-physical page.  KVM maps a frame of memory
there, and writes the frame's address into the VMCS, so that the processor turns each access into a VM exit.
"""

from __future__ import annotations

from emulator.kvm.kvm_host import APIC_ACCESS_PAGE_PRIVATE_MEMSLOT, LAPIC_MODE_XAPIC
from emulator.kvm.structs import Kvm, Vcpu
from emulator.kvm.virt.memslots import kvm_set_memory_region
from emulator.machine.runtime import Cpu
from native.types import Gfn, Hva


def apic_base_gfn(kvm: Kvm) -> Gfn:
    """Return the gfn that stands for APIC_DEFAULT_PHYS_BASE: the last one of the VM.

    With the real one, 0xfee00, each array with an element per gfn would have a million elements.
    """
    return Gfn(kvm.gfns - 1)


def kvm_alloc_apic_access_page(cpu: Cpu, kvm: Kvm) -> None:
    """kvm_alloc_apic_access_page(): create the private memslot of the page, which all vCPUs share."""
    if APIC_ACCESS_PAGE_PRIVATE_MEMSLOT not in kvm.memslots[0].by_id:
        gfn = apic_base_gfn(kvm)
        kvm_set_memory_region(cpu, kvm, APIC_ACCESS_PAGE_PRIVATE_MEMSLOT, gfn, 1, Hva(gfn))


def kvm_apic_set_base(cpu: Cpu, vcpu: Vcpu, mode: str) -> None:
    """__kvm_apic_set_base(), for WRMSR of IA32_APIC_BASE: set the APIC's mode; its address never changes."""
    if mode != vcpu.arch.apic_mode:
        vcpu.arch.apic_mode = mode
        vcpu.kvm.x86_ops.set_virtual_apic_mode(cpu, vcpu)


def kvm_create_lapic(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_create_lapic(), kvm_lapic_reset(): give the vCPU an APIC in xAPIC mode."""
    kvm_alloc_apic_access_page(cpu, vcpu.kvm)
    kvm_apic_set_base(cpu, vcpu, LAPIC_MODE_XAPIC)


def kvm_vcpu_reload_apic_access_page(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_vcpu_reload_apic_access_page(), for KVM_REQ_APIC_PAGE_RELOAD"""
    vcpu.kvm.x86_ops.set_apic_access_page_addr(cpu, vcpu)
