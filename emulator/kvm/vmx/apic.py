"""arch/x86/kvm/vmx/vmx.c: the APIC-access page in vmcs01.  (nested.py writes vmcs02's, a page of L1's.)"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from emulator.kvm.kvm_host import (
    APIC_ACCESS_PAGE_PRIVATE_MEMSLOT,
    KVM_REQ_APIC_PAGE_RELOAD,
    KVM_REQ_TLB_FLUSH_CURRENT,
    LAPIC_MODE_XAPIC,
)
from emulator.kvm.structs import Kvm, KvmMemorySlot, Vcpu
from emulator.kvm.virt.requests import kvm_make_request
from emulator.kvm.virt.slots import kvm_memslots
from emulator.kvm.vmx.vmcs import write_apic_access
from emulator.kvm.vmx.vmx import vmx_flush_tlb_ept_root, vmx_switch_vmcs, vpid_sync
from emulator.machine.runtime import Cpu, cpu_relax
from native import lib
from native.types import Gfn, Hfn


@contextmanager
def vmx_vmcs01(cpu: Cpu, vcpu: Vcpu) -> Iterator[None]:
    """guard(vmx_vmcs01): load vmcs01 if vmcs02 is loaded, and vmcs02 again at the end."""
    vmcs = vcpu.loaded_vmcs
    if vcpu.arch.guest_mode:
        vmx_switch_vmcs(cpu, vcpu, vcpu.vmcs01)
    yield
    if vcpu.arch.guest_mode:
        vmx_switch_vmcs(cpu, vcpu, vmcs)


def vmx_set_virtual_apic_mode(cpu: Cpu, vcpu: Vcpu) -> None:
    """vmx_set_virtual_apic_mode(): set "virtualize APIC accesses" in xAPIC mode, clear it in all others.

    Setting the control flushes L1's context: while it was clear, the pCPU may have cached the page as
    ordinary memory.  The reload of the page's address makes no flush, and the address may be the old one.
    """
    with vmx_vmcs01(cpu, vcpu):
        vmcs01 = vcpu.vmcs01
        vmcs01.virtualize_apic = vcpu.arch.apic_mode == LAPIC_MODE_XAPIC
        write_apic_access(cpu, vmcs01)
        if vmcs01.virtualize_apic:
            kvm_make_request(cpu, vcpu, KVM_REQ_APIC_PAGE_RELOAD)
            flush_ordinary_mappings(cpu, vcpu)


def flush_ordinary_mappings(cpu: Cpu, vcpu: Vcpu) -> None:
    """Flush L1's context: by request while L1 runs; at once while L2 runs, because such a request would flush
    L2's context."""
    if not vcpu.arch.guest_mode:
        vcpu.flush_current_reason = lib.REASON_OTHER
        kvm_make_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_CURRENT)
    elif not vcpu.kvm.params.ept:
        vpid_sync(cpu, vcpu.kvm, vcpu.vpid, lib.REASON_OTHER)
    elif vcpu.root_mmu.root is not None:
        vmx_flush_tlb_ept_root(cpu, vcpu.kvm, vcpu.root_mmu.root, lib.REASON_OTHER)


def vmx_set_apic_access_page_addr(cpu: Cpu, vcpu: Vcpu) -> None:
    """vmx_set_apic_access_page_addr(): write the page's address into vmcs01, or try again at the next entry.

    The page is not pinned: an mmu_notifier that takes it away requests another reload.  A look-up that races
    the notifier may find the old page; mmu_invalidate_seq detects that (878940b33d76, 6.5).  No flush is due:
    if SPTEs led to the old page, the notifier has flushed.
    """
    kvm = vcpu.kvm
    with vmx_vmcs01(cpu, vcpu):
        if not vcpu.vmcs01.virtualize_apic:
            return
        slot = kvm_memslots(cpu, kvm).by_id.get(APIC_ACCESS_PAGE_PRIVATE_MEMSLOT)
        if slot is None or slot.invalid:
            return
        cpu.point("mmu_invalidate_seq", kvm.id, "read")
        mmu_seq = lib.mmu_invalidate_seq(cpu.m, kvm.id)
        hfn = apic_access_hfn(cpu, kvm, slot, slot.base_gfn)
        if hfn is None:
            return
        with kvm.mmu_lock.read_lock(cpu):
            cpu.point("mmu_invalidate_seq", kvm.id, "read")
            retry = bool(lib.mmu_invalidate_retry_gfn(cpu.m, kvm.id, mmu_seq, slot.base_gfn))
            if retry:
                kvm_make_request(cpu, vcpu, KVM_REQ_APIC_PAGE_RELOAD)
            else:
                vcpu.vmcs01.apic_access_hfn = hfn
                write_apic_access(cpu, vcpu.vmcs01)
    if retry:
        cpu_relax(cpu)


def apic_access_hfn(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn) -> Hfn | None:
    """__kvm_faultin_pfn() for an APIC-access page: return its frame, writable; None if the host has none."""
    cpu.point("mm", (kvm.id, gfn), "read")
    write = True
    rc = lib.mm_fault(cpu.m, cpu.id, kvm.id, slot.gfn_to_hva(gfn), write, cpu.page)
    if rc in (lib.MACHINE_AGAIN, lib.MACHINE_NOMEM):
        return None
    cpu.check(rc)
    return Hfn(cpu.page.hfn)
