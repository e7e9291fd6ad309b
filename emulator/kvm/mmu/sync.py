"""arch/x86/kvm/mmu/mmu.c: unsync pages, and finding the shadow page of a guest's table.

The guest may write to a table of level 1 without exits; its shadow page is then unsync, and out of date
until the guest invalidates.  The emulation of that invalidation compares each SPTE with the guest's entry
again.  The functions need mmu_lock held for write, unless their docstrings say otherwise.
"""

from __future__ import annotations

from emulator.kvm.kvm_host import KVM_REQ_MMU_SYNC, PG_LEVEL_2M, PG_LEVEL_4K, SPTE_ENT_PER_PAGE
from emulator.kvm.mmu.lockless import clear_sp_write_flooding_count, shadow_walk_root
from emulator.kvm.mmu.page_track import (
    kvm_gfn_is_lpage_allowed,
    kvm_gfn_is_write_tracked,
    kvm_mmu_slot_gfn_write_protect,
    stores_exit,
    stores_need_not_exit,
)
from emulator.kvm.mmu.shadow import (
    InvalidList,
    for_each_gfn_valid_sp_with_gptes,
    kvm_mmu_alloc_shadow_page,
    kvm_mmu_child_role,
    kvm_mmu_commit_zap_page,
    kvm_mmu_mark_parents_unsync,
    kvm_mmu_prepare_zap_page,
    kvm_mmu_remote_flush_or_zap,
    mmu_page_zap_pte,
    spte_to_child_sp,
    unsync_leafs,
)
from emulator.kvm.mmu.shadow_spte import SHADOW_NONPRESENT_VALUE, spte_of, sptes_in_use
from emulator.kvm.mmu.shadow_structs import ShadowPage, Sptep
from emulator.kvm.mmu.spte import is_large_pte, is_last_spte, is_obsolete_sp, is_shadow_present_pte
from emulator.kvm.mmu.structs import KvmMmuPageRole, KvmMmuRootInfo
from emulator.kvm.structs import Kvm, KvmMemorySlot, Vcpu
from emulator.kvm.virt.requests import kvm_flush_remote_tlbs, kvm_make_request
from emulator.kvm.virt.slots import gfn_to_memslot
from emulator.machine.runtime import Cpu
from native import lib
from native.types import Gfn, SpteIndex

# --- making tables unsync -----------------------------------------------------------------------------------


def mmu_try_to_unsync_pages(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, *, synchronizing: bool, prefetch: bool
) -> bool:
    """mmu_try_to_unsync_pages(): let an SPTE map gfn writable; return False if it must be write-protected.

    Where gfn is a table of level 1, its shadow pages are marked unsync before the SPTE is set: a vCPU that
    has written to the table and then flushes looks at the marks without a lock (is_unsync_root).  While such
    a flush is being emulated (`synchronizing`) no page becomes unsync again.
    """
    if kvm_gfn_is_write_tracked(cpu, kvm, slot, gfn):
        return False
    if kvm_gfn_is_lpage_allowed(cpu, kvm, slot, gfn, PG_LEVEL_2M):
        return True  # a gfn with a shadow page disallows huge pages
    for sp in for_each_gfn_valid_sp_with_gptes(kvm, gfn):
        if synchronizing:
            return False
        if sp.unsync:
            continue
        if prefetch:
            return False
        with kvm.shadow.mmu_unsync_pages_lock.held(cpu):
            if not sp.unsync:
                _kvm_unsync_page(cpu, kvm, sp)
    # All of its pages are unsync now, or obsolete: no vCPU uses those, whatever the guest stores.
    stores_need_not_exit(cpu, kvm, gfn)
    return True


def _kvm_unsync_page(cpu: Cpu, kvm: Kvm, sp: ShadowPage) -> None:
    """kvm_unsync_page()"""
    assert sp.role.level == PG_LEVEL_4K
    cpu.stat(kvm.id, lib.STAT_MMU_UNSYNC)
    cpu.point("unsync", kvm.id, "write")
    sp.unsync = True
    kvm_mmu_mark_parents_unsync(sp)


# --- syncing ------------------------------------------------------------------------------------------------


