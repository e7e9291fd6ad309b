"""virt/kvm/kvm_main.c and x86.c: loading a vCPU on a pCPU and taking it off."""

from __future__ import annotations

from emulator.kvm.host_work import vcpus_went_on
from emulator.kvm.structs import Vcpu
from emulator.machine.runtime import Cpu
from native import lib


def kvm_arch_vcpu_load(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_arch_vcpu_load(): set vcpu->cpu after the vendor's hook, which still sees the old value."""
    if vcpu.kvm.heard.vcpu_loading is not None:
        vcpu.kvm.heard.vcpu_loading(cpu, vcpu)
    vcpu.kvm.x86_ops.vcpu_load(cpu, vcpu)
    cpu.point("vcpu->cpu", vcpu.id, "write")
    lib.vcpu_set_cpu(cpu.m, vcpu.id, cpu.id)
    vcpu.loaded = True
    cpu.vcpu = vcpu


def kvm_arch_vcpu_put(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_arch_vcpu_put(): unload the vCPU; its VMCS stays loaded and vcpu->cpu set, maybe both stale."""
    vcpu.loaded = False
    cpu.vcpu = None
    if vcpu.kvm.params.host_takes_time:
        vcpus_went_on(vcpu.kvm)


def vcpu_load(cpu: Cpu, vcpu: Vcpu) -> None:
    """vcpu_load(): load the vCPU at the start of an ioctl."""
    kvm_arch_vcpu_load(cpu, vcpu)


def vcpu_put(cpu: Cpu, vcpu: Vcpu) -> None:
    """vcpu_put(): unload the vCPU at the end of an ioctl."""
    kvm_arch_vcpu_put(cpu, vcpu)


def kvm_sched_in(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_sched_in(): load the vCPU from the preempt notifier; its thread resumes here, inside an ioctl."""
    kvm_arch_vcpu_load(cpu, vcpu)


def kvm_sched_out(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_sched_out(): put the vCPU from the preempt notifier; its thread leaves here, inside an ioctl."""
    kvm_arch_vcpu_put(cpu, vcpu)
