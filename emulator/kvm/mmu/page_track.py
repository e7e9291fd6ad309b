"""arch/x86/kvm/mmu/page_track.c, and the accounts of shadowed gfns of mmu.c.

A gfn with a guest's table of level 2 or more is write-tracked: no SPTE may make it writable, and each store
of the guest to it exits and is emulated (kvm_mmu_track_write).  A table of level 1 may become unsync instead.
The functions need mmu_lock held for write, unless their docstrings say otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

from emulator.kvm.kvm_host import KVM_MAX_HUGEPAGE_LEVEL, PG_LEVEL_2M, PG_LEVEL_4K, kvm_pages_per_hpage
from emulator.kvm.mmu.rmap import gfn_to_rmap, gfn_to_slot_of_role, rmap_write_protect
from emulator.kvm.mmu.shadow_structs import ShadowPage
from emulator.kvm.mmu.tdp_dirty import kvm_tdp_mmu_write_protect_gfn
from emulator.kvm.structs import (
    Kvm,
    KvmMemorySlot,
    kvm_memslots_have_rmaps,
    tdp_enabled,
    tdp_mmu_enabled,
)
from emulator.kvm.virt.requests import kvm_flush_remote_tlbs
from emulator.kvm.virt.slots import gfn_to_memslot
from emulator.machine.runtime import Cpu, smp_mb
from native import lib
from native.types import Gfn, Level, span


def slots_of_gfn(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn) -> Iterator[KvmMemorySlot]:
    """Yield `slot`, and the slot of the other address space that gfn is in, if any.

    A table is counted in the slot of its shadow page's role only, but the guest can store to it in SMM and
    outside of SMM.
    """
    yield slot
    other = gfn_to_memslot(cpu, kvm, gfn, slot.as_id ^ 1)
    if other is not None:
        yield other


def kvm_page_track_write_tracking_enabled(kvm: Kvm) -> bool:
    """kvm_page_track_write_tracking_enabled(): return whether a guest's table may be write-protected."""
    return kvm.shadow.shadow_root_allocated or not tdp_enabled(kvm)


def kvm_gfn_is_write_tracked(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot | None, gfn: Gfn) -> bool:
    """kvm_gfn_is_write_tracked().  Faults also ask it before they take mmu_lock."""
    if slot is None or not kvm_page_track_write_tracking_enabled(kvm):
        return False
    cpu.point("write_track", (kvm.id, gfn), "read")
    return any(one.arch.gfn_write_track.get(gfn, 0) for one in slots_of_gfn(cpu, kvm, slot, gfn))


def kvm_gfn_is_lpage_allowed(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, level: Level) -> bool:
    """kvm_gfn_is_lpage_allowed()"""
    key = (level, gfn & -kvm_pages_per_hpage(level))
    return not any(one.arch.disallow_lpage.get(key, 0) for one in slots_of_gfn(cpu, kvm, slot, gfn))


def _update_gfn_disallow_lpage_count(slot: KvmMemorySlot, gfn: Gfn, count: int) -> None:
    counts = slot.arch.disallow_lpage
    for level in span(PG_LEVEL_2M, KVM_MAX_HUGEPAGE_LEVEL + 1):
        key = (level, gfn & -kvm_pages_per_hpage(level))
        counts[key] = counts.get(key, 0) + count
        if not counts[key]:
            del counts[key]


def kvm_mmu_gfn_disallow_lpage(slot: KvmMemorySlot, gfn: Gfn) -> None:
    """kvm_mmu_gfn_disallow_lpage()"""
    _update_gfn_disallow_lpage_count(slot, gfn, 1)


def kvm_mmu_gfn_allow_lpage(slot: KvmMemorySlot, gfn: Gfn) -> None:
    """kvm_mmu_gfn_allow_lpage()"""
    _update_gfn_disallow_lpage_count(slot, gfn, -1)


