"""arch/x86/kvm/mmu/mmu.c: shadow pages, which are found by gfn and role, made, linked, zapped and freed.

A page that is zapped loses its children, its parents and its place in the hash at once; its memory is freed
after a flush of the whole VM (kvm_mmu_commit_zap_page), which also waits for walks without a lock.  Under
mmu_lock held for write.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from emulator.kvm.accounting import flush_elided
from emulator.kvm.bitops import for_each_set_bit
from emulator.kvm.kvm_host import KVM_REQ_MMU_FREE_OBSOLETE_ROOTS, PG_LEVEL_4K
from emulator.kvm.mmu.page_track import account_shadowed, unaccount_shadowed
from emulator.kvm.mmu.rmap import drop_spte
from emulator.kvm.mmu.shadow_spte import (
    is_mmio_spte,
    mmu_spte_clear_no_track,
    mmu_spte_set,
    spte_of,
    sptes_in_use,
)
from emulator.kvm.mmu.shadow_structs import ShadowPage, Sptep
from emulator.kvm.mmu.spte import is_last_spte, is_obsolete_sp, is_shadow_present_pte, spte_to_child_pt
from emulator.kvm.mmu.structs import KvmMmuPageRole
from emulator.kvm.structs import Kvm, tdp_enabled
from emulator.kvm.virt.requests import kvm_flush_remote_tlbs, kvm_make_all_cpus_request
from emulator.machine.runtime import Cpu
from native import lib
from native.types import NO_GFN, Gfn, Hfn, SpteIndex

# Pages that are zapped and wait for kvm_mmu_commit_zap_page().
InvalidList = list[ShadowPage]
BATCH_ZAP_PAGES = 10
KVM_MIN_FREE_MMU_PAGES = 5
KVM_REFILL_PAGES = 25


# --- finding ------------------------------------------------------------------------------------------------


def for_each_gfn_valid_sp_with_gptes(kvm: Kvm, gfn: Gfn) -> Iterator[ShadowPage]:
    """for_each_gfn_valid_sp_with_gptes(): yield the pages that shadow the guest's table in gfn.

    The caller may zap the page that it was given.
    """
    for sp in tuple(kvm.shadow.mmu_page_hash.get(gfn, ())):
        if not is_obsolete_sp(kvm, sp) and sp.has_gptes():
            yield sp


def spte_to_child_sp(kvm: Kvm, spte: int) -> ShadowPage:
    """spte_to_child_sp(): the page's struct page points to its shadow page, in the kernel."""
    return kvm.shadow.page_of[spte_to_child_pt(spte)]


# --- making and linking -------------------------------------------------------------------------------------


def kvm_mmu_alloc_shadow_page(cpu: Cpu, kvm: Kvm, gfn: Gfn, role: KvmMmuPageRole) -> ShadowPage:
    """kvm_mmu_alloc_shadow_page().  Raises OutOfFrames."""
    shadow = kvm.shadow
    cpu.stat(kvm.id, lib.STAT_MMU_CACHE_MISS)
    cpu.point("frames", "table", "write")
    table = Hfn(cpu.check(lib.shadow_page_alloc(cpu.m, cpu.id, lib.FRAME_TABLE)))
    sp = ShadowPage(table, role, gfn, shadow.mmu_valid_gen, lib.make_nonleaf_spte(cpu.m, table))
    shadow.page_of[table] = sp
    shadow.active_mmu_pages[sp] = None
    shadow.n_mmu_pages += 1
    shadow.mmu_page_hash.setdefault(gfn, []).insert(0, sp)
    if sp.has_gptes():
        account_shadowed(cpu, kvm, sp)
    return sp


def kvm_mmu_child_role(sptep: Sptep, *, direct: bool, access: int) -> KvmMmuPageRole:
    """kvm_mmu_child_role()

    A table of 4-byte entries maps 4 MiB, and the SPTE 2 MiB, so that each table has two pages.
    """
    role = sptep.sp.role
    quadrant = sptep.idx & 1 if role.has_4_byte_gpte else 0
    return replace(role, level=role.level - 1, access=access, direct=direct, invalid=False, quadrant=quadrant)


