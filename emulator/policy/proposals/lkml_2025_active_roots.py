"""Flush the current and previous roots of a vCPU one by one, instead of all contexts of the pCPU.

"[PATCH 4/5] KVM: VMX: Flush only active EPT roots on pCPU migration", 5 August 2025:
https://lore.kernel.org/kvm/?q=s:%22Flush+only+active+EPT+roots+on+pCPU+migration%22

Roots that are neither current nor cached need no flush: they become current through kvm_mmu_load, which
flushes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.policy import Policy
from emulator.policy.instructions import REASON_MIGRATION, active_roots, invept_single

if TYPE_CHECKING:
    from emulator.kvm.decisions import Migration, RemoteFlush
    from emulator.kvm.structs import Vcpu
    from emulator.machine.runtime import Cpu


class ActiveRoots(Policy):
    """vmx_flush_ept_on_pcpu_migration(), and the same set of roots for a remote flush."""

    def migration(self, cpu: Cpu, vcpu: Vcpu) -> Migration:
        for root in active_roots(vcpu):
            invept_single(cpu, vcpu.kvm, root, REASON_MIGRATION)
        return "done"

    def remote_flush(self, cpu: Cpu, vcpu: Vcpu) -> RemoteFlush:
        for root in active_roots(vcpu):
            invept_single(cpu, vcpu.kvm, root, vcpu.flush_reason)
        return "done"