def shadow_gfn_write_protect(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, min_level: Level) -> bool:
    """Take W and MMU-writable from the shadow MMU's leafs that map gfn; return whether a flush is needed."""
    protected = False
    for level in span(min_level, KVM_MAX_HUGEPAGE_LEVEL + 1):
        protected |= rmap_write_protect(cpu, kvm, gfn_to_rmap(slot, gfn, level), pt_protect=True)
    return protected


def kvm_mmu_slot_gfn_write_protect(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, min_level: Level
) -> bool:
    """kvm_mmu_slot_gfn_write_protect(), under mmu_lock for write: return whether some SPTE lost W."""
    protected = False
    if kvm_memslots_have_rmaps(kvm):
        protected = shadow_gfn_write_protect(cpu, kvm, slot, gfn, min_level)
    if tdp_mmu_enabled(kvm):
        protected |= kvm_tdp_mmu_write_protect_gfn(cpu, kvm, slot, gfn, min_level)
    return protected


def account_shadowed(cpu: Cpu, kvm: Kvm, sp: ShadowPage) -> None:
    """account_shadowed(): from here on the guest cannot change the table unseen.

    The barrier pairs with kvm_mmu_track_write(): either the store of an emulated write is seen when the
    guest's entry is read again (gpte_changed), or the emulator sees that a page is shadowed and takes
    mmu_lock.
    """
    cpu.point("indirect_shadow_pages", kvm.id, "write")
    kvm.shadow.indirect_shadow_pages += 1
    smp_mb(cpu)
    slot = gfn_to_slot_of_role(cpu, kvm, sp.gfn, sp.role)
    tracked = sp.role.level > PG_LEVEL_4K
    if tracked:
        cpu.point("write_track", (kvm.id, sp.gfn), "write")
        slot.arch.gfn_write_track[sp.gfn] = slot.arch.gfn_write_track.get(sp.gfn, 0) + 1
    kvm_mmu_gfn_disallow_lpage(slot, sp.gfn)
    if kvm_mmu_slot_gfn_write_protect(cpu, kvm, slot, sp.gfn, PG_LEVEL_4K):
        kvm_flush_remote_tlbs(cpu, kvm, lib.REASON_REMOTE_PROTECT)
    stores_exit(cpu, kvm, sp.gfn)


def stores_exit(cpu: Cpu, kvm: Kvm, gfn: Gfn) -> None:
    """Record KVM's promise to itself: from here on each store of the guest to the table in gfn exits."""
    cpu.check(lib.oracle_track_writes(cpu.m, cpu.id, kvm.id, gfn, True))


def stores_need_not_exit(cpu: Cpu, kvm: Kvm, gfn: Gfn) -> None:
    """Take the promise back, before an SPTE may become writable."""
    cpu.check(lib.oracle_track_writes(cpu.m, cpu.id, kvm.id, gfn, False))


def unaccount_shadowed(cpu: Cpu, kvm: Kvm, sp: ShadowPage) -> None:
    """unaccount_shadowed(): the page shadows the table no longer.  SPTEs gain W by faults only."""
    cpu.point("indirect_shadow_pages", kvm.id, "write")
    kvm.shadow.indirect_shadow_pages -= 1
    slot = gfn_to_slot_of_role(cpu, kvm, sp.gfn, sp.role)
    if sp.role.level > PG_LEVEL_4K:
        cpu.point("write_track", (kvm.id, sp.gfn), "write")
        left = slot.arch.gfn_write_track[sp.gfn] - 1
        if left:
            slot.arch.gfn_write_track[sp.gfn] = left
        else:
            del slot.arch.gfn_write_track[sp.gfn]
    kvm_mmu_gfn_allow_lpage(slot, sp.gfn)
    others = kvm.shadow.mmu_page_hash[sp.gfn]
    if not any(other is not sp and other.has_gptes() and not other.role.invalid for other in others):
        stores_need_not_exit(cpu, kvm, sp.gfn)
