"""Flush a new root on every pCPU of the host, so that loads and migrations need no flush: unsound.

kvm_mmu_flush_all_tlbs_root(), proposed on 14 July 2025 in the thread "KVM: x86/mmu: Use Hyper-V EPT flush for
local TLB flushes" and quoted in "Re: ...", 5 August 2025:
https://lore.kernel.org/kvm/?q=kvm_mmu_flush_all_tlbs_root

As posted, mmu_lock and tdp_mmu_pages_lock are held while the pCPUs are interrupted, which is legal with
interrupts on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.policy import Policy
from emulator.policy.instructions import invept_single_on_each_cpu

if TYPE_CHECKING:
    from emulator.kvm.decisions import RootAlloc
    from emulator.kvm.mmu.structs import KvmMmuPage
    from emulator.kvm.structs import Kvm
    from emulator.machine.runtime import Cpu


class OnEachCpu(Policy):
    def __init__(self) -> None:
        super().__init__(root_load="none", migration="none", migration_vpid="none")

    def root_alloc(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> RootAlloc:
        """kvm_mmu_flush_all_tlbs_root(): drop all entries under this EP4TA.

        They are left from an earlier root on the same page.
        """
        invept_single_on_each_cpu(cpu, kvm, root)
        return "done"
