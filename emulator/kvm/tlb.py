"""arch/x86/kvm/x86.c: servicing the requests to flush a vCPU's TLB."""

from __future__ import annotations

from typing import Final

from emulator.kvm.accounting import flush_elided
from emulator.kvm.kvm_host import KVM_REQ_TLB_FLUSH_CURRENT, KVM_REQ_TLB_FLUSH_GUEST
from emulator.kvm.mmu.root_tracking import active_roots, mmu_roots, record_flush, test_and_set_flushed
from emulator.kvm.mmu.roots import kvm_mmu_sync_prev_roots
from emulator.kvm.mmu.sync import kvm_mmu_sync_roots
from emulator.kvm.structs import Vcpu
from emulator.kvm.virt.requests import kvm_check_request
from emulator.machine.runtime import Cpu
from native import lib
from native.types import FlushReason

# Why a vCPU requests KVM_REQ_TLB_FLUSH of itself: it was moved, or its pCPU joins a mask.
_LOCAL_REASONS: Final[int] = 1 << lib.REASON_MIGRATION | 1 << lib.REASON_PCPU_MASK


def kvm_vcpu_flush_tlb_all(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_vcpu_flush_tlb_all(): service KVM_REQ_TLB_FLUSH, once for all that were made.

    Decision remote_flush.  The flush covers KVM_REQ_TLB_FLUSH_CURRENT, but not _GUEST.  Generations record
    remote flushes only, so they cannot elide a flush that the vCPU requested of itself.
    """
    kvm = vcpu.kvm
    reasons: int = lib.vcpu_take_flush_reasons(cpu.m, vcpu.id)
    reason = FlushReason((reasons & -reasons).bit_length() - 1) if reasons else lib.REASON_OTHER
    vcpu.flush_reasons, vcpu.flush_reason = reasons, reason
    cpu.stat(kvm.id, lib.STAT_TLB_FLUSH)
    answer = kvm.policy.remote_flush(cpu, vcpu)
    if answer == "done":
        pass
    elif answer == "root-tlb-gen" and not reasons & _LOCAL_REASONS:
        flush_tlb_old_roots(cpu, vcpu, reason)
    elif answer == "current-context":
        record_flush(cpu, kvm, [root for root in mmu_roots(vcpu.mmu) if root is vcpu.mmu.root])
        kvm.x86_ops.flush_tlb_current(cpu, vcpu, reason)
    else:
        record_flush(cpu, kvm, active_roots(vcpu))
        if answer == "all-contexts":
            kvm.x86_ops.flush_tlb_all(cpu, vcpu, reason)
        else:
            flush_tlb_roots(cpu, vcpu, reason)
    kvm_check_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_CURRENT)


def kvm_service_local_tlb_flush_requests(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_service_local_tlb_flush_requests(): service the requests to flush the current context."""
    kvm = vcpu.kvm
    if kvm_check_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_CURRENT):
        cpu.stat(kvm.id, lib.STAT_TLB_FLUSH)
        kvm.x86_ops.flush_tlb_current(cpu, vcpu, vcpu.flush_current_reason)
    if kvm_check_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST):
        cpu.stat(kvm.id, lib.STAT_TLB_FLUSH)
        if not kvm.params.ept:
            # The guest invalidates everything, so no root may be out of date (b53e84eed08b).
            kvm_mmu_sync_roots(cpu, vcpu)
            kvm_mmu_sync_prev_roots(cpu, vcpu)
        kvm.x86_ops.flush_tlb_guest(cpu, vcpu, lib.REASON_GUEST)


def flush_tlb_roots(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """Execute INVEPT single on each root that this vCPU can use without kvm_mmu_load, as proposed on the list
    in 2025."""
    for root in active_roots(vcpu):
        vcpu.kvm.x86_ops.flush_tlb_root(cpu, vcpu.kvm, root, reason)


def flush_tlb_old_roots(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """Execute INVEPT single on each of these roots if its generation moved on since this pCPU flushed it."""
    for root in active_roots(vcpu):
        if test_and_set_flushed(cpu, root, "root-tlb-gen"):
            flush_elided(cpu, vcpu.kvm, reason, root.hfn)
        else:
            vcpu.kvm.x86_ops.flush_tlb_root(cpu, vcpu.kvm, root, reason)
