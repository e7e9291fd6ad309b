"""Collect the tables that a zap removes on a list, flush once, and then give them to RCU.

"[RFC 02/19] KVM: x86/mmu: Batch TLB flushes for a single zap", 10 November 2021:
https://lore.kernel.org/kvm/?q=s:%22Batch+TLB+flushes+for+a+single+zap%22

Linux 5.18 took RCU as the proxy of the flush instead, which needs no list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.policy import Policy
from emulator.policy.instructions import cond_resched, flush_remote, free_table
from emulator.policy.state import OwnList, per_vm
from native.types import FlushReason, Hfn

if TYPE_CHECKING:
    from emulator.kvm.decisions import Zap
    from emulator.kvm.structs import Kvm
    from emulator.machine.runtime import Cpu
    from native.types import FlushReason, Hfn


class BatchList(Policy):
    disconnected_sps = per_vm(OwnList)

    def zap(self, cpu: Cpu, kvm: Kvm) -> Zap:
        return "done"

    def table_removed(self, cpu: Cpu, kvm: Kvm, table: Hfn) -> None:
        self.disconnected_sps(kvm).of(cpu).append(table)

    def walk_ends(self, cpu: Cpu, kvm: Kvm, reason: FlushReason, flushed: bool, can_yield: bool) -> bool:
        """Flush, even if a yield has flushed, and give the tables to RCU: handle_disconnected_sps()."""
        tables = self.disconnected_sps(kvm).of(cpu)
        if not tables:
            return False
        if not flushed:
            flush_remote(cpu, kvm, reason)
        for table in tables:
            free_table(cpu, table)
            if can_yield:
                cond_resched(cpu, kvm)
        tables.clear()
        return True
