"""virt/kvm/kvm_main.c: its functions, re-exported from the files that they are spread over here."""

from __future__ import annotations

from emulator.kvm.decisions import Decisions
from emulator.kvm.structs import Kvm, KvmParams
from emulator.kvm.virt import vm
from emulator.kvm.virt.dirty_log import (
    kvm_vm_ioctl_clear_dirty_log,
    kvm_vm_ioctl_enable_manual_dirty_log,
    kvm_vm_ioctl_get_dirty_log,
)
from emulator.kvm.virt.memslots import kvm_set_memory_region
from emulator.kvm.virt.mmu_notifier import (
    kvm_mmu_notifier_clear_flush_young,
    kvm_mmu_notifier_clear_young,
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
)
from emulator.kvm.virt.requests import (
    kvm_flush_remote_tlbs,
    kvm_flush_remote_tlbs_memslot,
    kvm_flush_remote_tlbs_range,
    kvm_make_all_cpus_request,
    kvm_make_request,
    kvm_make_vcpu_request,
    kvm_vcpu_kick,
)
from emulator.kvm.virt.vcpu import kvm_sched_in, kvm_sched_out, vcpu_load, vcpu_put
from emulator.kvm.virt.vm import kvm_destroy_vm, kvm_vm_ioctl_create_vcpu
from emulator.kvm.vmx.main import vt_x86_ops
from emulator.machine.runtime import Cpu

__all__ = [
    "kvm_create_vm",
    "kvm_destroy_vm",
    "kvm_flush_remote_tlbs",
    "kvm_flush_remote_tlbs_memslot",
    "kvm_flush_remote_tlbs_range",
    "kvm_make_all_cpus_request",
    "kvm_make_request",
    "kvm_make_vcpu_request",
    "kvm_mmu_notifier_clear_flush_young",
    "kvm_mmu_notifier_clear_young",
    "kvm_mmu_notifier_invalidate_range_end",
    "kvm_mmu_notifier_invalidate_range_start",
    "kvm_sched_in",
    "kvm_sched_out",
    "kvm_set_memory_region",
    "kvm_vcpu_kick",
    "kvm_vm_ioctl_clear_dirty_log",
    "kvm_vm_ioctl_create_vcpu",
    "kvm_vm_ioctl_enable_manual_dirty_log",
    "kvm_vm_ioctl_get_dirty_log",
    "vcpu_load",
    "vcpu_put",
]


def kvm_create_vm(cpu: Cpu, gfns: int, policy: Decisions, params: KvmParams | None = None) -> Kvm:
    """kvm_create_vm() on a host where kvm-intel.ko is loaded."""
    return vm.kvm_create_vm(cpu, gfns, policy, vt_x86_ops, params or KvmParams())
