"""arch/x86/kvm/mmu/mmu.c: the mmu_spte_ functions, which change one SPTE of the shadow MMU.

Its SPTEs have the bits of the TDP MMU's where both have them, so the predicates of spte.py hold for both.
In its tables any entry may map any gfn, which the core keeps beside the entry (sp->shadowed_translation).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from emulator.kvm.accounting import flush_elided
from emulator.kvm.kvm_host import SPTE_ENT_PER_PAGE, SPTE_LEVEL_BITS
from emulator.kvm.mmu.shadow_structs import ShadowPage, Sptep
from emulator.kvm.mmu.spte import (
    PT_WRITABLE_MASK,
    SHADOW_HOST_WRITABLE_MASK,
    SHADOW_MMU_WRITABLE_MASK,
    PfnAndRights,
    is_access_track_spte,
    is_mmu_writable_spte,
    is_shadow_present_pte,
    leaf_spte_change_needs_tlb_flush,
    mark_spte_for_access_track,
    spte_to_child_pt,
)
from emulator.kvm.structs import Kvm, tdp_enabled
from emulator.machine.runtime import Cpu, MachineMisuse
from native import ffi, lib
from native.types import NO_GFN, Custody, Gfn, Hfn, HostWritable, Level, SpteIndex

PT_ACCESSED_MASK: Final[int] = lib.SPTE_ACCESSED
PT_DIRTY_MASK: Final[int] = lib.SPTE_DIRTY
SHADOW_NONPRESENT_VALUE: Final = 0
_CUSTODY_SHIFT: Final[int] = lib.SPTE_CUSTODY_SHIFT
_CUSTODY_MASK: Final = 0x7FFF
_ALL_ONES: Final = (1 << 64) - 1


def kvm_mmu_page_get_gfn(cpu: Cpu, sp: ShadowPage, index: SpteIndex) -> Gfn:
    """kvm_mmu_page_get_gfn(): return the first gfn that the leaf at `index` maps, or mapped last."""
    if sp.role.direct:
        return sp.gfn + (index << SPTE_LEVEL_BITS * (sp.role.level - 1))
    return lib.kvm_mmu_page_get_gfn(cpu.m, sp.hfn, index)


def spte_of(cpu: Cpu, sptep: Sptep) -> int:
    """Return the SPTE that the pointer points to."""
    return int(lib.spte_read(cpu.m, sptep.sp.hfn, sptep.idx))


def sptes_in_use(cpu: Cpu, sp: ShadowPage) -> Iterator[Sptep]:
    """Yield the SPTEs of a page that are not 0, by rising index; each is read when its turn comes."""
    index = lib.spte_next(cpu.m, sp.hfn, SpteIndex(0))
    while index < SPTE_ENT_PER_PAGE:
        yield Sptep(sp, index)
        index = lib.spte_next(cpu.m, sp.hfn, index + 1)


def is_mmio_spte(spte: int) -> bool:
    """is_mmio_spte(): return whether the SPTE says that the gfn is in no memslot (mmio.py)."""
    return bool(spte >> lib.SPTE_MMIO_BIT & 1) and not is_shadow_present_pte(spte)


def spte_ad_enabled(kvm: Kvm, sp: ShadowPage) -> bool:
    """spte_ad_enabled(): return whether the CPU sets accessed and dirty flags in the page's SPTEs.

    Ordinary page tables always have them.  EPT has them if the host's CPUs support them and L1 has enabled
    them in its EPTP.
    """
    return not tdp_enabled(kvm) or (kvm.params.eptad and not sp.role.ad_disabled)


def is_accessed_spte(spte: int, *, ad_enabled: bool) -> bool:
    """is_accessed_spte()"""
    return bool(spte & PT_ACCESSED_MASK) if ad_enabled else not is_access_track_spte(spte)


def aged_spte(spte: int, *, ad_enabled: bool) -> int:
    """Return the SPTE aged: without its accessed bit, or access-tracked if the page has no A/D bits."""
    return spte & ~PT_ACCESSED_MASK if ad_enabled else mark_spte_for_access_track(spte)


def spte_rights(spte: int) -> PfnAndRights:
    """Return the frame of a leaf, with the custody and the host's permission under which it was installed."""
    custody = Custody((spte >> _CUSTODY_SHIFT) & _CUSTODY_MASK)
    host_writable = HostWritable(bool(spte & SHADOW_HOST_WRITABLE_MASK))
    return PfnAndRights(spte_to_child_pt(spte), custody, host_writable)


def _store(cpu: Cpu, kvm: Kvm, sptep: Sptep, gfn: Gfn, new_spte: int) -> int:
    sp, index = sptep
    cpu.point("spte", (sp.hfn, index), "write")
    old = lib.shadow_mmu_set_spte(cpu.m, cpu.id, kvm.id, sp.hfn, index, sp.role.level, gfn, new_spte)
    if old == _ALL_ONES:
        raise MachineMisuse(f"CPU {cpu.id}: {ffi.string(lib.machine_error_text(cpu.m, cpu.id)).decode()}")
    return int(old)


