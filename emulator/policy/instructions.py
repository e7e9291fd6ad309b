"""The machine's instructions for a policy that acts: flushes, interrupts, requests, each accounted for.

`reason` (REASON_...) is the reason under which a flush counts.  A flush acts at once, on the pCPU `cpu` that
executes it; a vCPU that moves afterwards leaves it behind.
"""

from __future__ import annotations

from collections.abc import Iterable

from emulator.kvm.accounting import flush_elided as _flush_elided
from emulator.kvm.mmu.roots import active_roots as _active_roots
from emulator.kvm.mmu.structs import KvmMmuPage, KvmMmuRootInfo
from emulator.kvm.mmu.tdp_remove import tdp_mmu_free_sp_rcu
from emulator.kvm.notifications import FlushKind, PcpuFlush, flush_begins, flush_ended
from emulator.kvm.structs import Kvm, Vcpu
from emulator.kvm.virt.requests import kvm_flush_remote_tlbs
from emulator.kvm.virt.requests import kvm_make_request as _kvm_make_request
from emulator.kvm.virt.requests import request_tlb_flush as _request_tlb_flush
from emulator.kvm.vmx.vmx import vmx_flush_tlb_ept_root, vmx_get_current_vpid, vpid_sync_context
from emulator.kvm.vmx.vmx_ops import invvpid_individual_addr, invvpid_single_non_global
from emulator.machine.runtime import Cpu, rcu_enter, rcu_leave, smp_mb
from native import ffi, lib
from native.types import FlushReason, Hfn, IpiFunction

__all__ = [
    "REASON_GUEST",
    "REASON_MIGRATION",
    "REASON_OTHER",
    "REASON_PCPU_MASK",
    "REASON_ROOT_ALLOC",
    "REASON_ROOT_LOAD",
    "active_roots",
    "cond_resched",
    "flush_elided",
    "flush_remote",
    "free_table",
    "invept_global",
    "invept_single",
    "invept_single_on",
    "invept_single_on_each_cpu",
    "invvpid_address",
    "invvpid_all",
    "invvpid_retain_globals",
    "invvpid_single",
    "kick",
    "kvm_make_request",
    "linked_roots",
    "request_tlb_flush",
    "smp_mb",
]

REASON_GUEST = lib.REASON_GUEST
REASON_MIGRATION = lib.REASON_MIGRATION
REASON_OTHER = lib.REASON_OTHER
REASON_PCPU_MASK = lib.REASON_PCPU_MASK
REASON_ROOT_ALLOC = lib.REASON_ROOT_ALLOC
REASON_ROOT_LOAD = lib.REASON_ROOT_LOAD

# --- flushes on the pCPU that executes them -----------------------------------------------------------------


def invept_single(cpu: Cpu, kvm: Kvm, root: KvmMmuRootInfo | KvmMmuPage, reason: FlushReason) -> None:
    """Execute INVEPT single-context on the EPTP of a root, which must have a shadow page."""
    info = KvmMmuRootInfo(0, root.hfn, root) if isinstance(root, KvmMmuPage) else root
    vmx_flush_tlb_ept_root(cpu, kvm, info, reason)


def invept_global(cpu: Cpu, kvm: Kvm, reason: FlushReason, roots: tuple[KvmMmuPage, ...] = ()) -> None:
    """Execute INVEPT all-context.  roots: those that the moments of flushes are to tell as covered."""
    flush = PcpuFlush("invept-global", -1, reason, roots)
    flush_begins(cpu, kvm, flush)
    cpu.point("tlb", cpu.id, "write")
    lib.flush_invept_global(cpu.m, cpu.id, kvm.id, reason)
    flush_ended(cpu, kvm, flush)


