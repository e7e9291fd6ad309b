"""arch/x86/kvm/mmu/mmu.c: the guest's emulated stores to tables that shadow pages stand for."""

from __future__ import annotations

from collections.abc import Sequence

from emulator.kvm.kvm_host import PG_LEVEL_4K, SPTE_ENT_PER_PAGE
from emulator.kvm.mmu.shadow import (
    InvalidList,
    for_each_gfn_valid_sp_with_gptes,
    kvm_mmu_commit_zap_page,
    kvm_mmu_prepare_zap_page,
    kvm_mmu_remote_flush_or_zap,
    mmu_page_zap_pte,
)
from emulator.kvm.mmu.shadow_spte import spte_of
from emulator.kvm.mmu.shadow_structs import ShadowPage, Sptep
from emulator.kvm.mmu.spte import is_shadow_present_pte
from emulator.kvm.structs import Kvm
from emulator.machine.runtime import Cpu
from native import lib
from native.types import Gfn, SpteIndex, span

# Emulated writes to a table without a use in between, after which it is taken for no table any more.
_FLOODED = 3


def detect_write_flooding(cpu: Cpu, sp: ShadowPage) -> bool:
    """detect_write_flooding(): count the write; return whether the page is hardly a table any more.

    A page of level 1 is never flooded, because it becomes unsync instead.
    """
    if sp.role.level == PG_LEVEL_4K:
        return False
    cpu.point("write_flooding", sp.hfn, "write")
    sp.write_flooding_count += 1
    return sp.write_flooding_count >= _FLOODED


def detect_write_misaligned(sp: ShadowPage, offset: int, nbytes: int) -> bool:
    """detect_write_misaligned(): return whether the store is not to one entry of the table."""
    entry_bytes = gpte_bytes(sp)
    return nbytes < 4 or offset // entry_bytes != (offset + nbytes - 1) // entry_bytes


def gpte_bytes(sp: ShadowPage) -> int:
    """Return the size of an entry of the table that the page shadows."""
    return 4 if sp.role.has_4_byte_gpte else 8


def get_written_sptes(sp: ShadowPage, offset: int) -> Sequence[SpteIndex]:
    """get_written_sptes(): return the indices of the SPTEs that stand for the entry at this offset.

    A directory entry of 4 bytes maps 4 MiB, by two SPTEs.  Empty if another quadrant's page has them.
    """
    entry = offset // gpte_bytes(sp)
    if not sp.role.has_4_byte_gpte:
        return span(SpteIndex(entry), SpteIndex(entry + 1))
    sptes = 2 if sp.role.level > PG_LEVEL_4K else 1
    quadrant, first = divmod(entry * sptes, SPTE_ENT_PER_PAGE)
    if quadrant != sp.role.quadrant:
        return ()
    return span(SpteIndex(first), SpteIndex(first + sptes))


def kvm_mmu_track_write(cpu: Cpu, kvm: Kvm, gpa: int, nbytes: int) -> None:
    """kvm_mmu_track_write(): zap the SPTEs of an entry of a guest's table that the emulator has written.

    The caller has made the store, and then executed the barrier that pairs with account_shadowed().  A vCPU
    that finds no shadow page may therefore leave: a fault that shadows the table later reads the new entry.
    """
    cpu.point("indirect_shadow_pages", kvm.id, "read")
    if not kvm.shadow.indirect_shadow_pages:
        return
    with kvm.mmu_lock.write_lock(cpu):
        cpu.stat(kvm.id, lib.STAT_MMU_PTE_WRITE)
        invalid_list: InvalidList = []
        flush = False
        for sp in for_each_gfn_valid_sp_with_gptes(kvm, Gfn(gpa >> 12)):
            if detect_write_misaligned(sp, gpa & 0xFFF, nbytes) or detect_write_flooding(cpu, sp):
                cpu.stat(kvm.id, lib.STAT_MMU_FLOODED)
                kvm_mmu_prepare_zap_page(cpu, kvm, sp, invalid_list)
                continue
            for index in get_written_sptes(sp, gpa & 0xFFF):
                sptep = Sptep(sp, index)
                flush |= is_shadow_present_pte(spte_of(cpu, sptep))
                mmu_page_zap_pte(cpu, kvm, sptep, invalid_list)
        kvm_mmu_remote_flush_or_zap(cpu, kvm, invalid_list, flush)


def kvm_mmu_unprotect_gfn(cpu: Cpu, kvm: Kvm, gfn: Gfn) -> bool:
    """__kvm_mmu_unprotect_gfn_and_retry(): zap the pages that shadow gfn; return whether there was one."""
    invalid_list: InvalidList = []
    with kvm.mmu_lock.write_lock(cpu):
        for sp in for_each_gfn_valid_sp_with_gptes(kvm, gfn):
            kvm_mmu_prepare_zap_page(cpu, kvm, sp, invalid_list)
        zapped = bool(invalid_list)
        kvm_mmu_commit_zap_page(cpu, kvm, invalid_list)
    return zapped