def link_shadow_page(cpu: Cpu, kvm: Kvm, sptep: Sptep, sp: ShadowPage) -> None:
    """link_shadow_page(), __link_shadow_page(): link `sp`; a present SPTE is zapped, and flushed, before.

    CPUs may have cached the old leaf, or pointers through the old table, so that the flush comes before the
    new table can be walked.
    """
    old = spte_of(cpu, sptep)
    if is_shadow_present_pte(old):
        invalid_list: InvalidList = []
        if mmu_page_zap_pte(cpu, kvm, sptep, invalid_list):
            kvm_mmu_commit_zap_page(cpu, kvm, invalid_list)
        else:
            kvm_flush_remote_tlbs(cpu, kvm, lib.REASON_REMOTE_REPLACE)
    mmu_spte_set(cpu, kvm, sptep, NO_GFN, sp.parent_spte)
    sp.parent_ptes.append(sptep)
    if sp.unsync or sp.unsync_children:
        mark_unsync(sptep)


def mark_unsync(sptep: Sptep) -> None:
    """mark_unsync(): tell all pages above the SPTE that a table below it is unsync."""
    sp, index = sptep
    if sp.unsync_child_bitmap >> index & 1:
        return
    first = not sp.unsync_child_bitmap
    sp.unsync_child_bitmap |= 1 << index
    if first:
        kvm_mmu_mark_parents_unsync(sp)


def kvm_mmu_mark_parents_unsync(sp: ShadowPage) -> None:
    """kvm_mmu_mark_parents_unsync()"""
    for parent in sp.parent_ptes:
        mark_unsync(parent)


def alloc_special_page(cpu: Cpu) -> Hfn:
    """Allocate a table that is no shadow page."""
    cpu.point("frames", "table", "write")
    return Hfn(cpu.check(lib.shadow_page_alloc(cpu.m, cpu.id, lib.FRAME_TABLE)))


def free_special_pages(cpu: Cpu, pages: Iterable[Hfn]) -> None:
    """Free tables that are no shadow pages, as no vCPU uses them any more."""
    for page in pages:
        cpu.point("frames", "table", "write")
        lib.ept_table_free(cpu.m, cpu.id, page)


# --- zapping ------------------------------------------------------------------------------------------------


def drop_parent_pte(cpu: Cpu, kvm: Kvm, sp: ShadowPage, parent: Sptep) -> None:
    """drop_parent_pte(): unlink the page from one SPTE."""
    sp.parent_ptes.remove(parent)
    mmu_spte_clear_no_track(cpu, kvm, parent)


def mmu_page_zap_pte(cpu: Cpu, kvm: Kvm, sptep: Sptep, invalid_list: InvalidList | None) -> int:
    """mmu_page_zap_pte(): clear one SPTE; return how many shadow pages were zapped with it.

    A page of a nested guest that loses its last parent is zapped as well; `invalid_list` receives it.
    """
    spte = spte_of(cpu, sptep)
    if is_mmio_spte(spte):
        mmu_spte_clear_no_track(cpu, kvm, sptep)
    if not is_shadow_present_pte(spte):
        return 0
    if is_last_spte(spte, sptep.sp.role.level):
        drop_spte(cpu, kvm, sptep)
        return 0
    child = spte_to_child_sp(kvm, spte)
    drop_parent_pte(cpu, kvm, child, sptep)
    if (
        invalid_list is not None
        and child.role.guest_mode
        and tdp_enabled(kvm)
        and not child.root_count
        and not child.parent_ptes
    ):
        return kvm_mmu_prepare_zap_page(cpu, kvm, child, invalid_list)
    return 0


def kvm_mmu_page_unlink_children(cpu: Cpu, kvm: Kvm, sp: ShadowPage, invalid_list: InvalidList) -> int:
    """kvm_mmu_page_unlink_children()"""
    return sum(mmu_page_zap_pte(cpu, kvm, sptep, invalid_list) for sptep in sptes_in_use(cpu, sp))


