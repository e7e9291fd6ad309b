"""Elide a migration's flush of a root that this pCPU has flushed before, as sketched on the list: unsound.

"[PATCH 5/5] KVM: VMX: Sketch in possible framework for eliding TLB flushes on pCPU migration", 5 August 2025:
https://lore.kernel.org/kvm/?q=s:%22Sketch+in+possible+framework+for+eliding+TLB+flushes%22

Nothing clears the mask.  A page that is zapped while the vCPU is elsewhere is flushed there only; the vCPU
comes back to a pCPU with its bit set, and uses the old entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.policy import Policy
from emulator.policy.instructions import REASON_MIGRATION, active_roots, flush_elided, invept_single
from emulator.policy.state import Bitmap, per_root

if TYPE_CHECKING:
    from emulator.kvm.decisions import Migration
    from emulator.kvm.structs import Vcpu
    from emulator.machine.runtime import Cpu


class CpuFlushedMask(Policy):
    """__vmx_flush_ept_on_pcpu_migration() with root->cpu_flushed_mask."""

    cpu_flushed_mask = per_root(Bitmap)

    def migration(self, cpu: Cpu, vcpu: Vcpu) -> Migration:
        for root in active_roots(vcpu):
            # A root without a shadow page has no mask, and must be flushed.
            if root.sp is not None and self.cpu_flushed_mask(root.sp).test_and_set_bit(cpu, cpu.id):
                flush_elided(cpu, vcpu.kvm, REASON_MIGRATION, root.hfn)
            else:
                invept_single(cpu, vcpu.kvm, root, REASON_MIGRATION)
        return "done"
