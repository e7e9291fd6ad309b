"""Count remote flushes per root, and flush a root only where its generation has moved on.

This project's answer to the thread of August 2025 (lkml_2025_cpu_flushed_mask.py): for a root, what
mm->context.tlb_gen is for Linux's own mm (arch/x86/mm/tlb.c).

    flusher                         vCPU, about to enter the guest
    SPTEs change                    mode = IN_GUEST_MODE
    the generation moves on         the generation is compared; INVEPT, if it has moved on
    requests are made               requests are read
    vCPUs are kicked

A vCPU that compares before the generation moves on finds the request later, or is kicked; a vCPU that
compares afterwards flushes.  However a root became current (kvm_mmu_load, the cache, a move), it is compared
before the vCPU enters with it, so a previous root need not be flushed before it is used.

The generation is recorded before the INVEPT, with preemption disabled over both: it was read before the
flush, so it never states too much.  inc_return() is also the barrier before the flusher reads the modes.

What the guest invalidated natively on another pCPU has no generation: a migration also executes INVVPID, and
flushes that a vCPU requests of itself are not elided.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emulator.policy import Policy
from emulator.policy.instructions import (
    REASON_MIGRATION,
    REASON_PCPU_MASK,
    active_roots,
    flush_elided,
    invept_single,
    linked_roots,
)
from emulator.policy.state import Generation, PerCpu, Private, per_root, per_vcpu
from native.types import FlushReason

if TYPE_CHECKING:
    from emulator.kvm.decisions import Migration, RemoteFlush, RootLoad
    from emulator.kvm.mmu.structs import KvmMmuPage, KvmMmuRootInfo
    from emulator.kvm.notifications import PcpuFlush
    from emulator.kvm.structs import Kvm, Vcpu
    from emulator.machine.runtime import Cpu
    from native.types import FlushReason

# Why a vCPU requests KVM_REQ_TLB_FLUSH of itself: it was moved, or its pCPU joins a mask.
_LOCAL_REASONS: Final[int] = 1 << REASON_MIGRATION | 1 << REASON_PCPU_MASK


class RootTlbGen(Policy):
    tlb_gen = per_root(Generation, 1)  # remote flushes of the root, counted from 1
    cpu_tlb_gen = per_root(PerCpu)  # the value of tlb_gen when the pCPU last flushed the root, 0 for never
    compares = per_vcpu(Private)  # its last move was left to this policy

    def __init__(self) -> None:
        super().__init__(migration_vpid="invvpid")

    def remote_flush_due(self, cpu: Cpu, kvm: Kvm, reason: FlushReason) -> None:
        """Move on the generations of all roots that a zap can find, invalid ones among them."""
        for root in linked_roots(cpu, kvm):
            self.tlb_gen(root).inc_return(cpu)

    def pcpu_flushes(self, cpu: Cpu, kvm: Kvm, flush: PcpuFlush) -> None:
        for root in flush.roots:
            self.cpu_tlb_gen(root).set(cpu, cpu.id, self.tlb_gen(root).read(cpu))

    def remote_flush(self, cpu: Cpu, vcpu: Vcpu) -> RemoteFlush:
        if vcpu.flush_reasons & _LOCAL_REASONS:
            return super().remote_flush(cpu, vcpu)
        for root in active_roots(vcpu):
            self._flush(cpu, vcpu.kvm, root, vcpu.flush_reason)
        return "done"

    def root_load(self, cpu: Cpu, vcpu: Vcpu, root: KvmMmuPage) -> RootLoad:
        return "none" if self._is_current(cpu, root) else "flush-current"

    def migration(self, cpu: Cpu, vcpu: Vcpu) -> Migration:
        self.compares(vcpu).value = True
        for mmu in (vcpu.root_mmu, vcpu.guest_mmu):
            if mmu.root is not None:
                self._flush(cpu, vcpu.kvm, mmu.root, REASON_MIGRATION)
        return "done"

    def before_entry(self, cpu: Cpu, vcpu: Vcpu) -> None:
        root = vcpu.mmu.root
        if not self.compares(vcpu).value or root is None:
            return
        if root.sp is None or not self._is_current(cpu, root.sp):
            invept_single(cpu, vcpu.kvm, root, REASON_MIGRATION)

    def _flush(self, cpu: Cpu, kvm: Kvm, root: KvmMmuRootInfo, reason: FlushReason) -> None:
        if root.sp is not None and self._is_current(cpu, root.sp):
            flush_elided(cpu, kvm, reason, root.hfn)
        else:
            invept_single(cpu, kvm, root, reason)

    def _is_current(self, cpu: Cpu, root: KvmMmuPage) -> bool:
        """Return whether this pCPU has flushed the root since its generation last moved on."""
        return self.cpu_tlb_gen(root).read(cpu, cpu.id) == self.tlb_gen(root).read(cpu)
