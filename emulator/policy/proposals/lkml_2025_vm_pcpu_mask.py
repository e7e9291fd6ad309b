"""Flush a new root on the pCPUs where the VM ever ran, and a pCPU when it joins them: unsound.

The idea of Vitaly Kuznetsov, "a CPU mask tracking all the pCPUs where the VM has ever been seen running (+ a
flush when a new one is added to it)", 4 August 2025, in answer to kvm_mmu_flush_all_tlbs_root()
(lkml_2025_on_each_cpu.py): https://lore.kernel.org/kvm/?q=kvm_mmu_flush_all_tlbs_root

A pCPU joins before it flushes: a flusher that reads the mask from then on includes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.policy import Policy
from emulator.policy.instructions import REASON_PCPU_MASK, invept_single_on, request_tlb_flush
from emulator.policy.state import Bitmap, per_vm

if TYPE_CHECKING:
    from emulator.kvm.decisions import RemoteKick, RootAlloc
    from emulator.kvm.mmu.structs import KvmMmuPage
    from emulator.kvm.structs import Kvm, Vcpu
    from emulator.machine.runtime import Cpu


class VmPcpuMask(Policy):
    pcpu_mask = per_vm(Bitmap)  # pCPUs on which a vCPU of the VM was ever loaded

    def __init__(self) -> None:
        super().__init__(root_load="none", migration="none", migration_vpid="none")

    def vcpu_loading(self, cpu: Cpu, vcpu: Vcpu) -> None:
        """Join the mask, and flush, because this pCPU has missed the flushes made so far."""
        if not self.pcpu_mask(vcpu.kvm).test_and_set_bit(cpu, cpu.id):
            request_tlb_flush(cpu, vcpu, REASON_PCPU_MASK)

    def root_alloc(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> RootAlloc:
        invept_single_on(cpu, kvm, root, self.pcpu_mask(kvm).pcpus_set(cpu), wait=True)
        return "done"

    def remote_kick(self, cpu: Cpu, kvm: Kvm) -> RemoteKick:
        """Interrupt all pCPUs of the mask, whatever their vCPUs do."""
        for pcpu in self.pcpu_mask(kvm).pcpus_set(cpu):
            if pcpu != cpu.id:
                cpu.kick_mask[pcpu >> 6] |= 1 << (pcpu & 63)
        return "done"
