"""arch/x86/kvm/mmu/mmu.c: roots of the shadow MMU."""

from __future__ import annotations

from dataclasses import replace

from emulator.kvm.kvm_host import (
    EFER_NX,
    PG_LEVEL_2M,
    PG_LEVEL_512G,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_PAE,
    X86_CR4_PSE,
    X86_CR4_SMAP,
    X86_CR4_SMEP,
)
from emulator.kvm.mmu.guest_walk import (
    PAGING32,
    PAGING64,
    PT32_ROOT_LEVEL,
    PT32E_ROOT_LEVEL,
    PT64_ROOT_4LEVEL,
    PT_PRESENT_MASK,
    KvmPagewalk,
    ept_pagewalk,
    pagewalk_of,
)
from emulator.kvm.mmu.paging import paging_page_fault, paging_sync_spte
from emulator.kvm.mmu.shadow import (
    InvalidList,
    alloc_special_page,
    kvm_mmu_prepare_zap_page,
    make_mmu_pages_available,
)
from emulator.kvm.mmu.shadow_map import nonpaging_page_fault
from emulator.kvm.mmu.shadow_structs import ShadowPage
from emulator.kvm.mmu.structs import ACC_ALL, KvmMmu, KvmMmuPageRole, KvmMmuRootInfo
from emulator.kvm.mmu.sync import kvm_mmu_get_shadow_page
from emulator.kvm.structs import Kvm, Vcpu, is_long_mode, tdp_enabled
from emulator.kvm.virt.guest_memory import kvm_is_visible_memslot
from emulator.kvm.virt.slots import gfn_to_memslot
from emulator.machine.runtime import Cpu, OutOfFrames
from native import lib
from native.types import NO_GFN, Gfn, Hfn, Level, SpteIndex


def kvm_init_pagewalk(vcpu: Vcpu) -> KvmPagewalk:
    """kvm_calc_cpu_role(), with paging: compute from the guest's registers how its tables are walked.

    In long mode they have four levels: a guest's CR4.LA57 changes no walk.
    """
    arch = vcpu.arch
    pae = bool(arch.cr4 & X86_CR4_PAE)
    level = PT64_ROOT_4LEVEL if is_long_mode(vcpu) else PT32E_ROOT_LEVEL if pae else PT32_ROOT_LEVEL
    return KvmPagewalk(
        fmt=PAGING64 if pae else PAGING32,
        level=level,
        cr0_wp=bool(arch.cr0 & X86_CR0_WP),
        cr4_smep=bool(arch.cr4 & X86_CR4_SMEP),
        cr4_pse=bool(arch.cr4 & X86_CR4_PSE),
        efer_nx=bool(arch.efer & EFER_NX),
    )


def kvm_calc_shadow_root_page_role(vcpu: Vcpu, w: KvmPagewalk | None) -> KvmMmuPageRole:
    """init_kvm_shadow_mmu(): compute the role of the root, which has three levels at least.

    Without paging the guest's linear addresses are guest-physical, and KVM maps them by PAE tables.  EFER.NX
    is no part of the role, as KVM sets it for itself whenever it shadows (init_kvm_shadow_mmu).
    """
    arch = vcpu.arch
    role = KvmMmuPageRole(smm=int(arch.smm), guest_mode=arch.guest_mode, access=ACC_ALL)
    if w is None:
        return replace(role, level=PT32E_ROOT_LEVEL, direct=True, cr0_wp=False)
    return replace(
        role,
        level=max(w.level, PT32E_ROOT_LEVEL),
        direct=False,
        cr0_wp=w.cr0_wp,
        cr4_smep=w.cr4_smep,
        smap_andnot_wp=bool(arch.cr4 & X86_CR4_SMAP) and not w.cr0_wp,
        has_4_byte_gpte=w.fmt.entry_bytes == 4,
    )


def kvm_calc_shadow_ept_root_page_role(vcpu: Vcpu, *, accessed_dirty: bool) -> KvmMmuPageRole:
    """kvm_calc_shadow_ept_root_page_role(): compute the role of a root that shadows an EPT of L1's.

    The role depends on no register of L1 or L2.
    """
    return KvmMmuPageRole(
        level=PT64_ROOT_4LEVEL,
        smm=vcpu.root_mmu.root_role.smm,
        guest_mode=True,
        direct=False,
        access=ACC_ALL,
        ad_disabled=not accessed_dirty,
    )