def unsync_leafs(cpu: Cpu, kvm: Kvm, sp: ShadowPage) -> list[ShadowPage]:
    """mmu_unsync_walk(): return the unsync pages below `sp`; bits that lead to none are cleared on the way.
    """
    found: list[ShadowPage] = []
    for index in map(SpteIndex, for_each_set_bit(sp.unsync_child_bitmap)):
        spte = spte_of(cpu, Sptep(sp, index))
        below: list[ShadowPage] = []
        if is_shadow_present_pte(spte) and not is_last_spte(spte, sp.role.level):
            child = spte_to_child_sp(kvm, spte)
            below = [child] if child.unsync else unsync_leafs(cpu, kvm, child)
        if not below:
            sp.unsync_child_bitmap &= ~(1 << index)
        found += [child for child in below if child not in found]
    return found


def __kvm_mmu_prepare_zap_page(
    cpu: Cpu, kvm: Kvm, sp: ShadowPage, invalid_list: InvalidList
) -> tuple[bool, int]:
    """__kvm_mmu_prepare_zap_page(): take the page out of use; return whether others were zapped with it, and
    how many pages in all.

    A root that vCPUs use cannot be freed.  It is marked invalid, and then all vCPUs are asked to free
    obsolete roots; a vCPU that serves the request sees the mark.  An obsolete root needs no request: its
    vCPUs were asked when the generation changed.
    """
    cpu.stat(kvm.id, lib.STAT_MMU_SHADOW_ZAPPED)
    zapped = mmu_zap_unsync_children(cpu, kvm, sp, invalid_list)
    zapped += kvm_mmu_page_unlink_children(cpu, kvm, sp, invalid_list)
    for parent in tuple(sp.parent_ptes):
        drop_parent_pte(cpu, kvm, sp, parent)
    list_unstable = bool(zapped)
    if not sp.role.invalid and sp.has_gptes():
        unaccount_shadowed(cpu, kvm, sp)
    cpu.point("unsync", sp.hfn, "write")
    sp.unsync = False
    zapped_root = False
    kvm.shadow.active_mmu_pages.pop(sp, None)
    if not sp.root_count:
        zapped += 1
        invalid_list.append(sp)
        kvm.shadow.n_mmu_pages -= 1
    else:
        zapped_root = not is_obsolete_sp(kvm, sp)
    cpu.point("role", sp.hfn, "write")
    sp.invalidate()
    if zapped_root:
        kvm_make_all_cpus_request(cpu, kvm, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS)
    return list_unstable, zapped


def kvm_mmu_prepare_zap_page(cpu: Cpu, kvm: Kvm, sp: ShadowPage, invalid_list: InvalidList) -> int:
    """kvm_mmu_prepare_zap_page(): as above; return how many pages were zapped."""
    return __kvm_mmu_prepare_zap_page(cpu, kvm, sp, invalid_list)[1]


def mmu_zap_unsync_children(cpu: Cpu, kvm: Kvm, parent: ShadowPage, invalid_list: InvalidList) -> int:
    """mmu_zap_unsync_children(): zap the unsync pages below a page that is zapped."""
    if parent.role.level == PG_LEVEL_4K:
        return 0
    zapped = 0
    while unsync := unsync_leafs(cpu, kvm, parent):
        for sp in unsync:
            kvm_mmu_prepare_zap_page(cpu, kvm, sp, invalid_list)
            zapped += 1
    return zapped


def kvm_mmu_commit_zap_page(cpu: Cpu, kvm: Kvm, invalid_list: InvalidList) -> None:
    """kvm_mmu_commit_zap_page(): flush the whole VM, then free the pages.  Decision commit_zap.

    When the flush returns, nothing can reach the pages: since they were unlinked, every vCPU has left guest
    mode once, and has ended the walk without a lock that it may have been in (READING_SHADOW_PAGE_TABLES).
    """
    if not invalid_list:
        return
    answer = kvm.policy.commit_zap(cpu, kvm)
    if answer == "batch" and not _batch_is_full(kvm, invalid_list):
        flush_elided(cpu, kvm, lib.REASON_REMOTE_ZAP, kvm.id)
        return
    if answer == "none":
        flush_elided(cpu, kvm, lib.REASON_REMOTE_ZAP, kvm.id)
    else:
        kvm_flush_remote_tlbs(cpu, kvm, lib.REASON_REMOTE_ZAP)
    for sp in invalid_list:
        assert sp.role.invalid
        assert not sp.root_count
        _kvm_mmu_free_shadow_page(cpu, kvm, sp)
    invalid_list.clear()


