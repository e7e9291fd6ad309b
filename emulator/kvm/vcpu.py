"""virt/kvm/kvm_main.c and x86.c: loading a vCPU on a pCPU and taking it off."""

from __future__ import annotations

from emulator.kvm.host_work import vcpus_went_on
from emulator.kvm.structs import Vcpu
from emulator.kvm.vmx import request_tlb_flush, vmx_vcpu_load_vmcs
from emulator.machine.runtime import Cpu
from native import lib


def kvm_arch_vcpu_load(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_arch_vcpu_load(): vcpu->cpu changes after the vendor's hook, which still sees the old one."""
    vmx_vcpu_load_vmcs(cpu, vcpu)
    join_pcpu_mask(cpu, vcpu)
    cpu.point("vcpu->cpu", vcpu.id, "write")
    lib.vcpu_set_cpu(cpu.m, vcpu.id, cpu.id)
    vcpu.loaded = True
    cpu.vcpu = vcpu


def join_pcpu_mask(cpu: Cpu, vcpu: Vcpu) -> None:
    """Decisions remote_kick and root_alloc=vm-pcpu-mask: a pCPU that joins the VM's mask missed the flushes
    before.  It joins first: who reads the mask from here on includes it."""
    kvm = vcpu.kvm
    if kvm.pcpu_mask[cpu.id]:
        return
    cpu.point("pcpu_mask", kvm.id, "write")
    kvm.pcpu_mask[cpu.id] = 1
    if kvm.policy.remote_kick(cpu, kvm) == "vm-pcpu-mask" or kvm.policy.may_answer(
        "root_alloc", ("vm-pcpu-mask",)
    ):
        request_tlb_flush(cpu, vcpu, lib.REASON_PCPU_MASK)


def kvm_arch_vcpu_put(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_arch_vcpu_put(): the VMCS stays loaded and vcpu->cpu stays what it is; both may be stale."""
    vcpu.loaded = False
    cpu.vcpu = None
    if vcpu.kvm.params.host_takes_time:
        vcpus_went_on(vcpu.kvm)


def vcpu_load(cpu: Cpu, vcpu: Vcpu) -> None:
    """vcpu_load(): at the start of an ioctl."""
    kvm_arch_vcpu_load(cpu, vcpu)


def vcpu_put(cpu: Cpu, vcpu: Vcpu) -> None:
    """vcpu_put(): at its end."""
    kvm_arch_vcpu_put(cpu, vcpu)


def kvm_sched_in(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_sched_in(): the preempt notifier; the thread goes on on this pCPU, in the middle of an ioctl."""
    kvm_arch_vcpu_load(cpu, vcpu)


def kvm_sched_out(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_sched_out(): the preempt notifier; the thread leaves this pCPU in the middle of an ioctl."""
    kvm_arch_vcpu_put(cpu, vcpu)