def init_kvm_shadow_ept_mmu(vcpu: Vcpu, *, accessed_dirty: bool) -> None:
    """Do the first half of kvm_init_shadow_ept_mmu(): make guest_mmu shadow an EPT of L1's."""
    mmu = vcpu.guest_mmu
    mmu.w = ept_pagewalk(accessed_dirty=accessed_dirty)
    mmu.root_role = kvm_calc_shadow_ept_root_page_role(vcpu, accessed_dirty=accessed_dirty)
    mmu.page_fault, mmu.sync_spte = paging_page_fault, paging_sync_spte


def init_kvm_shadow_mmu(vcpu: Vcpu) -> None:
    """init_kvm_shadow_mmu()"""
    mmu = vcpu.root_mmu
    mmu.w = kvm_init_pagewalk(vcpu) if vcpu.arch.cr0 & X86_CR0_PG else None
    mmu.root_role = kvm_calc_shadow_root_page_role(vcpu, mmu.w)
    if mmu.root_role.direct:
        mmu.page_fault, mmu.sync_spte = nonpaging_page_fault, None
    else:
        mmu.page_fault, mmu.sync_spte = paging_page_fault, paging_sync_spte


def mmu_alloc_root(cpu: Cpu, vcpu: Vcpu, gfn: Gfn, level: Level, quadrant: int = 0) -> ShadowPage:
    """mmu_alloc_root(): find or make a root, and take a reference on it.  Raises OutOfFrames.

    With EPT, decision root_alloc when the page becomes a root for an EPT of L1's.  It may have been one
    before, and no flush was due when its last vCPU put it.
    """
    role = replace(vcpu.mmu.root_role, level=level, quadrant=quadrant)
    sp = kvm_mmu_get_shadow_page(cpu, vcpu, gfn, role)
    sp.root_count += 1
    if tdp_enabled(vcpu.kvm) and sp.policy_data is None:
        sp.policy_data = vcpu.kvm.policy.new_data("root", sp.hfn, cpu.machine.pcpus)
    if tdp_enabled(vcpu.kvm) and sp.root_count == 1:
        cpu.stat(vcpu.kvm.id, lib.STAT_NESTED_ROOTS)
        vcpu.kvm.policy.root_alloc(cpu, vcpu.kvm, sp)
    return sp


def mmu_alloc_special_roots(cpu: Cpu, mmu: KvmMmu) -> None:
    """mmu_alloc_special_roots(): make the pages above PAE roots, once.  Raises OutOfFrames.

    The kernel without EPT gives the CPU the page of the four roots itself, by PAE paging.  Here the CPU
    always walks four levels, so a page of level 4 leads to that page; both are no shadow pages.
    """
    if mmu.root_role.level != PT32E_ROOT_LEVEL or mmu.pml4_root is not None:
        return
    mmu.pml4_root = alloc_special_page(cpu), alloc_special_page(cpu)


def _link_special(cpu: Cpu, kvm: Kvm, table: Hfn, index: SpteIndex, level: Level, below: Hfn | None) -> None:
    spte = 0 if below is None else lib.make_nonleaf_spte(cpu.m, below)
    cpu.point("spte", (table, index), "write")
    lib.shadow_mmu_set_spte(cpu.m, cpu.id, kvm.id, table, index, level, NO_GFN, spte)


def shadow_mmu_alloc_direct_roots(cpu: Cpu, vcpu: Vcpu) -> None:
    """mmu_alloc_direct_roots() without EPT: make the four PAE roots.  Raises OutOfFrames."""
    kvm, mmu = vcpu.kvm, vcpu.mmu
    mmu_alloc_special_roots(cpu, mmu)
    assert mmu.pml4_root is not None
    pml4, pdpt = mmu.pml4_root
    with kvm.mmu_lock.write_lock(cpu):
        if not make_mmu_pages_available(cpu, kvm):
            raise OutOfFrames("no shadow page is left")
        for quarter in range(4):
            root = mmu_alloc_root(cpu, vcpu, Gfn(quarter << 18), PG_LEVEL_2M)
            mmu.pae_root[quarter] = root
            _link_special(cpu, kvm, pdpt, SpteIndex(quarter), PT32E_ROOT_LEVEL, root.hfn)
        _link_special(cpu, kvm, pml4, SpteIndex(0), PG_LEVEL_512G, pdpt)
        mmu.root = KvmMmuRootInfo(pgd=0, hfn=pml4, sp=None)