def kvm_sync_spte(cpu: Cpu, vcpu: Vcpu, sp: ShadowPage, index: SpteIndex) -> int:
    """kvm_sync_spte(): compare one SPTE with the guest's entry; below 0: impossible, 1: changed, flush."""
    if spte_of(cpu, Sptep(sp, index)) == SHADOW_NONPRESENT_VALUE:
        return 0
    sync_spte = vcpu.mmu.sync_spte
    assert sync_spte is not None
    return sync_spte(cpu, vcpu, sp, index)


def kvm_sync_page(cpu: Cpu, vcpu: Vcpu, sp: ShadowPage, invalid_list: InvalidList) -> int:
    """kvm_sync_page(): compare all SPTEs; below 0: the page was zapped, 1: a flush is due.

    The flush serves KVM: a later unmap or write protection does not find a dropped SPTE, and would not flush
    for it.  The guest has no claim to it, because vCPUs may use old translations until the guest invalidates.
    """
    flush = 0
    for sptep in sptes_in_use(cpu, sp):
        changed = kvm_sync_spte(cpu, vcpu, sp, sptep.idx)
        if changed < 0:
            kvm_mmu_prepare_zap_page(cpu, vcpu.kvm, sp, invalid_list)
            return -1
        flush |= changed
    cpu.stat(vcpu.kvm.id, lib.STAT_MMU_SYNCED)
    return flush


def mmu_sync_children(cpu: Cpu, vcpu: Vcpu, parent: ShadowPage, *, can_yield: bool) -> bool:
    """mmu_sync_children(): sync all unsync pages below `parent`; return False if it stopped half-way.

    The guest's tables are write-protected, and the TLBs flushed, before their entries are read.  Otherwise
    another vCPU could write to a table through its TLB after that, and nothing would ever notice.
    """
    kvm = vcpu.kvm
    invalid_list: InvalidList = []
    flush = False
    while unsync := unsync_leafs(cpu, kvm, parent):
        protected = False
        for sp in unsync:
            slot = gfn_to_memslot(cpu, kvm, sp.gfn, int(vcpu.arch.smm))
            assert slot is not None
            protected |= kvm_mmu_slot_gfn_write_protect(cpu, kvm, slot, sp.gfn, PG_LEVEL_4K)
        if protected:
            kvm_mmu_remote_flush_or_zap(cpu, kvm, invalid_list, remote_flush=True)
            flush = False
        for sp in unsync:
            if not sp.role.invalid:
                stores_exit(cpu, kvm, sp.gfn)
                cpu.point("unsync", kvm.id, "write")
                sp.unsync = False
                flush |= kvm_sync_page(cpu, vcpu, sp, invalid_list) > 0
        if kvm.mmu_lock.needbreak(cpu):
            kvm_mmu_remote_flush_or_zap(cpu, kvm, invalid_list, flush)
            flush = False
            if not can_yield:
                kvm_make_request(cpu, vcpu, KVM_REQ_MMU_SYNC)
                return False
            kvm.mmu_lock.cond_resched(cpu, None)
    kvm_mmu_remote_flush_or_zap(cpu, kvm, invalid_list, flush)
    return True


def is_unsync_root(cpu: Cpu, kvm: Kvm, root: KvmMmuRootInfo | None) -> bool:
    """is_unsync_root(), without a lock: return whether a table below the root is unsync.

    No lock is needed.  The guest's stores to a table come after the mark that permits them, and the flush
    that KVM emulates for this vCPU covers only stores that came before the flush.
    """
    if root is None or not isinstance(root.sp, ShadowPage):
        return False
    cpu.point("unsync", kvm.id, "read")
    return root.sp.unsync or bool(root.sp.unsync_children)


