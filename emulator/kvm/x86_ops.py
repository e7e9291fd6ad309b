"""arch/x86/include/asm/kvm-x86-ops.h: the operations of the processor's vendor that KVM's common code calls.

Common code calls `kvm.x86_ops.flush_tlb_all(...)` where the kernel calls kvm_x86_call(flush_tlb_all)(...); it
knows no vendor.  virt/kvm_main.py gives a VM its vendor's operations, as loading kvm-intel.ko does.
"""

from __future__ import annotations

from typing import Protocol

from emulator.kvm.kvm_host import ExitToUser
from emulator.kvm.structs import Kvm, Vcpu
from emulator.machine.runtime import Cpu
from native.types import FlushReason, Hfn, Level


class KvmX86Ops(Protocol):
    """struct kvm_x86_ops, as far as it is about roots and TLBs.

    `reason` (enum flush_reason) is for the accounts.
    """

    def vcpu_create(self, cpu: Cpu, kvm: Kvm) -> Vcpu:
        """Make a vCPU, with all that the vendor keeps for it.  Raises OutOfFrames."""

    def vcpu_free(self, cpu: Cpu, vcpu: Vcpu) -> None:
        """Release the vendor's part of a vCPU that runs no more."""

    def vcpu_reset(self, cpu: Cpu, vcpu: Vcpu) -> None:
        """Reset the vendor's part of a vCPU, on INIT."""

    def vcpu_load(self, cpu: Cpu, vcpu: Vcpu) -> None:
        """Prepare this pCPU for the vCPU; vcpu->cpu is still the pCPU that it was on before."""

    def set_cr0(self, cpu: Cpu, vcpu: Vcpu, old_cr0: int, cr0: int) -> None:
        """Give the hardware the guest's CR0."""

    def set_cr4(self, cpu: Cpu, vcpu: Vcpu) -> None:
        """Give the hardware the guest's CR4, which arch.cr4 is by now."""

    def enter_smm(self, cpu: Cpu, vcpu: Vcpu) -> None:
        """Leave the vendor's modes that SMM has no part in; the guest's registers are in SMRAM by now."""

    def leave_smm(self, cpu: Cpu, vcpu: Vcpu) -> None:
        """Go back into those modes, before RSM loads the registers from SMRAM."""

    def set_virtual_apic_mode(self, cpu: Cpu, vcpu: Vcpu) -> None:
        """Make the hardware intercept accesses to the APIC's page in xAPIC mode, and only then."""

    def set_apic_access_page_addr(self, cpu: Cpu, vcpu: Vcpu) -> None:
        """Give the hardware the address of the APIC-access page, which the host may have moved."""

    def handle_exit(self, cpu: Cpu, vcpu: Vcpu) -> ExitToUser | None:
        """Handle the exit; return why KVM_RUN ends, or None to enter again."""

    def load_mmu_pgd(self, cpu: Cpu, vcpu: Vcpu, root_hfn: Hfn, root_level: Level) -> None:
        """Give the hardware the root, for the next entry."""

    def flush_tlb_all(self, cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
        """Flush all entries of this pCPU that any context of the vCPU may use."""

    def flush_tlb_current(self, cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
        """Flush the entries of the vCPU's current root on this pCPU."""

    def flush_tlb_guest(self, cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
        """Flush the entries that the guest knows of, but none that stands for the host's tables alone."""

    def flush_tlb_gva(self, cpu: Cpu, vcpu: Vcpu, addr: int) -> None:
        """Flush the entries of one linear address, of the guest's own invalidation."""
