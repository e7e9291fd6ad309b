"""arch/x86/kvm/vmx/nested.c: the EPT that L1 has for a nested guest (EPT12), which guest_mmu shadows.

The processor walks the shadow (EPT02), in which leafs map guest-physical pages of L2 to the host's frames.
L1 may change tables of level 1 without an exit (unsync).  When L1 then executes INVEPT, KVM drops the roots,
and the load of the next root syncs the pages below it.  L1's stores to higher tables exit, and KVM emulates
them.
"""

from __future__ import annotations

from typing import Final

from emulator.kvm.accounting import flush_elided
from emulator.kvm.kvm_host import KVM_REQ_TLB_FLUSH_GUEST
from emulator.kvm.mmu.fault import KvmPageFault
from emulator.kvm.mmu.roots import kvm_mmu_free_roots, kvm_mmu_new_pgd, mmu_roots
from emulator.kvm.mmu.shadow_roots import init_kvm_shadow_ept_mmu
from emulator.kvm.mmu.structs import KvmMmuRootInfo
from emulator.kvm.mmu.sync import kvm_mmu_invalidate_addr_in_root
from emulator.kvm.structs import Vcpu
from emulator.kvm.virt.requests import kvm_make_request
from emulator.kvm.vmx.vmcs12 import nested_cpu_has_vpid
from emulator.kvm.vmx.vmx import vmx_flush_tlb_ept_root
from emulator.kvm.vmx.vmx_ops import VMX_EPT_EXTENT_CONTEXT
from emulator.machine.runtime import Cpu
from native import lib

EPTP_PA_MASK: Final = (1 << 52) - (1 << 12)
_EPTP_AD: Final = 1 << 6


def nested_ept_init_mmu_context(cpu: Cpu, vcpu: Vcpu) -> None:
    """nested_ept_init_mmu_context(): run L2 on guest_mmu, and switch to a cached root of its EPT."""
    vcpu.mmu = vcpu.guest_mmu
    nested_ept_new_eptp(cpu, vcpu)


def nested_ept_new_eptp(cpu: Cpu, vcpu: Vcpu) -> None:
    """nested_ept_new_eptp(), kvm_init_shadow_ept_mmu()"""
    eptp = vcpu.nested.vmcs12().ept_pointer
    init_kvm_shadow_ept_mmu(vcpu, accessed_dirty=bool(eptp & _EPTP_AD))
    kvm_mmu_new_pgd(cpu, vcpu, eptp)


def nested_vmx_eptp_switching(cpu: Cpu, vcpu: Vcpu, eptp: int) -> None:
    """nested_vmx_eptp_switching(): L2 switches to another EPT of L1's by VMFUNC, without an exit to L1.

    Like a VM entry with another EPTP, it goes back to a cached root of that EPT, or leaves it to
    kvm_mmu_reload() (since 5.14; before, all roots of the vCPU were freed).  Linux reads the EPTP from L1's
    list; here the instruction has it.
    """
    vmcs12 = vcpu.nested.vmcs12()
    if vmcs12.ept_pointer == eptp:
        return
    vmcs12.ept_pointer = eptp
    nested_ept_new_eptp(cpu, vcpu)
    if not nested_cpu_has_vpid(vmcs12):
        kvm_make_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST)


def nested_ept_uninit_mmu_context(vcpu: Vcpu) -> None:
    """nested_ept_uninit_mmu_context()"""
    vcpu.mmu = vcpu.root_mmu


def nested_ept_root_matches(root: KvmMmuRootInfo, eptp: int) -> bool:
    """nested_ept_root_matches(): compare EP4TAs, which accessed and dirty flags are no part of."""
    return root.pgd & EPTP_PA_MASK == eptp & EPTP_PA_MASK


def nested_ept_invalidate_addr(cpu: Cpu, vcpu: Vcpu, eptp: int, gpa: int) -> None:
    """nested_ept_invalidate_addr(): sync a page of L2 below the cached roots of the EPT.

    The caller has synced the page below the current root.  Roots of other EPTPs with the same EP4TA are
    synced, too, because the processor invalidates mappings by their EP4TA.
    """
    for root in vcpu.mmu.prev_roots:
        if root is not None and nested_ept_root_matches(root, eptp):
            kvm_mmu_invalidate_addr_in_root(cpu, vcpu, gpa, root)


def sync_violating_gpa(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault) -> None:
    """Sync the page before nested_ept_inject_page_fault() exits to L1, because the EPT violation that L1 gets
    invalidates the page's mappings."""
    nested_ept_invalidate_addr(cpu, vcpu, vcpu.nested.vmcs12().ept_pointer, fault.addr)


def handle_invept(cpu: Cpu, vcpu: Vcpu, kind: int, eptp: int) -> None:
    """handle_invept(): drop the roots of the EPT, or all of guest_mmu's.  KVM executes no INVEPT itself.

    Only this vCPU's roots are concerned, as INVEPT invalidates on one processor.  The next VM entry of L2
    loads a root, which syncs and flushes.  Decision nested_invept.
    """
    single = kind == VMX_EPT_EXTENT_CONTEXT
    roots = [root for root in mmu_roots(vcpu.guest_mmu) if not single or nested_ept_root_matches(root, eptp)]
    answer = vcpu.kvm.policy.nested_invept(cpu, vcpu)
    if answer == "none":
        flush_elided(cpu, vcpu.kvm, lib.REASON_GUEST, vcpu.id)
        return
    if answer == "free-roots-and-flush":
        for root in roots:
            vmx_flush_tlb_ept_root(cpu, vcpu.kvm, root, lib.REASON_GUEST)
    kvm_mmu_free_roots(cpu, vcpu.kvm, vcpu.guest_mmu, lambda root: any(root is one for one in roots))
