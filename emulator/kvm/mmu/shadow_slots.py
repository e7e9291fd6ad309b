"""arch/x86/kvm/mmu/mmu.c: what the shadow MMU does for whole slots and ranges, through rmaps.

mmu.py calls these before the TDP MMU's.  Under mmu_lock held for write.
"""

from __future__ import annotations

from emulator.kvm.bitops import for_each_set_bit
from emulator.kvm.kvm_host import KVM_MAX_HUGEPAGE_LEVEL, KVM_MAX_NR_ADDRESS_SPACES, PG_LEVEL_4K
from emulator.kvm.mmu.hugepage import kvm_mmu_max_mapping_level
from emulator.kvm.mmu.rmap import (
    RmapHead,
    gfn_to_rmap,
    kvm_rmap_zap_gfn_range,
    rmap_write_protect,
    walk_slot_rmaps,
)
from emulator.kvm.mmu.shadow import (
    InvalidList,
    for_each_gfn_valid_sp_with_gptes,
    kvm_mmu_prepare_zap_page,
    kvm_mmu_remote_flush_or_zap,
)
from emulator.kvm.mmu.shadow_spte import mmu_spte_clear_track_bits
from emulator.kvm.structs import Kvm, KvmMemorySlot, kvm_memslots_have_rmaps
from emulator.kvm.virt.requests import kvm_flush_remote_tlbs_memslot
from emulator.kvm.virt.slots import kvm_memslots
from emulator.machine.runtime import Cpu
from native import lib
from native.types import FlushReason, Gfn, Level


def shadow_zap_gfn_range(cpu: Cpu, kvm: Kvm, start: Gfn, end: Gfn, reason: FlushReason) -> bool:
    """kvm_rmap_zap_gfn_range(): zap a range in the slots of both address spaces; return whether to flush."""
    flush = False
    if not kvm_memslots_have_rmaps(kvm):
        return flush
    for as_id in range(KVM_MAX_NR_ADDRESS_SPACES):
        for slot in kvm_memslots(cpu, kvm, as_id).slots:
            first, last = max(start, slot.base_gfn), min(end, slot.end_gfn)
            if first < last:
                flush = kvm_rmap_zap_gfn_range(cpu, kvm, slot, first, last, reason, flush=flush)
    return flush


def slot_rmap_write_protect(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, level: Level) -> None:
    """Take W from all leafs of the slot, from `level` on, for dirty logging; the caller flushes in any case.
    """

    def protect(cpu: Cpu, kvm: Kvm, rmap_head: RmapHead) -> bool:
        return rmap_write_protect(cpu, kvm, rmap_head, pt_protect=False)

    walk_slot_rmaps(
        cpu, kvm, slot, protect, slot.base_gfn, slot.end_gfn, min_level=level, flush_on_yield=False
    )


def rmap_write_protect_masked(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, mask: int) -> None:
    """Take W from the 4K leafs of the gfns in mask: the shadow MMU's part of
    kvm_mmu_write_protect_pt_masked()."""
    for bit in for_each_set_bit(mask):
        rmap_write_protect(cpu, kvm, gfn_to_rmap(slot, gfn + bit, PG_LEVEL_4K), pt_protect=False)


def kvm_rmap_zap_collapsible_sptes(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> None:
    """kvm_rmap_zap_collapsible_sptes(): zap small leafs where the host has a huge page, and flush.

    Leafs of direct pages only: a page that shadows a guest's table of 4K pages cannot map larger ones.
    """

    def zap(cpu: Cpu, kvm: Kvm, rmap_head: RmapHead) -> bool:
        flush = False
        for sptep in tuple(rmap_head):
            sp = sptep.sp
            if (
                sp.role.direct
                and slot.base_gfn <= sp.gfn < slot.end_gfn
                and sp.role.level < kvm_mmu_max_mapping_level(cpu, kvm, slot, sp.gfn)
            ):
                mmu_spte_clear_track_bits(cpu, kvm, sptep)
                rmap_head.remove(sptep)
                flush = True
        return flush

    start, end = slot.base_gfn, slot.end_gfn
    if walk_slot_rmaps(cpu, kvm, slot, zap, start, end, max_level=KVM_MAX_HUGEPAGE_LEVEL - 1):
        kvm_flush_remote_tlbs_memslot(cpu, kvm, slot, lib.REASON_REMOTE_ZAP)


def kvm_mmu_zap_memslot_pages_and_flush(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, flush: bool) -> None:
    """kvm_mmu_zap_memslot_pages_and_flush(): zap the pages that shadow tables in the slot, and make the
    pending
    flush; their accounts are in the slot, which is about to go."""
    invalid_list: InvalidList = []
    for gfn in sorted(gfn for gfn in kvm.shadow.mmu_page_hash if slot.base_gfn <= gfn < slot.end_gfn):
        for sp in for_each_gfn_valid_sp_with_gptes(kvm, gfn):
            kvm_mmu_prepare_zap_page(cpu, kvm, sp, invalid_list)
        if kvm.mmu_lock.needbreak(cpu):
            kvm_mmu_remote_flush_or_zap(cpu, kvm, invalid_list, flush)
            flush = False
            kvm.mmu_lock.cond_resched(cpu, None)
    kvm_mmu_remote_flush_or_zap(cpu, kvm, invalid_list, flush)