def kvm_mmu_sync_roots(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_mmu_sync_roots(): sync all that the current root leads to.

    Under PAE roots the marks are not looked at before mmu_lock is taken.
    """
    mmu = vcpu.mmu
    if mmu.root_role.direct or mmu.root is None:
        return
    roots: list[ShadowPage] = []
    if isinstance(mmu.root.sp, ShadowPage):
        if is_unsync_root(cpu, vcpu.kvm, mmu.root):
            roots = [mmu.root.sp]
    else:
        roots = [root for root in mmu.pae_root if root is not None]
    if not roots:
        return
    with vcpu.kvm.mmu_lock.write_lock(cpu):
        for root in roots:
            mmu_sync_children(cpu, vcpu, root, can_yield=True)


# --- finding ------------------------------------------------------------------------------------------------


def kvm_mmu_find_shadow_page(cpu: Cpu, vcpu: Vcpu, gfn: Gfn, role: KvmMmuPageRole) -> ShadowPage | None:
    """kvm_mmu_find_shadow_page(): look up a page of that gfn and role in the hash.

    An unsync page is synced, and stays unsync: it then maps the present contents of the guest's table, as a
    new page would.
    """
    kvm = vcpu.kvm
    invalid_list: InvalidList = []
    found = None
    for sp in tuple(kvm.shadow.mmu_page_hash.get(gfn, ())):
        if is_obsolete_sp(kvm, sp):
            continue
        if sp.role != role:
            if role.level > PG_LEVEL_4K and sp.unsync:
                # The guest uses the page as another kind of table now, which must be write-protected.
                kvm_mmu_prepare_zap_page(cpu, kvm, sp, invalid_list)
            continue
        if sp.unsync:
            changed = kvm_sync_page(cpu, vcpu, sp, invalid_list)
            if changed < 0:
                break
            if changed:
                kvm_flush_remote_tlbs(cpu, kvm, lib.REASON_REMOTE_PROTECT)
        clear_sp_write_flooding_count(cpu, sp)
        found = sp
        break
    kvm_mmu_commit_zap_page(cpu, kvm, invalid_list)
    return found


def kvm_mmu_get_shadow_page(cpu: Cpu, vcpu: Vcpu, gfn: Gfn, role: KvmMmuPageRole) -> ShadowPage:
    """kvm_mmu_get_shadow_page(): find the page, or make it.  Raises OutOfFrames."""
    found = kvm_mmu_find_shadow_page(cpu, vcpu, gfn, role)
    return found or kvm_mmu_alloc_shadow_page(cpu, vcpu.kvm, gfn, role)


def kvm_mmu_get_child_sp(
    cpu: Cpu, vcpu: Vcpu, sptep: Sptep, gfn: Gfn, *, direct: bool, access: int
) -> ShadowPage | None:
    """kvm_mmu_get_child_sp(): return the page to link below the SPTE; None: it is linked already (-EEXIST).
    """
    role = kvm_mmu_child_role(sptep, direct=direct, access=access)
    spte = spte_of(cpu, sptep)
    if is_shadow_present_pte(spte) and not is_large_pte(spte):
        child = spte_to_child_sp(vcpu.kvm, spte)
        if child.gfn == gfn and child.role == role:
            return None
    return kvm_mmu_get_shadow_page(cpu, vcpu, gfn, role)


# --- invalidating single addresses --------------------------------------------------------------------------


def kvm_mmu_invalidate_addr_in_root(cpu: Cpu, vcpu: Vcpu, addr: int, root: KvmMmuRootInfo | None) -> None:
    """__kvm_mmu_invalidate_addr(): sync the SPTE for a page of the guest below one root.

    A root without a shadow page is the current one, and is a dummy or has PAE roots below it.
    """
    if root is None:
        return
    kvm = vcpu.kvm
    sp = root.sp if isinstance(root.sp, ShadowPage) else shadow_walk_root(vcpu, addr)
    if sp is None or vcpu.mmu.root_role.direct:
        return
    with kvm.mmu_lock.write_lock(cpu):
        while True:
            sptep = Sptep(sp, SpteIndex(addr >> 12 + 9 * (sp.role.level - 1) & SPTE_ENT_PER_PAGE - 1))
            if sp.unsync:
                changed = kvm_sync_spte(cpu, vcpu, sp, sptep.idx)
                if changed < 0:
                    mmu_page_zap_pte(cpu, kvm, sptep, None)
                if changed:
                    kvm_flush_remote_tlbs(cpu, kvm, lib.REASON_REMOTE_PROTECT)
            spte = spte_of(cpu, sptep)
            if not sp.unsync_children or not is_shadow_present_pte(spte) or is_last_spte(spte, sp.role.level):
                return
            sp = spte_to_child_sp(kvm, spte)
