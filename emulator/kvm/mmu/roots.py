"""arch/x86/kvm/mmu/mmu.c: roles, and the roots that a vCPU holds: loaded, cached, freed.  Zaps: mmu.py."""

from __future__ import annotations

from collections.abc import Callable

from emulator.kvm.accounting import flush_elided
from emulator.kvm.kvm_host import (
    KVM_MMU_NUM_PREV_ROOTS,
    KVM_REQ_LOAD_MMU_PGD,
    KVM_REQ_MMU_FREE_OBSOLETE_ROOTS,
    KVM_REQ_MMU_SYNC,
    KVM_REQ_TLB_FLUSH_CURRENT,
    PG_LEVEL_256T,
    PG_LEVEL_512G,
)
from emulator.kvm.mmu import page_fault
from emulator.kvm.mmu.lockless import clear_sp_write_flooding_count
from emulator.kvm.mmu.shadow import InvalidList, free_special_pages, kvm_mmu_commit_zap_page
from emulator.kvm.mmu.shadow_roots import (
    free_pae_roots,
    init_kvm_shadow_mmu,
    mmu_alloc_shadow_roots,
    shadow_mmu_alloc_direct_roots,
    shadow_mmu_free_root_page,
)
from emulator.kvm.mmu.shadow_structs import ShadowPage
from emulator.kvm.mmu.spte import is_obsolete_sp, is_tdp_mmu_page, root_to_sp
from emulator.kvm.mmu.structs import KvmMmu, KvmMmuPageRole, KvmMmuRootInfo
from emulator.kvm.mmu.sync import is_unsync_root, kvm_mmu_sync_roots
from emulator.kvm.mmu.tdp_roots import kvm_tdp_mmu_alloc_root, kvm_tdp_mmu_put_root, root_lock
from emulator.kvm.structs import Kvm, Vcpu, tdp_enabled, tdp_mmu_enabled
from emulator.kvm.virt.requests import kvm_check_request, kvm_make_request
from emulator.machine.runtime import Cpu
from native import lib
from native.types import FlushReason, Level

# --- roles --------------------------------------------------------------------------------------------------


def kvm_mmu_get_tdp_level(vcpu: Vcpu) -> Level:
    """kvm_mmu_get_tdp_level(): return 4 instead of 5 levels for a guest with at most 48 address bits."""
    max_tdp_level = vcpu.kvm.params.tdp_level
    if max_tdp_level == PG_LEVEL_256T and vcpu.maxphyaddr <= 48:
        return PG_LEVEL_512G
    return max_tdp_level


def kvm_calc_tdp_mmu_root_page_role(vcpu: Vcpu) -> KvmMmuPageRole:
    """kvm_calc_tdp_mmu_root_page_role(): compute the role, in which no bit of CR0, CR4 or EFER takes part."""
    level = kvm_mmu_get_tdp_level(vcpu)
    return KvmMmuPageRole(level=level, smm=int(vcpu.arch.smm), guest_mode=vcpu.arch.guest_mode, direct=True)


def kvm_init_mmu(vcpu: Vcpu) -> None:
    """kvm_init_mmu(), init_kvm_tdp_mmu()

    A nested guest for which L1 has an EPT uses guest_mmu (mmu_is_nested()).  The role of guest_mmu does not
    depend on the guest's registers.
    """
    mmu = vcpu.root_mmu
    if vcpu.mmu is vcpu.guest_mmu:
        return
    if not tdp_enabled(vcpu.kvm):
        init_kvm_shadow_mmu(vcpu)
        return
    mmu.root_role = kvm_calc_tdp_mmu_root_page_role(vcpu)
    mmu.page_fault = page_fault.kvm_tdp_page_fault


