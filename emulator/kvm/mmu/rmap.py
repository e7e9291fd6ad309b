"""arch/x86/kvm/mmu/mmu.c: rmaps, which find the SPTEs of the shadow MMU that map a gfn, and walks over them.

All but ageing need mmu_lock held for write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from emulator.kvm.kvm_host import KVM_MAX_HUGEPAGE_LEVEL, PG_LEVEL_4K, kvm_pages_per_hpage
from emulator.kvm.mmu.shadow_spte import (
    kvm_mmu_page_get_gfn,
    mmu_spte_age,
    mmu_spte_clear_track_bits,
    spte_write_protect,
)
from emulator.kvm.mmu.shadow_structs import Sptep
from emulator.kvm.mmu.spte import is_shadow_present_pte
from emulator.kvm.mmu.structs import KvmMmuPageRole
from emulator.kvm.structs import Kvm, KvmMemorySlot
from emulator.kvm.virt.requests import kvm_flush_remote_tlbs, kvm_flush_remote_tlbs_range
from emulator.kvm.virt.slots import gfn_to_memslot
from emulator.machine.runtime import Cpu
from native import lib
from native.types import FlushReason, Gfn, Level, span

RMAP_RECYCLE_THRESHOLD = 1000

RmapHead = list[Sptep]
# Handles the SPTEs of one gfn and level; returns whether a flush is needed.
SlotRmapsHandler = Callable[[Cpu, Kvm, RmapHead], bool]


def gfn_to_rmap(slot: KvmMemorySlot, gfn: Gfn, level: Level) -> RmapHead:
    """gfn_to_rmap(): return the list of SPTEs of that level that map the page which gfn is in."""
    return slot.arch.rmap.setdefault((level, gfn & -kvm_pages_per_hpage(level)), [])


def gfn_to_slot_of_role(cpu: Cpu, kvm: Kvm, gfn: Gfn, role: KvmMmuPageRole) -> KvmMemorySlot:
    """kvm_memslots_for_spte_role(), __gfn_to_memslot(): the role tells the address space, not a vCPU."""
    slot = gfn_to_memslot(cpu, kvm, gfn, role.smm)
    assert slot is not None, f"gfn {gfn:#x} is in use, but in no memslot"
    return slot


def rmap_add(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, sptep: Sptep, gfn: Gfn, access: int) -> None:
    """rmap_add(): note that the SPTE maps gfn; a list that has become very long is zapped and flushed."""
    sp = sptep.sp
    if not sp.role.direct:
        sp.shadowed_access[sptep.idx] = access
    rmap_head = gfn_to_rmap(slot, gfn, sp.role.level)
    rmap_head.append(sptep)
    if len(rmap_head) > RMAP_RECYCLE_THRESHOLD:
        kvm_zap_all_rmap_sptes(cpu, kvm, rmap_head)
        pages = kvm_pages_per_hpage(sp.role.level)
        kvm_flush_remote_tlbs_range(cpu, kvm, gfn, pages, lib.REASON_REMOTE_ZAP)


def drop_spte(cpu: Cpu, kvm: Kvm, sptep: Sptep) -> None:
    """drop_spte(): clear a leaf, and remove it from its rmap (rmap_remove()).  The caller flushes."""
    if is_shadow_present_pte(mmu_spte_clear_track_bits(cpu, kvm, sptep)):
        sp = sptep.sp
        gfn = kvm_mmu_page_get_gfn(cpu, sp, sptep.idx)
        gfn_to_rmap(gfn_to_slot_of_role(cpu, kvm, gfn, sp.role), gfn, sp.role.level).remove(sptep)


def for_each_rmap_spte(cpu: Cpu, kvm: Kvm, rmap_head: RmapHead) -> Iterator[Sptep]:
    """for_each_rmap_spte(): yield the SPTEs of the list.

    An SPTE of a page that has been freed is reported as a walk through freed memory, and left out.
    """
    for sptep in tuple(rmap_head):
        sp, index = sptep
        if kvm.shadow.page_of.get(sp.hfn) is sp:
            yield sptep
            continue
        gfn = kvm_mmu_page_get_gfn(cpu, sp, index)
        cpu.point("sptes", (sp.hfn, gfn), "read")
        lib.tdp_table_holds(cpu.m, cpu.id, kvm.id, sp.parent_spte, sp.role.level + 1, gfn)


def kvm_zap_all_rmap_sptes(cpu: Cpu, kvm: Kvm, rmap_head: RmapHead) -> bool:
    """kvm_zap_all_rmap_sptes(): clear all leafs of the list; return whether there was one."""
    zapped = bool(rmap_head)
    for sptep in for_each_rmap_spte(cpu, kvm, rmap_head):
        mmu_spte_clear_track_bits(cpu, kvm, sptep)
    rmap_head.clear()
    return zapped


def rmap_write_protect(cpu: Cpu, kvm: Kvm, rmap_head: RmapHead, *, pt_protect: bool) -> bool:
    """rmap_write_protect(): write-protect all SPTEs of the list; return whether a flush is needed."""
    flush = False
    for sptep in for_each_rmap_spte(cpu, kvm, rmap_head):
        flush |= spte_write_protect(cpu, kvm, sptep, pt_protect=pt_protect)
    return flush


def _heads(
    slot: KvmMemorySlot, levels: Sequence[Level], start: Gfn, end: Gfn
) -> Iterator[tuple[Gfn, RmapHead]]:
    """slot_rmap_walk_next(): yield the lists of the range that are not empty, level by level, by rising gfn.

    The keys are looked up anew at each level, because the walk may drop mmu_lock in between.
    """
    for level in levels:
        first = start & -kvm_pages_per_hpage(level)
        for gfn in sorted(gfn for at, gfn in slot.arch.rmap if at == level and first <= gfn < end):
            rmap_head = slot.arch.rmap.get((level, gfn))
            if rmap_head:
                yield gfn, rmap_head


def walk_slot_rmaps(
    cpu: Cpu,
    kvm: Kvm,
    slot: KvmMemorySlot,
    fn: SlotRmapsHandler,
    start: Gfn,
    end: Gfn,
    *,
    flush: bool = False,
    flush_on_yield: bool = True,
    reason: FlushReason = lib.REASON_REMOTE_ZAP,
    min_level: Level = PG_LEVEL_4K,
    max_level: Level = KVM_MAX_HUGEPAGE_LEVEL,
) -> bool:
    """__walk_slot_rmaps() over gfns [start, end): call `fn` for each list; return whether a flush is pending.

    flush: whether a flush is pending already.  flush_on_yield: make the pending flush before each drop of
    mmu_lock.
    """
    walked = 0
    for _, rmap_head in _heads(slot, span(min_level, max_level + 1), start, end):
        flush |= fn(cpu, kvm, rmap_head)
        walked += 1
        scheduled = 0 < kvm.params.resched_chunks * kvm.params.chunk <= walked
        if not scheduled and not kvm.mmu_lock.needbreak(cpu):
            continue
        if walk_slot_rmaps_yield(cpu, kvm, flush and flush_on_yield, reason):
            flush = False
        walked = 0
    return flush


def walk_slot_rmaps_yield(cpu: Cpu, kvm: Kvm, flush: bool, reason: FlushReason) -> bool:
    """Drop mmu_lock in the middle of walk_slot_rmaps(), after the pending flush; return whether there was
    one."""
    if flush:
        kvm_flush_remote_tlbs(cpu, kvm, reason)
    cpu.stat(kvm.id, lib.STAT_YIELDS)
    kvm.mmu_lock.cond_resched(cpu, None)
    return flush


def kvm_rmap_zap_gfn_range(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, start: Gfn, end: Gfn, reason: FlushReason, *, flush: bool = False
) -> bool:
    """__kvm_rmap_zap_gfn_range(): zap all shadow leafs of the range; return whether a flush is pending."""
    return walk_slot_rmaps(cpu, kvm, slot, kvm_zap_all_rmap_sptes, start, end, flush=flush, reason=reason)


def kvm_rmap_age_gfn_range(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, start: Gfn, end: Gfn) -> bool:
    """kvm_rmap_age_gfn_range(): take the accessed bits; return whether one was set."""
    young = False
    for _, rmap_head in _heads(slot, span(PG_LEVEL_4K, KVM_MAX_HUGEPAGE_LEVEL + 1), start, end):
        for sptep in for_each_rmap_spte(cpu, kvm, rmap_head):
            young |= mmu_spte_age(cpu, kvm, sptep)
    return young
