"""arch/x86/kvm/regs.c: control-register writes that exit, and the root changes and flushes that they cause.

With EPT few writes exit: CR0.PG, and the bits of CR4 that are part of a role.  The guest writes CR0.WP,
CR4.PGE and CR3 without an exit; the hardware makes their flushes, on the pCPU where the guest runs.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from emulator.kvm.accounting import flush_elided
from emulator.kvm.kvm_host import (
    EFER_LMA,
    EFER_LME,
    INVPCID_TYPE_INDIV_ADDR,
    INVPCID_TYPE_SINGLE_CTXT,
    KVM_MMU_CR0_ROLE_BITS,
    KVM_MMU_CR4_ROLE_BITS,
    KVM_MMU_EFER_ROLE_BITS,
    KVM_REQ_LOAD_MMU_PGD,
    KVM_REQ_MMU_SYNC,
    KVM_REQ_TLB_FLUSH_CURRENT,
    KVM_REQ_TLB_FLUSH_GUEST,
    X86_CR0_PDPTR_BITS,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR3_PCID_MASK,
    X86_CR3_PCID_NOFLUSH,
    X86_CR4_PAE,
    X86_CR4_PCIDE,
    X86_CR4_PDPTR_BITS,
    X86_CR4_PGE,
    X86_CR4_SMEP,
)
from emulator.kvm.mmu.guest_walk import PT_PRESENT_MASK
from emulator.kvm.mmu.roots import (
    kvm_init_mmu,
    kvm_mmu_free_roots,
    kvm_mmu_new_pgd,
    kvm_mmu_reset_context,
    kvm_mmu_unload,
    mmu_roots,
)
from emulator.kvm.mmu.structs import KvmMmuRootInfo
from emulator.kvm.mmu.sync import kvm_mmu_invalidate_addr_in_root
from emulator.kvm.structs import Vcpu, is_long_mode, is_pae_paging, is_paging, tdp_enabled
from emulator.kvm.virt.guest_memory import kvm_is_visible_memslot, kvm_read_guest_word
from emulator.kvm.virt.requests import kvm_make_request
from emulator.kvm.virt.slots import gfn_to_memslot
from emulator.machine.runtime import Cpu
from native import ffi, lib
from native.types import Gfn, WordIndex

# pdptr_rsvd_bits(): bits 2:1 and 8:5, beside those beyond MAXPHYADDR.
PDPTR_RSVD_BITS: Final = 0x1E6


class Sregs(NamedTuple):
    """The registers of struct kvm_sregs that decide about roots and flushes."""

    cr0: int
    cr3: int
    cr4: int
    efer: int


def sregs_of(vcpu: Vcpu) -> Sregs:
    """__get_sregs()"""
    return Sregs(vcpu.arch.cr0, vcpu.arch.cr3, vcpu.arch.cr4, vcpu.arch.efer)


def request_guest_flush(cpu: Cpu, vcpu: Vcpu, req: int) -> None:
    """Request a flush that the architecture guarantees to the guest.

    Decision role_change: since 5.18 the flush is requested regardless of the roots' fate; another answer
    elides it.
    """
    if vcpu.kvm.policy.role_change(cpu, vcpu) == "no-guest-flush":
        flush_elided(cpu, vcpu.kvm, lib.REASON_GUEST, vcpu.id)
    else:
        vcpu.flush_current_reason = lib.REASON_GUEST
        kvm_make_request(cpu, vcpu, req)


def load_pdptrs(cpu: Cpu, vcpu: Vcpu, cr3: int) -> bool:
    """load_pdptrs(): read the four PDPTEs of PAE paging, as the CPU does; return False if it would fault.

    They are registers from then on.  Without EPT the roots below the current one were found by the old ones.
    """
    kvm = vcpu.kvm
    gfn = Gfn(cr3 >> 12)
    slot = gfn_to_memslot(cpu, kvm, gfn, int(vcpu.arch.smm))
    if slot is None or not kvm_is_visible_memslot(slot):
        return False
    at = WordIndex((cr3 & 0xFE0) // 8)
    read = [kvm_read_guest_word(cpu, kvm, slot, gfn, at + i) for i in range(4)]
    first, second, third, fourth = read
    if first is None or second is None or third is None or fourth is None:
        return False
    pdptrs = (first, second, third, fourth)
    if any(pdpte & PT_PRESENT_MASK and pdpte & PDPTR_RSVD_BITS for pdpte in pdptrs):
        return False
    if not tdp_enabled(kvm) and pdptrs != vcpu.arch.pdptrs:
        current = vcpu.root_mmu.root
        kvm_mmu_free_roots(cpu, kvm, vcpu.root_mmu, lambda root: root is current)
    vcpu.arch.pdptrs = pdptrs
    lib.vcpu_set_pdptrs(cpu.m, vcpu.id, ffi.new("uint64_t[]", pdptrs))
    kvm_make_request(cpu, vcpu, KVM_REQ_LOAD_MMU_PGD)
    return True


def kvm_set_cr0(cpu: Cpu, vcpu: Vcpu, cr0: int) -> bool:
    """kvm_set_cr0(): return False if the guest gets a general-protection fault instead."""
    arch, old_cr0 = vcpu.arch, vcpu.arch.cr0
    pae, paging = bool(arch.cr4 & X86_CR4_PAE), bool(cr0 & X86_CR0_PG)
    if arch.efer & EFER_LME and paging and not pae:
        return False
    loads = not arch.efer & EFER_LME and paging and pae and (cr0 ^ old_cr0) & X86_CR0_PDPTR_BITS
    if loads and not load_pdptrs(cpu, vcpu, arch.cr3):
        return False
    arch.cr0 = cr0
    vcpu.kvm.x86_ops.set_cr0(cpu, vcpu, old_cr0, cr0)
    kvm_post_set_cr0(cpu, vcpu, old_cr0, cr0)
    return True


def kvm_post_set_cr0(cpu: Cpu, vcpu: Vcpu, old_cr0: int, cr0: int) -> None:
    """kvm_post_set_cr0()

    With EPT no SPTE depends on CR0.WP, so its change keeps the roots (since 6.4); without, WP is part of the
    role. Clearing CR0.PG flushes the guest's TLB; before 5.18 the flush at the load of the root did that.
    """
    changed = cr0 ^ old_cr0
    unload_all = vcpu.kvm.policy.role_change(cpu, vcpu) == "unload-all"
    if changed == X86_CR0_WP and not unload_all:
        if not cr0 & X86_CR0_PG:
            return
        if tdp_enabled(vcpu.kvm):
            kvm_init_mmu(vcpu)
            return
    if changed & X86_CR0_PG and not cr0 & X86_CR0_PG and not unload_all:
        paging_turned_off(cpu, vcpu)
    if changed & KVM_MMU_CR0_ROLE_BITS:
        kvm_mmu_reset_context(cpu, vcpu)


def paging_turned_off(cpu: Cpu, vcpu: Vcpu) -> None:
    """Make the flush that clearing CR0.PG is defined to make.  Decision paging_off.

    Without paging the guest may write to its tables, and owes no flush for that when it sets CR0.PG again.
    So no root from before may be used as it is then: either all are freed, or the role change frees or syncs
    them.
    """
    if vcpu.kvm.policy.paging_off(cpu, vcpu) == "unload":
        kvm_mmu_unload(cpu, vcpu)
    else:
        request_guest_flush(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST)


def kvm_set_cr4(cpu: Cpu, vcpu: Vcpu, cr4: int) -> bool:
    """kvm_set_cr4(): return False if the guest gets a general-protection fault instead."""
    old_cr4 = vcpu.arch.cr4
    if is_long_mode(vcpu):
        if not cr4 & X86_CR4_PAE:
            return False
    else:
        loads = is_paging(vcpu) and cr4 & X86_CR4_PAE and (cr4 ^ old_cr4) & X86_CR4_PDPTR_BITS
        if loads and not load_pdptrs(cpu, vcpu, vcpu.arch.cr3):
            return False
    if (cr4 & ~old_cr4) & X86_CR4_PCIDE and not is_long_mode(vcpu):
        return False
    vcpu.arch.cr4 = cr4
    vcpu.kvm.x86_ops.set_cr4(cpu, vcpu)
    kvm_post_set_cr4(cpu, vcpu, old_cr4, cr4)
    return True


def set_efer(cpu: Cpu, vcpu: Vcpu, efer: int) -> bool:
    """set_efer(), of WRMSR: return False if the guest gets a general-protection fault instead.

    EFER.LMA is read-only.  A change of NX changes how the guest's tables are read, so the roots are freed.
    """
    arch, old_efer = vcpu.arch, vcpu.arch.efer
    if is_paging(vcpu) and (old_efer ^ efer) & EFER_LME:
        return False
    arch.efer = efer & ~EFER_LMA | old_efer & EFER_LMA
    if (arch.efer ^ old_efer) & KVM_MMU_EFER_ROLE_BITS:
        kvm_mmu_reset_context(cpu, vcpu)
    return True


def kvm_post_set_cr4(cpu: Cpu, vcpu: Vcpu, old_cr4: int, cr4: int) -> None:
    """kvm_post_set_cr4(): make the flushes that the SDM requires for each bit (vol. 3A, 4.10.4.1).

    Setting PCIDE requires none, but without EPT all roots are freed: they are keyed by CR3, and a MOV to CR3
    that flushes nothing could return to a root from the time when CR3 had no PCID.  Decision pcide_on.
    """
    changed = cr4 ^ old_cr4
    all_contexts = bool(changed & X86_CR4_PGE or (old_cr4 & ~cr4) & X86_CR4_PCIDE)
    invalidates_by_cr4(cpu, vcpu, old_cr4, cr4)
    if changed & KVM_MMU_CR4_ROLE_BITS:
        kvm_mmu_reset_context(cpu, vcpu)
        if vcpu.kvm.policy.role_change(cpu, vcpu) == "unload-all":
            return
    pcide_on = not tdp_enabled(vcpu.kvm) and (cr4 & ~old_cr4) & X86_CR4_PCIDE
    if pcide_on and vcpu.kvm.policy.pcide_on(cpu, vcpu) == "free":
        kvm_mmu_unload(cpu, vcpu)
    if all_contexts:
        request_guest_flush(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST)
    elif changed & X86_CR4_PAE or (cr4 & ~old_cr4) & X86_CR4_SMEP:
        smep_turned_on(cpu, vcpu)


def smep_turned_on(cpu: Cpu, vcpu: Vcpu) -> None:
    """Flush the translations of the current PCID: CR4.SMEP was set, or CR4.PAE toggled.  Decision smep_on.

    A flush of the current context is none while no root is loaded (vmx_flush_tlb_current): the flush at the
    load of the root makes up for it.
    """
    answer = vcpu.kvm.policy.smep_on(cpu, vcpu)
    if answer == "none":
        flush_elided(cpu, vcpu.kvm, lib.REASON_GUEST, vcpu.id)
    elif answer == "guest":
        request_guest_flush(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST)
    else:
        request_guest_flush(cpu, vcpu, KVM_REQ_TLB_FLUSH_CURRENT)


def invalidates_by_cr4(cpu: Cpu, vcpu: Vcpu, old_cr4: int, cr4: int) -> None:
    """Record that the guest invalidates translations by a change of CR4 (SDM vol. 3A, 4.10.4.1)."""
    changed = cr4 ^ old_cr4
    if changed & X86_CR4_PGE or (old_cr4 & ~cr4) & X86_CR4_PCIDE:
        lib.guest_invalidates_all(cpu.m, vcpu.id)
    elif changed & X86_CR4_PAE or (cr4 & ~old_cr4) & X86_CR4_SMEP:
        lib.guest_invalidates_pcid(cpu.m, vcpu.id)


def kvm_get_active_pcid(vcpu: Vcpu) -> int:
    """kvm_get_active_pcid()"""
    return kvm_get_pcid(vcpu, vcpu.arch.cr3)


def kvm_get_pcid(vcpu: Vcpu, pgd: int) -> int:
    """kvm_get_pcid()"""
    return pgd & X86_CR3_PCID_MASK if vcpu.arch.cr4 & X86_CR4_PCIDE else 0


def kvm_set_cr3(cpu: Cpu, vcpu: Vcpu, cr3: int) -> bool:
    """kvm_set_cr3(): return False if the guest gets a general-protection fault instead.

    With EPT called from the emulator only, as for RSM, because MOV CR3 does not exit.
    """
    skip_tlb_flush = False
    pcid = 0
    if vcpu.arch.cr4 & X86_CR4_PCIDE:
        skip_tlb_flush = bool(cr3 & X86_CR3_PCID_NOFLUSH)
        cr3 &= ~X86_CR3_PCID_NOFLUSH
        pcid = cr3 & X86_CR3_PCID_MASK
    if is_pae_paging(vcpu) and not load_pdptrs(cpu, vcpu, cr3):
        return False
    if cr3 != vcpu.arch.cr3:
        kvm_mmu_new_pgd(cpu, vcpu, cr3)
    vcpu.arch.cr3 = cr3
    if not skip_tlb_flush:
        kvm_invalidate_pcid(cpu, vcpu, pcid)
    elif not tdp_enabled(vcpu.kvm) and vcpu.kvm.policy.noflush_root(cpu, vcpu) == "sync":
        kvm_make_request(cpu, vcpu, KVM_REQ_MMU_SYNC)
    return True


def kvm_invalidate_pcid(cpu: Cpu, vcpu: Vcpu, pcid: int) -> None:
    """kvm_invalidate_pcid(): with EPT flush the combined mappings of all PCIDs under this VPID.

    Without EPT the shadow pages are synced as well.  Previous roots of the PCID are freed instead, because a
    later MOV to CR3 that flushes nothing may go back to them (21823fbda552); without PCIDs each such MOV
    syncs.
    """
    if tdp_enabled(vcpu.kvm):
        request_guest_flush(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST)
        return
    if kvm_get_active_pcid(vcpu) == pcid:
        kvm_make_request(cpu, vcpu, KVM_REQ_MMU_SYNC)
        request_guest_flush(cpu, vcpu, KVM_REQ_TLB_FLUSH_CURRENT)
    if not vcpu.arch.cr4 & X86_CR4_PCIDE:
        return
    mmu = vcpu.mmu
    stale = [root for root in mmu.prev_roots if root is not None and kvm_get_pcid(vcpu, root.pgd) == pcid]
    kvm_mmu_free_roots(cpu, vcpu.kvm, mmu, lambda root: any(root is one for one in stale))


def kvm_mmu_invalidate_addr(cpu: Cpu, vcpu: Vcpu, addr: int, roots: list[KvmMmuRootInfo]) -> None:
    """kvm_mmu_invalidate_addr(): drop the address from the TLB, and sync its SPTEs below `roots`."""
    vcpu.kvm.x86_ops.flush_tlb_gva(cpu, vcpu, addr)
    for root in roots:
        kvm_mmu_invalidate_addr_in_root(cpu, vcpu, addr, root)


def kvm_mmu_invlpg(cpu: Cpu, vcpu: Vcpu, addr: int) -> None:
    """kvm_mmu_invlpg(): the page may be a global one, so that all roots are concerned."""
    kvm_mmu_invalidate_addr(cpu, vcpu, addr, mmu_roots(vcpu.mmu))


def kvm_handle_invpcid(cpu: Cpu, vcpu: Vcpu, kind: int, pcid: int, addr: int) -> None:
    """kvm_handle_invpcid(), without EPT: INVPCID of type `kind` (SDM vol. 2A).

    KVM keeps no global bit in SPTEs, so that types 2 and 3 are the same.
    """
    if kind == INVPCID_TYPE_INDIV_ADDR:
        mmu = vcpu.mmu
        roots = [root for root in mmu_roots(mmu) if kvm_get_pcid(vcpu, root.pgd) == pcid]
        if roots:
            kvm_mmu_invalidate_addr(cpu, vcpu, addr, roots)
    elif kind == INVPCID_TYPE_SINGLE_CTXT:
        kvm_invalidate_pcid(cpu, vcpu, pcid)
    else:
        request_guest_flush(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST)


def set_sregs(cpu: Cpu, vcpu: Vcpu, sregs: Sregs) -> None:
    """__set_sregs(), of KVM_SET_SREGS: user space gives the vCPU other control registers.

    Decision sregs_flush.  Neither kvm_post_set_cr0() nor kvm_post_set_cr4() is called, so none of their
    flushes is made; nor is a root looked up by the new CR3, which kvm_mmu_load() finds later.  The registers
    are set before the role is computed.
    """
    arch = vcpu.arch
    old = sregs_of(vcpu)
    arch.cr0, arch.cr3, arch.cr4, arch.efer = sregs
    if old == sregs and not is_pae_paging(vcpu):
        return
    vcpu.kvm.x86_ops.set_cr0(cpu, vcpu, old.cr0, sregs.cr0)
    vcpu.kvm.x86_ops.set_cr4(cpu, vcpu)
    if is_pae_paging(vcpu):
        load_pdptrs(cpu, vcpu, sregs.cr3)
    invalidates_by_cr4(cpu, vcpu, old.cr4, sregs.cr4)
    if old.cr3 != sregs.cr3:
        lib.guest_invalidates_pcid(cpu.m, vcpu.id)
    kvm_mmu_reset_context(cpu, vcpu)
    if vcpu.kvm.policy.sregs_flush(cpu, vcpu) == "guest":
        request_guest_flush(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST)
    else:
        flush_elided(cpu, vcpu.kvm, lib.REASON_GUEST, vcpu.id)
