"""Repair the sketch of August 2025 (lkml_2025_cpu_flushed_mask.py): a remote flush clears the masks.

A set bit states of a root and a pCPU: this pCPU has dropped the entries that it had cached under the root's
EP4TA, and no entry that it may have cached since is stale.  A remote flush makes this statement false for
every pCPU on which no vCPU of the VM services its request, because entries stay there.  The flusher itself
therefore clears the masks, after the SPTEs have changed and before any vCPU can have serviced the request.

    flusher                         vCPU, coming to a pCPU
    SPTEs change                    the mask is read
    masks are cleared               INVEPT, if the bit is clear
    requests are made               mode = IN_GUEST_MODE
    vCPUs are kicked                requests are read

A vCPU that reads before the flusher clears finds the request later; a vCPU that reads afterwards flushes.

A bit is set before the INVEPT, with preemption disabled over both, so that no other vCPU runs on the pCPU in
between.  A flusher that clears in between only makes the next flush superfluous.

What the guest invalidated natively on another pCPU is not in any mask: a migration also executes INVVPID.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.policy import Policy
from emulator.policy.instructions import (
    REASON_MIGRATION,
    active_roots,
    flush_elided,
    invept_single,
    linked_roots,
)
from emulator.policy.state import Bitmap, per_root
from native.types import FlushReason

if TYPE_CHECKING:
    from emulator.kvm.decisions import Migration
    from emulator.kvm.notifications import PcpuFlush
    from emulator.kvm.structs import Kvm, Vcpu
    from emulator.machine.runtime import Cpu
    from native.types import FlushReason


class CpuFlushedMaskCleared(Policy):
    cpu_flushed_mask = per_root(Bitmap)

    def __init__(self) -> None:
        super().__init__(remote_flush="active-roots", migration_vpid="invvpid")

    def remote_flush_due(self, cpu: Cpu, kvm: Kvm, reason: FlushReason) -> None:
        """Clear the masks of all roots that a zap can find, invalid ones among them."""
        for root in linked_roots(cpu, kvm):
            self.cpu_flushed_mask(root).clear(cpu)

    def pcpu_flushes(self, cpu: Cpu, kvm: Kvm, flush: PcpuFlush) -> None:
        for root in flush.roots:
            self.cpu_flushed_mask(root).test_and_set_bit(cpu, cpu.id)

    def migration(self, cpu: Cpu, vcpu: Vcpu) -> Migration:
        for root in active_roots(vcpu):
            if root.sp is not None and self.cpu_flushed_mask(root.sp).test_bit(cpu, cpu.id):
                flush_elided(cpu, vcpu.kvm, REASON_MIGRATION, root.hfn)
            else:
                invept_single(cpu, vcpu.kvm, root, REASON_MIGRATION)
        return "done"