def invvpid_single(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """Execute INVVPID single-context on the vCPU's VPID."""
    vpid_sync_context(cpu, vcpu, reason)


def invvpid_all(cpu: Cpu, kvm: Kvm, reason: FlushReason) -> None:
    """Execute INVVPID all-context."""
    flush = PcpuFlush("invvpid-all", -1, reason)
    flush_begins(cpu, kvm, flush)
    cpu.point("tlb", cpu.id, "write")
    lib.flush_invvpid_all(cpu.m, cpu.id, kvm.id, reason)
    flush_ended(cpu, kvm, flush)


def invvpid_address(cpu: Cpu, vcpu: Vcpu, page: int, reason: FlushReason) -> None:
    """Execute INVVPID individual-address: the page of that number, under the vCPU's VPID."""
    flush = _of_vcpu("invvpid-address", vcpu, reason)
    flush_begins(cpu, vcpu.kvm, flush)
    cpu.point("tlb", cpu.id, "write")
    invvpid_individual_addr(cpu, vcpu.kvm, vmx_get_current_vpid(vcpu), page << 12, reason)
    flush_ended(cpu, vcpu.kvm, flush)


def invvpid_retain_globals(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """Execute INVVPID single-context-retaining-globals on the vCPU's VPID; it counts as invvpid_single."""
    flush = _of_vcpu("invvpid-single", vcpu, reason)
    flush_begins(cpu, vcpu.kvm, flush)
    cpu.point("tlb", cpu.id, "write")
    invvpid_single_non_global(cpu, vcpu.kvm, vmx_get_current_vpid(vcpu), reason)
    flush_ended(cpu, vcpu.kvm, flush)


def _of_vcpu(kind: FlushKind, vcpu: Vcpu, reason: FlushReason) -> PcpuFlush:
    return PcpuFlush(kind, vmx_get_current_vpid(vcpu), reason)


def flush_elided(cpu: Cpu, kvm: Kvm, reason: FlushReason, argument: int = 0) -> None:
    """Account for a flush that Linux 7.3 makes here and this policy does not.  argument: the root's page."""
    _flush_elided(cpu, kvm, reason, argument)


# --- requests and interrupts --------------------------------------------------------------------------------


def request_tlb_flush(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """Make KVM_REQ_TLB_FLUSH of the vCPU that is being loaded: it flushes before it enters, decision
    remote_flush."""
    _request_tlb_flush(cpu, vcpu, reason)


def kvm_make_request(cpu: Cpu, vcpu: Vcpu, req: int) -> None:
    """Make a request of a vCPU, without an interrupt."""
    _kvm_make_request(cpu, vcpu, req)


def flush_remote(cpu: Cpu, kvm: Kvm, reason: FlushReason) -> None:
    """Make a remote flush: kvm_flush_remote_tlbs()."""
    kvm_flush_remote_tlbs(cpu, kvm, reason)


def kick(cpu: Cpu, kvm: Kvm, pcpus: Iterable[int], *, wait: bool) -> None:
    """Interrupt these pCPUs, which ends guest mode there; wait: until all have acknowledged.

    Without a request a vCPU enters again at once.  The pCPU that acts is not in guest mode, and is left out.
    Waiting needs interrupts on.
    """
    _call(cpu, kvm, pcpus, lib.IPI_ACK_KICK, 0, wait=wait)


def invept_single_on(cpu: Cpu, kvm: Kvm, root: KvmMmuPage, pcpus: Iterable[int], *, wait: bool) -> None:
    """Execute INVEPT single-context of a root on these pCPUs, by interrupts; at once on the pCPU that acts.

    The flushes count under REASON_ROOT_ALLOC.
    """
    targets = tuple(pcpus)
    argument = kvm.id << 32 | root.hfn
    if cpu.is_pcpu and cpu.id in targets:
        cpu.check(
            lib.smp_call_function_single(cpu.m, cpu.id, cpu.id, lib.IPI_INVEPT_SINGLE, argument, lib.IPI_WAIT)
        )
    _call(cpu, kvm, targets, lib.IPI_INVEPT_SINGLE, root.hfn, wait=wait)


def invept_single_on_each_cpu(cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> None:
    """Execute INVEPT single-context of a root on every pCPU of the host, and wait: on_each_cpu()."""
    cpu.point("call_queue", kvm.id, "write")
    argument = kvm.id << 32 | root.hfn
    cpu.check(lib.on_each_cpu(cpu.m, cpu.id, lib.IPI_INVEPT_SINGLE, argument, lib.IPI_WAIT))


def _call(cpu: Cpu, kvm: Kvm, pcpus: Iterable[int], function: IpiFunction, hfn: int, *, wait: bool) -> None:
    # Not cpu.kick_mask: KVM may be filling it as it asks for remote_kick.
    mask = ffi.new("uint64_t[]", cpu.kick_mask_words)
    for pcpu in pcpus:
        mask[pcpu >> 6] |= 1 << (pcpu & 63)
    cpu.point("call_queue", kvm.id, "write")
    waits = lib.IPI_WAIT if wait else lib.IPI_NO_WAIT
    cpu.check(lib.smp_call_function_many(cpu.m, cpu.id, mask, function, kvm.id << 32 | hfn, waits))


# --- walks that remove tables -------------------------------------------------------------------------------


def free_table(cpu: Cpu, table: Hfn) -> None:
    """Give a removed table to RCU.  It must have been flushed for before a grace period can end."""
    tdp_mmu_free_sp_rcu(cpu, table)


def cond_resched(cpu: Cpu, kvm: Kvm) -> None:
    """Drop mmu_lock and leave RCU for a moment, if another CPU waits for the lock."""
    if kvm.mmu_lock.needbreak(cpu):
        rcu_leave(cpu)
        cpu.stat(kvm.id, lib.STAT_YIELDS)
        cpu.event(lib.EVENT_YIELD, kvm.id, 0)
        kvm.mmu_lock.cond_resched(cpu)
        rcu_enter(cpu)


# --- roots --------------------------------------------------------------------------------------------------


def active_roots(vcpu: Vcpu) -> list[KvmMmuRootInfo]:
    """Return the roots that the vCPU can use without kvm_mmu_load: current and previous ones."""
    return _active_roots(vcpu)


def linked_roots(cpu: Cpu, kvm: Kvm) -> tuple[KvmMmuPage, ...]:
    """Return all roots of the VM that a zap can find, invalid ones among them.

    Pages that shadow an EPT of L1's are among them if they have been roots: even if no vCPU holds such a page
    now, a vCPU may load it again.
    """
    cpu.point("tdp_mmu_roots", kvm.id, "read")
    nested = tuple(sp for sp in kvm.shadow.page_of.values() if sp.policy_data is not None)
    return kvm.tdp_mmu_roots + nested if nested else kvm.tdp_mmu_roots
