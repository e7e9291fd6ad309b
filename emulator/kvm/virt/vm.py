"""virt/kvm/kvm_main.c: creation and destruction of VMs and vCPUs."""

from __future__ import annotations

from emulator.kvm.decisions import Decisions
from emulator.kvm.kvm_host import KVM_REQ_TLB_FLUSH_GUEST
from emulator.kvm.lapic import kvm_create_lapic
from emulator.kvm.mmu.mmu import kvm_mmu_uninit_vm, kvm_mmu_zap_all
from emulator.kvm.mmu.roots import kvm_init_mmu, kvm_mmu_destroy
from emulator.kvm.structs import Kvm, KvmParams, Vcpu
from emulator.kvm.virt.requests import kvm_make_request
from emulator.kvm.x86_ops import KvmX86Ops
from emulator.machine.runtime import Cpu
from native import lib
from native.types import VmId


def kvm_create_vm(cpu: Cpu, gfns: int, policy: Decisions, x86_ops: KvmX86Ops, params: KvmParams) -> Kvm:
    """kvm_create_vm(): make a VM with `gfns` pages of guest-physical address space, and no memslot yet."""
    vm = VmId(cpu.check(lib.vm_create(cpu.m, gfns)))
    return Kvm(cpu.machine, vm, gfns, policy, x86_ops, params)


def kvm_vm_ioctl_create_vcpu(cpu: Cpu, kvm: Kvm) -> Vcpu:
    """KVM_CREATE_VCPU: make a vCPU, then set its registers (KVM_SET_SREGS), as every user space does next."""
    vcpu = kvm.x86_ops.vcpu_create(cpu, kvm)
    kvm_init_mmu(vcpu)
    if kvm.params.flexpriority:
        kvm_create_lapic(cpu, vcpu)
    kvm_arch_vcpu_ioctl_set_sregs(cpu, vcpu)
    with kvm.slots_lock.held(cpu):
        kvm.vcpus = (*kvm.vcpus, vcpu)
    return vcpu


def kvm_arch_vcpu_ioctl_set_sregs(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_arch_vcpu_ioctl_set_sregs(): flush the guest's TLB, as user space changed special registers."""
    kvm_make_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST)


def kvm_destroy_vm(cpu: Cpu, kvm: Kvm) -> None:
    """kvm_destroy_vm(): destroy a VM without a flush, because its vCPUs run no more.

    Wait for the RCU callbacks that free its pages.
    """
    kvm_mmu_zap_all(cpu, kvm)  # kvm_mmu_notifier_release()
    for vcpu in kvm.vcpus:
        kvm_mmu_destroy(cpu, vcpu)
        kvm.x86_ops.vcpu_free(cpu, vcpu)
        lib.vcpu_destroy(cpu.m, vcpu.id)
    kvm.vcpus = ()
    kvm_mmu_uninit_vm(cpu, kvm)
    lib.vm_destroy(cpu.m, kvm.id)
