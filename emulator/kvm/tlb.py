"""arch/x86/kvm/x86.c: servicing the requests to flush a vCPU's TLB."""

from __future__ import annotations

from emulator.kvm.kvm_host import KVM_REQ_TLB_FLUSH_CURRENT, KVM_REQ_TLB_FLUSH_GUEST
from emulator.kvm.mmu.roots import kvm_mmu_sync_prev_roots
from emulator.kvm.mmu.sync import kvm_mmu_sync_roots
from emulator.kvm.structs import Vcpu, tdp_enabled
from emulator.kvm.virt.requests import kvm_check_request
from emulator.machine.runtime import Cpu
from native import lib
from native.types import FlushReason


def kvm_vcpu_flush_tlb_all(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_vcpu_flush_tlb_all(): service KVM_REQ_TLB_FLUSH, once for all that were made.

    Decision remote_flush.  The flush covers KVM_REQ_TLB_FLUSH_CURRENT, but not _GUEST.
    """
    kvm = vcpu.kvm
    reasons: int = lib.vcpu_take_flush_reasons(cpu.m, vcpu.id)
    reason = FlushReason((reasons & -reasons).bit_length() - 1) if reasons else lib.REASON_OTHER
    vcpu.flush_reasons, vcpu.flush_reason = reasons, reason
    cpu.stat(kvm.id, lib.STAT_TLB_FLUSH)
    answer = kvm.policy.remote_flush(cpu, vcpu)
    if answer == "all-contexts":
        kvm.x86_ops.flush_tlb_all(cpu, vcpu, reason)
    elif answer == "current-context":
        kvm.x86_ops.flush_tlb_current(cpu, vcpu, reason)
    kvm_check_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_CURRENT)


def kvm_service_local_tlb_flush_requests(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_service_local_tlb_flush_requests(): service the requests to flush the current context."""
    kvm = vcpu.kvm
    if kvm_check_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_CURRENT):
        cpu.stat(kvm.id, lib.STAT_TLB_FLUSH)
        kvm.x86_ops.flush_tlb_current(cpu, vcpu, vcpu.flush_current_reason)
    if kvm_check_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST):
        cpu.stat(kvm.id, lib.STAT_TLB_FLUSH)
        if not tdp_enabled(kvm):
            # The guest invalidates everything, so no root may be out of date (b53e84eed08b).
            kvm_mmu_sync_roots(cpu, vcpu)
            kvm_mmu_sync_prev_roots(cpu, vcpu)
        kvm.x86_ops.flush_tlb_guest(cpu, vcpu, lib.REASON_GUEST)