def _batch_is_full(kvm: Kvm, invalid_list: InvalidList) -> bool:
    """Let the pages wait with those of earlier zaps; if these are enough, or no page is in use any more, hand
    them all back."""
    waiting = kvm.shadow.zapped_pages
    waiting += invalid_list
    invalid_list.clear()
    if len(waiting) < BATCH_ZAP_PAGES and kvm.shadow.active_mmu_pages:
        return False
    invalid_list += waiting
    waiting.clear()
    return True


def _kvm_mmu_free_shadow_page(cpu: Cpu, kvm: Kvm, sp: ShadowPage) -> None:
    """kvm_mmu_free_shadow_page()"""
    shadow = kvm.shadow
    chain = shadow.mmu_page_hash[sp.gfn]
    chain.remove(sp)
    if not chain:
        del shadow.mmu_page_hash[sp.gfn]
    del shadow.page_of[sp.hfn]
    cpu.point("frames", "table", "write")
    lib.ept_table_free(cpu.m, cpu.id, sp.hfn)


def kvm_mmu_remote_flush_or_zap(cpu: Cpu, kvm: Kvm, invalid_list: InvalidList, remote_flush: bool) -> bool:
    """kvm_mmu_remote_flush_or_zap(): free the pages of the list, which flushes; without any, flush if
    `remote_flush`."""
    if not remote_flush and not invalid_list:
        return False
    if invalid_list:
        kvm_mmu_commit_zap_page(cpu, kvm, invalid_list)
    else:
        kvm_flush_remote_tlbs(cpu, kvm, lib.REASON_REMOTE_PROTECT)
    return True


def kvm_mmu_zap_oldest_mmu_pages(cpu: Cpu, kvm: Kvm, nr_to_zap: int) -> int:
    """kvm_mmu_zap_oldest_mmu_pages(): zap pages that are no vCPU's root, the oldest first; return how many.
    """
    invalid_list: InvalidList = []
    total = 0
    while total < nr_to_zap:
        sp = next((sp for sp in kvm.shadow.active_mmu_pages if not sp.root_count), None)
        if sp is None:
            break
        total += kvm_mmu_prepare_zap_page(cpu, kvm, sp, invalid_list)
    cpu.stat(kvm.id, lib.STAT_MMU_RECYCLED, total)
    kvm_mmu_commit_zap_page(cpu, kvm, invalid_list)
    return total


def make_mmu_pages_available(cpu: Cpu, kvm: Kvm) -> bool:
    """make_mmu_pages_available(): zap old pages if few are left; return whether one is available."""
    shadow = kvm.shadow
    available = shadow.n_max_mmu_pages - shadow.n_mmu_pages
    if available < KVM_MIN_FREE_MMU_PAGES:
        kvm_mmu_zap_oldest_mmu_pages(cpu, kvm, KVM_REFILL_PAGES - available)
    return shadow.n_max_mmu_pages > shadow.n_mmu_pages


def kvm_zap_obsolete_pages(cpu: Cpu, kvm: Kvm) -> None:
    """kvm_zap_obsolete_pages(), under slots_lock: zap the pages of the last mmu_valid_gen.

    No flush is due at a yield, because the vCPUs have been kicked off their roots; the flush at the end ends
    walks without a lock.
    """
    invalid_list: InvalidList = []
    batch = 0
    while True:
        sp = next(iter(kvm.shadow.active_mmu_pages), None)
        if sp is None or not is_obsolete_sp(kvm, sp):
            break
        if batch >= BATCH_ZAP_PAGES:
            batch = 0
            if kvm.mmu_lock.needbreak(cpu):
                kvm.mmu_lock.cond_resched(cpu, None)
                continue
        batch += kvm_mmu_prepare_zap_page(cpu, kvm, sp, invalid_list)
    kvm_mmu_commit_zap_page(cpu, kvm, invalid_list)


def shadow_mmu_zap_all(cpu: Cpu, kvm: Kvm) -> None:
    """Zap every shadow page: the first half of kvm_mmu_zap_all()."""
    invalid_list: InvalidList = []
    while kvm.shadow.active_mmu_pages:
        kvm_mmu_prepare_zap_page(cpu, kvm, next(iter(kvm.shadow.active_mmu_pages)), invalid_list)
    kvm_mmu_commit_zap_page(cpu, kvm, invalid_list)