def kvm_mmu_get_dummy_root(cpu: Cpu, kvm: Kvm) -> Hfn:
    """kvm_mmu_get_dummy_root(): return a table without entries; the kernel has one for all VMs.  Raises
    OutOfFrames."""
    if kvm.shadow.dummy_root is None:
        kvm.shadow.dummy_root = alloc_special_page(cpu)
    return kvm.shadow.dummy_root


def mmu_alloc_shadow_roots(cpu: Cpu, vcpu: Vcpu) -> None:
    """mmu_alloc_shadow_roots(): find or make the shadow page of the guest's top table.  Raises OutOfFrames.

    If CR3 points to no memory, the root is a dummy, with which each access of the guest faults.  With 32-bit
    paging there are four roots, of a GiB each.
    """
    kvm, mmu = vcpu.kvm, vcpu.mmu
    pgd = pagewalk_of(mmu).guest_pgd(vcpu)
    gfn = PAGING64.gpte_to_gfn(pgd)
    if not kvm_is_visible_memslot(gfn_to_memslot(cpu, kvm, gfn, int(vcpu.arch.smm))):
        mmu.root = KvmMmuRootInfo(pgd=pgd, hfn=kvm_mmu_get_dummy_root(cpu, kvm), sp=None)
        return
    mmu_alloc_special_roots(cpu, mmu)
    with kvm.mmu_lock.write_lock(cpu):
        kvm.shadow.shadow_root_allocated = True  # mmu_first_shadow_root_alloc()
        if not make_mmu_pages_available(cpu, kvm):
            raise OutOfFrames("no shadow page is left")
        if pagewalk_of(mmu).level < PT64_ROOT_4LEVEL:
            mmu.root = KvmMmuRootInfo(pgd=pgd, hfn=mmu_alloc_pae_roots(cpu, vcpu, gfn), sp=None)
            return
        sp = mmu_alloc_root(cpu, vcpu, gfn, mmu.root_role.level)
        mmu.root = KvmMmuRootInfo(pgd=pgd, hfn=sp.hfn, sp=sp)


def mmu_alloc_pae_roots(cpu: Cpu, vcpu: Vcpu, root_gfn: Gfn) -> Hfn:
    """mmu_alloc_shadow_roots(), of a guest in 32-bit mode: find or make the pages of its page directories.

    PAE paging has up to four, by PDPTEs; 2-level paging one, each quarter of which has a page of its own.
    Return the page above them.
    """
    kvm, mmu, w = vcpu.kvm, vcpu.mmu, pagewalk_of(vcpu.mmu)
    assert mmu.pml4_root is not None
    pml4, pdpt = mmu.pml4_root
    pae = w.level == PT32E_ROOT_LEVEL
    for quarter in range(4):
        pdpte = w.pdptr(vcpu, quarter)
        gfn = w.fmt.gpte_to_gfn(pdpte) if pae else root_gfn
        slot = gfn_to_memslot(cpu, kvm, gfn, int(vcpu.arch.smm))
        if pae and not (pdpte & PT_PRESENT_MASK and kvm_is_visible_memslot(slot)):
            continue
        root = mmu_alloc_root(cpu, vcpu, gfn, PG_LEVEL_2M, 0 if pae else quarter)
        mmu.pae_root[quarter] = root
        _link_special(cpu, kvm, pdpt, SpteIndex(quarter), PT32E_ROOT_LEVEL, root.hfn)
    _link_special(cpu, kvm, pml4, SpteIndex(0), PG_LEVEL_512G, pdpt)
    return pml4


def shadow_mmu_free_root_page(cpu: Cpu, kvm: Kvm, sp: ShadowPage, invalid_list: InvalidList) -> None:
    """mmu_free_root_page(), under mmu_lock for write: drop a reference; the last one on an invalid root zaps
    it.

    A valid one stays in the hash, where the next vCPU that needs it finds it.
    """
    sp.root_count -= 1
    if not sp.root_count and sp.role.invalid:
        kvm_mmu_prepare_zap_page(cpu, kvm, sp, invalid_list)


def free_pae_roots(cpu: Cpu, kvm: Kvm, mmu: KvmMmu, invalid_list: InvalidList) -> None:
    """Drop the references on the four PAE roots, under mmu_lock for write."""
    for quarter, root in enumerate(mmu.pae_root):
        if root is None:
            continue
        assert mmu.pml4_root is not None
        mmu.pae_root[quarter] = None
        _link_special(cpu, kvm, mmu.pml4_root[1], SpteIndex(quarter), PT32E_ROOT_LEVEL, None)
        shadow_mmu_free_root_page(cpu, kvm, root, invalid_list)
