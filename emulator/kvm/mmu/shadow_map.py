"""arch/x86/kvm/mmu/mmu.c: setting a leaf of the shadow MMU, and mapping a guest that runs without paging.

Under mmu_lock held for write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from emulator.kvm.accounting import flush_elided
from emulator.kvm.kvm_host import PG_LEVEL_4K, SPTE_ENT_PER_PAGE, SPTE_LEVEL_BITS, kvm_pages_per_hpage
from emulator.kvm.mmu.fault import (
    ENOMEM,
    RET_PF_CONTINUE,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_INVALID,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
    RET_PF_WRITE_PROTECTED,
    KvmPageFault,
)
from emulator.kvm.mmu.hugepage import kvm_mmu_hugepage_adjust
from emulator.kvm.mmu.lockless import shadow_walk_root
from emulator.kvm.mmu.mmio import mark_mmio_spte
from emulator.kvm.mmu.page_fault import (
    fast_page_fault,
    is_page_fault_stale,
    kvm_mmu_faultin_pfn,
    page_fault_handle_page_track,
)
from emulator.kvm.mmu.rmap import drop_spte, rmap_add
from emulator.kvm.mmu.shadow import (
    drop_parent_pte,
    link_shadow_page,
    make_mmu_pages_available,
    spte_to_child_sp,
)
from emulator.kvm.mmu.shadow_spte import (
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    aged_spte,
    kvm_mmu_page_get_gfn,
    mmu_spte_update,
    spte_ad_enabled,
    spte_of,
)
from emulator.kvm.mmu.shadow_structs import ShadowPage, Sptep
from emulator.kvm.mmu.spte import (
    PT_WRITABLE_MASK,
    PfnAndRights,
    is_large_pte,
    is_last_spte,
    is_shadow_present_pte,
    spte_to_child_pt,
)
from emulator.kvm.mmu.structs import ACC_USER_MASK, ACC_WRITE_MASK
from emulator.kvm.mmu.sync import kvm_mmu_get_child_sp, mmu_try_to_unsync_pages
from emulator.kvm.structs import Kvm, KvmMemorySlot, Vcpu, tdp_enabled
from emulator.kvm.virt.requests import kvm_flush_remote_tlbs_range
from emulator.kvm.virt.slots import gfn_to_memslot, mark_page_dirty_in_slot
from emulator.machine.runtime import Cpu, OutOfFrames
from native import lib
from native.types import NO_FRAME, Custody, Gfn, Hfn, HostWritable, SpteIndex, span


def make_shadow_spte(
    cpu: Cpu,
    kvm: Kvm,
    sp: ShadowPage,
    slot: KvmMemorySlot,
    access: int,
    gfn: Gfn,
    pfn: PfnAndRights,
    old_spte: int,
    *,
    prefetch: bool,
    synchronizing: bool = False,
) -> tuple[int, bool]:
    """make_spte() of a shadow page; return the SPTE, and whether it had to be write-protected.

    A page that shadow pages stand for may be made writable only if they all become unsync.  Where the old
    leaf was writable they are already.  Decision spte_update: before 6.13 an SPTE that replaced a writable
    one had no dirty flag, and a synced one no accessed flag.
    """
    level = sp.role.level
    wrprot = False
    was_writable = is_last_spte(old_spte, level) and bool(old_spte & PT_WRITABLE_MASK)
    if access & ACC_WRITE_MASK and pfn.host_writable:
        wrprot = not was_writable and not mmu_try_to_unsync_pages(
            cpu, kvm, slot, gfn, synchronizing=synchronizing, prefetch=prefetch
        )
    if wrprot:
        access &= ~ACC_WRITE_MASK
    if tdp_enabled(kvm):
        access &= ~ACC_USER_MASK  # stands for R of an EPT, which every present SPTE has
    spte = int(lib.make_shadow_spte(pfn.pfn, pfn.custody, level, access, pfn.host_writable))
    if prefetch and not synchronizing:
        spte = aged_spte(spte, ad_enabled=spte_ad_enabled(kvm, sp))
    if kvm.policy.spte_update(cpu, kvm, gfn) == "accessed-dirty":
        # The CPU sets them again.
        spte &= ~(PT_DIRTY_MASK if was_writable else 0) & ~(PT_ACCESSED_MASK if synchronizing else 0)
    if spte & PT_WRITABLE_MASK and slot.dirty_track_enabled():
        mark_page_dirty_in_slot(cpu, slot, gfn)
    return spte, wrprot


def mmu_set_spte(
    cpu: Cpu,
    kvm: Kvm,
    slot: KvmMemorySlot | None,
    sptep: Sptep,
    access: int,
    gfn: Gfn,
    pfn: PfnAndRights,
    *,
    prefetch: bool,
    write_fault: bool = False,
) -> int:
    """mmu_set_spte(): map gfn by a leaf; return a RET_PF_ value.  slot: None if it is in none.

    A table or a leaf of another frame in the entry is dropped first, and flushed for afterwards: the pages of
    the table may be freed later without another flush.  Decision spte_replace.
    """
    sp, index = sptep
    level = sp.role.level
    old_spte = spte_of(cpu, sptep)
    was_rmapped = replaced = flush = False
    if is_shadow_present_pte(old_spte):
        if prefetch and is_last_spte(old_spte, level) and spte_to_child_pt(old_spte) == pfn.pfn:
            return RET_PF_SPURIOUS
        if level > PG_LEVEL_4K and not is_large_pte(old_spte):
            drop_parent_pte(cpu, kvm, spte_to_child_sp(kvm, old_spte), sptep)
            replaced = True
        elif spte_to_child_pt(old_spte) != pfn.pfn:
            drop_spte(cpu, kvm, sptep)
            replaced = True
        else:
            was_rmapped = True
    if slot is None:
        cpu.stat(kvm.id, lib.STAT_PF_MMIO_SPTE_CREATED, not tdp_enabled(kvm))
        mark_mmio_spte(cpu, kvm, sptep, gfn)
        if replaced and not elides_spte_replace(cpu, kvm, gfn):
            kvm_flush_remote_tlbs_range(
                cpu, kvm, gfn, kvm_pages_per_hpage(level), lib.REASON_REMOTE_REPLACE
            )
        return RET_PF_EMULATE
    spte, wrprot = make_shadow_spte(cpu, kvm, sp, slot, access, gfn, pfn, old_spte, prefetch=prefetch)
    r = RET_PF_FIXED
    if spte_of(cpu, sptep) == spte:
        r = RET_PF_SPURIOUS
    else:
        flush |= mmu_spte_update(cpu, kvm, sptep, gfn, spte)
    if wrprot and write_fault:
        r = RET_PF_WRITE_PROTECTED
    if flush or (replaced and not elides_spte_replace(cpu, kvm, gfn)):
        kvm_flush_remote_tlbs_range(cpu, kvm, gfn, kvm_pages_per_hpage(level), lib.REASON_REMOTE_REPLACE)
    if not was_rmapped:
        rmap_add(cpu, kvm, slot, sptep, gfn, access)
    elif not sp.role.direct:
        sp.shadowed_access[index] = access
    return r


def elides_spte_replace(cpu: Cpu, kvm: Kvm, gfn: Gfn) -> bool:
    """Return whether the policy elides the flush for what the leaf has replaced.  Decision spte_replace."""
    if kvm.policy.spte_replace(cpu, kvm, gfn) == "flush":
        return False
    flush_elided(cpu, kvm, lib.REASON_REMOTE_REPLACE, gfn)
    return True


def gfn_to_memslot_dirty_bitmap(
    cpu: Cpu, kvm: Kvm, gfn: Gfn, as_id: int, *, no_dirty_log: bool
) -> KvmMemorySlot | None:
    """gfn_to_memslot_dirty_bitmap(cpu, ): return the slot if a page of it may be mapped before it is used.

    A page that is mapped writable is marked dirty, so no page of a logged slot may be.
    """
    slot = gfn_to_memslot(cpu, kvm, gfn, as_id)
    if slot is None or slot.invalid or (no_dirty_log and slot.dirty_track_enabled()):
        return None
    return slot


def kvm_prefetch_pages(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, nr_pages: int
) -> list[PfnAndRights]:
    """kvm_prefetch_pages(): return the frames of the first of these pages, up to one that the host does not
    have, or does not permit to be written.  It neither waits nor allocates (get_user_pages_fast_only(),
    mm/gup.c)."""
    if slot.end_gfn - gfn < nr_pages:
        return []
    cpu.point("mm", (kvm.id, gfn), "read")
    cpu.check(
        lib.mm_fault_range(
            cpu.m, cpu.id, kvm.id, slot.gfn_to_hva(gfn), nr_pages, False, cpu.hfns, cpu.tags, cpu.writable
        )
    )
    found = []
    for i in range(nr_pages):
        if cpu.hfns[i] == NO_FRAME or not cpu.writable[i]:
            break
        custody = Custody(cpu.tags[i])
        found.append(PfnAndRights(Hfn(cpu.hfns[i]), custody, host_writable=HostWritable(True)))
    return found


def kvm_mmu_prefetch_sptes(cpu: Cpu, vcpu: Vcpu, gfn: Gfn, sptep: Sptep, nr_pages: int, access: int) -> bool:
    """kvm_mmu_prefetch_sptes(): map pages that the guest has not asked for; return False if none could be."""
    kvm, as_id = vcpu.kvm, int(vcpu.arch.smm)
    slot = gfn_to_memslot_dirty_bitmap(cpu, kvm, gfn, as_id, no_dirty_log=bool(access & ACC_WRITE_MASK))
    if slot is None:
        return False
    found = kvm_prefetch_pages(cpu, kvm, slot, gfn, nr_pages)
    for i, pfn in enumerate(found):
        at = Sptep(sptep.sp, sptep.idx + i)
        mmu_set_spte(cpu, kvm, slot, at, access, gfn + i, pfn, prefetch=True)
        cpu.stat(kvm.id, lib.STAT_MMU_PREFETCHED)
    return bool(found)


def prefetch_window(cpu: Cpu, vcpu: Vcpu, sptep: Sptep) -> Sequence[SpteIndex]:
    """Return the indices of the group that the SPTE is in, for a fault that may map the others of it.

    None while addresses are being invalidated: the host's own tables may still have their pages.
    """
    num = vcpu.kvm.params.prefetch
    if not num or sptep.sp.role.level > PG_LEVEL_4K:
        return ()
    cpu.point("mmu_invalidate_seq", vcpu.kvm.id, "read")
    if lib.mmu_invalidate_in_progress(cpu.m, vcpu.kvm.id):
        return ()
    first = sptep.idx & -num
    return span(first, first + num)


def direct_pte_prefetch(cpu: Cpu, vcpu: Vcpu, sptep: Sptep) -> None:
    """direct_pte_prefetch(), __direct_pte_prefetch(): map the runs of entries that are not present."""
    sp, start = sptep.sp, None
    window = prefetch_window(cpu, vcpu, sptep)
    for index in window:
        mapped = index == sptep.idx or is_shadow_present_pte(spte_of(cpu, Sptep(sp, index)))
        if start is None:
            start = None if mapped else index
        elif mapped:
            if not direct_pte_prefetch_many(cpu, vcpu, sp, start, index):
                return
            start = None
    if start is not None:
        direct_pte_prefetch_many(cpu, vcpu, sp, start, window[-1] + 1)


def direct_pte_prefetch_many(cpu: Cpu, vcpu: Vcpu, sp: ShadowPage, start: SpteIndex, end: SpteIndex) -> bool:
    """direct_pte_prefetch_many()"""
    gfn = kvm_mmu_page_get_gfn(cpu, sp, start)
    return kvm_mmu_prefetch_sptes(cpu, vcpu, gfn, Sptep(sp, start), end - start, sp.role.access)


def shadow_walk(cpu: Cpu, vcpu: Vcpu, addr: int) -> Iterator[Sptep]:
    """for_each_shadow_entry(): yield the SPTEs for an address, from the root down; read again after each."""
    sp = shadow_walk_root(vcpu, addr)
    while sp is not None:
        shift = 12 + SPTE_LEVEL_BITS * (sp.role.level - 1)
        sptep = Sptep(sp, SpteIndex(addr >> shift & SPTE_ENT_PER_PAGE - 1))
        yield sptep
        spte = spte_of(cpu, sptep)
        if not is_shadow_present_pte(spte) or is_last_spte(spte, sp.role.level):
            return
        sp = spte_to_child_sp(vcpu.kvm, spte)


def direct_map(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault) -> int:
    """direct_map(): map a gfn for a guest without paging, by direct pages.  Raises OutOfFrames."""
    kvm, slot = vcpu.kvm, fault.slot
    kvm_mmu_hugepage_adjust(cpu, kvm, fault)
    access = vcpu.mmu.root_role.access
    for sptep in shadow_walk(cpu, vcpu, fault.addr):
        level = sptep.sp.role.level
        base_gfn = fault.gfn & -kvm_pages_per_hpage(level)
        if level == fault.goal_level:
            r = mmu_set_spte(
                cpu, kvm, slot, sptep, access, base_gfn, fault.pfn, prefetch=False, write_fault=fault.write
            )
            if r != RET_PF_SPURIOUS:
                direct_pte_prefetch(cpu, vcpu, sptep)
            return r
        sp = kvm_mmu_get_child_sp(cpu, vcpu, sptep, base_gfn, direct=True, access=access)
        if sp is not None:
            link_shadow_page(cpu, kvm, sptep, sp)
    raise AssertionError(f"no SPTE of level {fault.goal_level} for {fault.addr:#x}")


def nonpaging_page_fault(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault) -> int:
    """nonpaging_page_fault(), direct_page_fault(): the linear address is a guest-physical one."""
    if page_fault_handle_page_track(cpu, vcpu.kvm, fault):
        return RET_PF_WRITE_PROTECTED
    r = fast_page_fault(cpu, vcpu, fault)
    if r != RET_PF_INVALID:
        return r
    r = kvm_mmu_faultin_pfn(cpu, vcpu, fault)
    if r != RET_PF_CONTINUE:
        return r
    with vcpu.kvm.mmu_lock.write_lock(cpu):
        if not make_mmu_pages_available(cpu, vcpu.kvm):
            return ENOMEM
        if is_page_fault_stale(cpu, vcpu, fault):
            return RET_PF_RETRY
        try:
            return direct_map(cpu, vcpu, fault)
        except OutOfFrames:
            return ENOMEM