def mmu_spte_set(cpu: Cpu, kvm: Kvm, sptep: Sptep, gfn: Gfn, new_spte: int) -> None:
    """mmu_spte_set(): set an SPTE that is not present.  gfn: the first that a leaf maps."""
    assert not is_shadow_present_pte(spte_of(cpu, sptep))
    _store(cpu, kvm, sptep, gfn, new_spte)


def mmu_spte_update(cpu: Cpu, kvm: Kvm, sptep: Sptep, gfn: Gfn, new_spte: int) -> bool:
    """mmu_spte_update(): change the bits of a leaf, not its frame; return whether a flush is needed.

    Decision spte_update.
    """
    if not is_shadow_present_pte(spte_of(cpu, sptep)):
        mmu_spte_set(cpu, kvm, sptep, gfn, new_spte)
        return False
    old_spte = _store(cpu, kvm, sptep, gfn, new_spte)
    assert spte_to_child_pt(old_spte) == spte_to_child_pt(new_spte)
    if kvm.policy.spte_update(cpu, kvm, gfn) == "accessed-dirty":
        return loses_accessed_or_dirty(old_spte, new_spte)
    return leaf_spte_change_needs_tlb_flush(old_spte, new_spte)


def loses_accessed_or_dirty(old_spte: int, new_spte: int) -> bool:
    """Return whether mmu_spte_update() flushed before 6.13: for A, for D, and for W if MMU-writable."""
    lost = old_spte & ~new_spte
    return bool(lost & (PT_ACCESSED_MASK | PT_DIRTY_MASK)) or (
        is_mmu_writable_spte(old_spte) and not new_spte & PT_WRITABLE_MASK
    )


def mmu_spte_clear_track_bits(cpu: Cpu, kvm: Kvm, sptep: Sptep) -> int:
    """mmu_spte_clear_track_bits(): clear a leaf; return the SPTE that was there."""
    gfn = kvm_mmu_page_get_gfn(cpu, sptep.sp, sptep.idx)
    return _store(cpu, kvm, sptep, gfn, SHADOW_NONPRESENT_VALUE)


def mmu_spte_clear_no_track(cpu: Cpu, kvm: Kvm, sptep: Sptep) -> None:
    """mmu_spte_clear_no_track(): clear an SPTE that is no leaf."""
    _store(cpu, kvm, sptep, NO_GFN, SHADOW_NONPRESENT_VALUE)


def mmu_spte_cmpxchg(
    cpu: Cpu, kvm: Kvm, table: Hfn, index: SpteIndex, level: Level, old_spte: int, new_spte: int
) -> bool:
    """Compare and swap a leaf without mmu_lock, as try_cmpxchg64() does (include/linux/atomic.h); return
    False if the SPTE has changed."""
    cpu.point("spte", (table, index), "write")
    rc = lib.shadow_mmu_set_spte_atomic(cpu.m, cpu.id, kvm.id, table, index, level, old_spte, new_spte)
    return rc != lib.MACHINE_AGAIN and not cpu.check(rc)


def mmu_spte_age(cpu: Cpu, kvm: Kvm, sptep: Sptep) -> bool:
    """Take the accessed bit without mmu_lock; return whether it was set.

    An SPTE that another CPU changes meanwhile keeps its bit: it is being zapped, or in use.
    """
    sp, index = sptep
    spte, ad = spte_of(cpu, sptep), spte_ad_enabled(kvm, sp)
    if not is_shadow_present_pte(spte) or not is_accessed_spte(spte, ad_enabled=ad):
        return False
    new_spte = aged_spte(spte, ad_enabled=ad)
    mmu_spte_cmpxchg(cpu, kvm, sp.hfn, index, sp.role.level, spte, new_spte)
    return True


def spte_write_protect(cpu: Cpu, kvm: Kvm, sptep: Sptep, *, pt_protect: bool) -> bool:
    """spte_write_protect(): take W; return whether a flush is needed.

    pt_protect: a guest's table is protected, so MMU-writable goes as well, also where W was clear: a TLB may
    still hold a writable translation from before W was cleared (f81602958c11).
    """
    spte = spte_of(cpu, sptep)
    if not spte & PT_WRITABLE_MASK and not (pt_protect and spte & SHADOW_MMU_WRITABLE_MASK):
        return False
    taken = PT_WRITABLE_MASK | (SHADOW_MMU_WRITABLE_MASK if pt_protect else 0)
    gfn = kvm_mmu_page_get_gfn(cpu, sptep.sp, sptep.idx)
    flush = mmu_spte_update(cpu, kvm, sptep, gfn, spte & ~taken)
    return flush and not (pt_protect and elides_table_protect(cpu, kvm, gfn, spte))


def elides_table_protect(cpu: Cpu, kvm: Kvm, gfn: Gfn, old_spte: int) -> bool:
    """Return whether the policy elides the flush for a table's SPTE.  Decision table_protect."""
    answer = kvm.policy.table_protect(cpu, kvm, gfn)
    if answer == "mmu-writable" or (answer == "if-changed" and old_spte & PT_WRITABLE_MASK):
        return False
    flush_elided(cpu, kvm, lib.REASON_REMOTE_PROTECT, gfn)
    return True