def kvm_mmu_reset_context(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_mmu_reset_context(): recompute the role.  Decision role_change.

    Linux frees the roots even if the role is unchanged; the vCPU then finds them again and loads them with a
    flush, and without EPT with a sync.  A policy that keeps them switches to a cached root, which is used as
    it is, or synced and flushed, too.
    """
    answer = vcpu.kvm.policy.role_change(cpu, vcpu)
    if answer == "reset-context" or answer == "unload-all":
        kvm_mmu_unload(cpu, vcpu)
        kvm_init_mmu(vcpu)
        return
    kvm_init_mmu(vcpu)
    kvm_mmu_new_pgd(cpu, vcpu, vcpu.arch.cr3)
    if answer == "keep-roots-synced" and vcpu.mmu.root is not None:
        sync_and_flush_on_reuse(cpu, vcpu, lib.REASON_ROOT_LOAD)


def kvm_mmu_after_set_cpuid(cpu: Cpu, vcpu: Vcpu, maxphyaddr: int) -> None:
    """kvm_mmu_after_set_cpuid(): free the roots, because another MAXPHYADDR may change their levels.

    KVM_SET_CPUID2 sets it.
    """
    vcpu.maxphyaddr = maxphyaddr
    kvm_mmu_unload(cpu, vcpu)
    kvm_init_mmu(vcpu)


# --- current and cached roots -------------------------------------------------------------------------------


def mmu_roots(mmu: KvmMmu) -> list[KvmMmuRootInfo]:
    """Return the roots that can become current without kvm_mmu_load."""
    return [root for root in (mmu.root, *mmu.prev_roots) if root is not None]


def active_roots(vcpu: Vcpu) -> list[KvmMmuRootInfo]:
    """Return the roots of root_mmu and guest_mmu.  (nested_mmu never maps anything into a TLB.)"""
    return mmu_roots(vcpu.root_mmu) + mmu_roots(vcpu.guest_mmu)


def is_root_usable(root: KvmMmuRootInfo | None, pgd: int, role: KvmMmuPageRole) -> bool:
    """is_root_usable(): compare the role, role.invalid included, and the guest's PGD unless it is direct."""
    if root is None or (not role.direct and pgd != root.pgd):
        return False
    sp = root_to_sp(root)
    return sp is not None and sp.role == role


def cached_root_find_and_keep_current(
    cpu: Cpu, kvm: Kvm, mmu: KvmMmu, pgd: int, role: KvmMmuPageRole
) -> bool:
    """cached_root_find_and_keep_current(): find a cached root, and keep the current one as prev_roots[0].

    C   0 1 2   before          0   C 1 2   it was prev_roots[0]
    1   C 0 2   ... [1]         2   C 0 1   ... [2]; and if it was none, 2 is freed
    """
    if is_root_usable(mmu.root, pgd, role):
        return True
    for i in range(KVM_MMU_NUM_PREV_ROOTS):
        mmu.root, mmu.prev_roots[i] = mmu.prev_roots[i], mmu.root
        if is_root_usable(mmu.root, pgd, role):
            return True
    oldest = mmu.root
    kvm_mmu_free_roots(cpu, kvm, mmu, lambda root: root is oldest)
    return False


def cached_root_find_without_current(mmu: KvmMmu, pgd: int, role: KvmMmuPageRole) -> bool:
    """cached_root_find_without_current(): find a cached root where no current one is kept; close its gap."""
    for i, prev in enumerate(mmu.prev_roots):
        if is_root_usable(prev, pgd, role):
            mmu.root = prev
            mmu.prev_roots = [*mmu.prev_roots[:i], *mmu.prev_roots[i + 1 :], None]
            return True
    return False


def fast_pgd_switch(cpu: Cpu, kvm: Kvm, mmu: KvmMmu, pgd: int, role: KvmMmuPageRole) -> bool:
    """fast_pgd_switch(): return whether a root of this PGD and role was cached; it is current now."""
    if mmu.root is not None and root_to_sp(mmu.root) is None:
        special = mmu.root
        kvm_mmu_free_roots(cpu, kvm, mmu, lambda root: root is special)
    if mmu.root is not None:
        return cached_root_find_and_keep_current(cpu, kvm, mmu, pgd, role)
    return cached_root_find_without_current(mmu, pgd, role)


def kvm_mmu_new_pgd(cpu: Cpu, vcpu: Vcpu, pgd: int) -> None:
    """kvm_mmu_new_pgd(): go back to a cached root of the PGD and the role, or leave it to kvm_mmu_reload.

    Decision cached_root: no flush.  A previous root has no stale entries, because each event that makes
    entries stale flushes previous roots, too: a remote flush drops all contexts; a move to another pCPU drops
    all contexts, or those of all previous roots.  An obsolete root does no harm:
    KVM_REQ_MMU_FREE_OBSOLETE_ROOTS is pending with it.
    """
    mmu = vcpu.mmu
    if not fast_pgd_switch(cpu, vcpu.kvm, mmu, pgd, mmu.root_role):
        return
    cpu.stat(vcpu.kvm.id, lib.STAT_CACHED_ROOTS)
    sp = root_to_sp(mmu.root)
    assert sp is not None
    if isinstance(sp, ShadowPage):
        clear_sp_write_flooding_count(cpu, sp)
    kvm_make_request(cpu, vcpu, KVM_REQ_LOAD_MMU_PGD)
    if vcpu.kvm.heard.root_current is not None:
        vcpu.kvm.heard.root_current(cpu, vcpu, sp)
    if vcpu.kvm.policy.cached_root(cpu, vcpu, sp) == "flush-current":
        sync_and_flush_on_reuse(cpu, vcpu, lib.REASON_CACHED_ROOT)


def sync_and_flush_on_reuse(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """Request for a cached root the sync and flush of a load (force_flush_and_sync_on_reuse).

    A direct root has nothing to sync.
    """
    if not vcpu.mmu.root_role.direct or not tdp_enabled(vcpu.kvm):
        kvm_make_request(cpu, vcpu, KVM_REQ_MMU_SYNC)
    vcpu.flush_current_reason = reason
    kvm_make_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_CURRENT)


# --- loading and freeing ------------------------------------------------------------------------------------


def kvm_mmu_reload(cpu: Cpu, vcpu: Vcpu) -> bool:
    """kvm_mmu_reload(): ensure that there is a current root; return whether one had to be loaded."""
    if kvm_check_request(cpu, vcpu, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS):
        kvm_mmu_free_obsolete_roots(cpu, vcpu)
    if vcpu.mmu.root is not None:
        return False
    kvm_mmu_load(cpu, vcpu)
    return True


def kvm_mmu_load(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_mmu_load(): find or allocate the root, write EPT_POINTER, and flush.

    The flush is immediate, without a request.  Because of it, roots can be freed without a flush: the page
    may have been a root before, and entries tagged with it may have survived on this pCPU.  Decision
    root_load.  Raises OutOfFrames.
    """
    kvm, mmu = vcpu.kvm, vcpu.mmu
    cpu.stat(kvm.id, lib.STAT_MMU_LOAD)
    if not mmu.root_role.direct:
        mmu_alloc_shadow_roots(cpu, vcpu)
        kvm_mmu_sync_roots(cpu, vcpu)
    else:
        mmu_alloc_direct_roots(cpu, vcpu)
    root = mmu.root
    assert root is not None
    kvm_mmu_load_pgd(cpu, vcpu)
    cpu.event(lib.EVENT_ROOT_LOAD, vcpu.id, root.hfn, kvm.id)
    if root.sp is None:
        kvm.x86_ops.flush_tlb_current(cpu, vcpu, lib.REASON_ROOT_LOAD)
        return
    if kvm.heard.root_current is not None:
        kvm.heard.root_current(cpu, vcpu, root.sp)
    answer = kvm.policy.root_load(cpu, vcpu, root.sp)
    if answer == "none":
        flush_elided(cpu, kvm, lib.REASON_ROOT_LOAD, root.hfn)
    elif answer == "flush-current":
        kvm.x86_ops.flush_tlb_current(cpu, vcpu, lib.REASON_ROOT_LOAD)


def mmu_alloc_direct_roots(cpu: Cpu, vcpu: Vcpu) -> None:
    """mmu_alloc_direct_roots(): find or allocate the TDP MMU's root of the MMU's role."""
    mmu = vcpu.mmu
    if not tdp_mmu_enabled(vcpu.kvm):
        shadow_mmu_alloc_direct_roots(cpu, vcpu)
        return
    sp = kvm_tdp_mmu_alloc_root(cpu, vcpu.kvm, mmu.root_role)
    mmu.root = KvmMmuRootInfo(pgd=0, hfn=sp.hfn, sp=sp)


def kvm_mmu_load_pgd(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_mmu_load_pgd(): let the vendor load the current root, if there is one."""
    mmu = vcpu.mmu
    if mmu.root is not None:
        vcpu.kvm.x86_ops.load_mmu_pgd(cpu, vcpu, mmu.root.hfn, mmu.root_role.level)


def is_obsolete_root(kvm: Kvm, root: KvmMmuRootInfo) -> bool:
    """is_obsolete_root(): return whether to free it: always if no shadow page can tell that it is fresh."""
    sp = root_to_sp(root)
    return sp is None or is_obsolete_sp(kvm, sp)


def kvm_mmu_free_roots(cpu: Cpu, kvm: Kvm, mmu: KvmMmu, wanted: Callable[[KvmMmuRootInfo], bool]) -> None:
    """kvm_mmu_free_roots(): drop the references on the `wanted` roots of `mmu`, if any; previous roots first.

    Decision root_lock.
    """
    roots = (mmu.root, *mmu.prev_roots)
    if not any(root is not None and wanted(root) for root in roots):
        return
    invalid_list: InvalidList = []
    tdp = tdp_mmu_enabled(kvm) and mmu.root_role.direct
    with root_lock(cpu, kvm) if tdp else kvm.mmu_lock.write_lock(cpu):
        for i in range(KVM_MMU_NUM_PREV_ROOTS):
            prev = mmu.prev_roots[i]
            if prev is not None and wanted(prev):
                mmu.prev_roots[i] = None
                mmu_free_root_page(cpu, kvm, prev, invalid_list)
        if mmu.root is not None and wanted(mmu.root):
            root, mmu.root = mmu.root, None
            mmu_free_root_page(cpu, kvm, root, invalid_list)
            free_pae_roots(cpu, kvm, mmu, invalid_list)
        kvm_mmu_commit_zap_page(cpu, kvm, invalid_list)


def kvm_mmu_free_guest_mode_roots(cpu: Cpu, kvm: Kvm, mmu: KvmMmu) -> None:
    """kvm_mmu_free_guest_mode_roots(), while L1 runs: free the cached roots of L2, and each cached root that
    has no shadow page, because it has no role that names its guest (25b62c627432)."""
    if mmu.root_role.guest_mode:
        raise AssertionError("WARN_ON_ONCE: kvm_mmu_free_guest_mode_roots: the current role is L2's")
    current = mmu.root

    def of_guest_mode(root: KvmMmuRootInfo) -> bool:
        sp = root_to_sp(root)
        return root is not current and (sp is None or sp.role.guest_mode)

    kvm_mmu_free_roots(cpu, kvm, mmu, of_guest_mode)


def mmu_free_root_page(cpu: Cpu, kvm: Kvm, root: KvmMmuRootInfo, invalid_list: InvalidList) -> None:
    """mmu_free_root_page(): put the root, unless it has no shadow page; such roots are not refcounted."""
    sp = root_to_sp(root)
    if isinstance(sp, ShadowPage):
        shadow_mmu_free_root_page(cpu, kvm, sp, invalid_list)
    elif sp is not None:
        if not is_tdp_mmu_page(sp):
            raise AssertionError(f"{sp!r} is a root of no MMU")
        kvm_tdp_mmu_put_root(cpu, kvm, sp)


def kvm_mmu_sync_prev_roots(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_mmu_sync_prev_roots(): free the previous roots below which a table is unsync, instead of syncing.
    """
    mmu = vcpu.mmu
    unsync = [root for root in mmu.prev_roots if is_unsync_root(cpu, vcpu.kvm, root)]
    kvm_mmu_free_roots(cpu, vcpu.kvm, mmu, lambda root: any(root is one for one in unsync))


def kvm_mmu_free_obsolete_roots(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_mmu_free_obsolete_roots()"""
    for mmu in (vcpu.root_mmu, vcpu.guest_mmu):
        for root in mmu_roots(mmu):
            cpu.point("role", root.hfn, "read")
        kvm_mmu_free_roots(cpu, vcpu.kvm, mmu, lambda root: is_obsolete_root(vcpu.kvm, root))


def kvm_mmu_destroy(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_mmu_destroy(): free the roots, and the pages above PAE roots."""
    kvm_mmu_unload(cpu, vcpu)
    for mmu in (vcpu.root_mmu, vcpu.guest_mmu):
        if mmu.pml4_root is not None:
            free_special_pages(cpu, mmu.pml4_root)
            mmu.pml4_root = None


def kvm_mmu_unload(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_mmu_unload(): free all roots of the vCPU, without a flush."""
    for mmu in (vcpu.root_mmu, vcpu.guest_mmu):
        kvm_mmu_free_roots(cpu, vcpu.kvm, mmu, lambda root: True)
