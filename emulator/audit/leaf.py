"""The invariants of a leaf SPTE of either MMU.

* its gfn is in a memslot
* it is writable only if MMU-writable, and MMU-writable only if the host permitted writes when it was made
  (check_spte_writable_invariants())
* it maps the frames that the host has for its pages now, by a lookup that no invalidation has overtaken
* it is writable only if the host permits writes now: an mmu_notifier has zapped it otherwise
* a page that the guest may write to is marked in the dirty log of a memslot that is logged
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from emulator.kvm.kvm_host import PG_LEVEL_4K, SPTE_ENT_PER_PAGE, kvm_pages_per_hpage
from emulator.kvm.mmu.spte import (
    SHADOW_HOST_WRITABLE_MASK,
    is_mmu_writable_spte,
    is_writable_pte,
    spte_to_child_pt,
)
from emulator.kvm.structs import Kvm, KvmMemorySlot
from emulator.machine.runtime import Machine
from native import ffi, lib
from native.types import NO_FRAME, Gfn, Hva, Level

_CUSTODY_SHIFT: Final[int] = lib.SPTE_CUSTODY_SHIFT
_CUSTODY_MASK: Final[int] = lib.FRAME_TAG_MASK


class LeafAudit:
    """An audit of one VM's leafs.  live: as in audited()."""

    def __init__(self, machine: Machine, kvm: Kvm, *, live: bool) -> None:
        self._m = machine.m
        self._cpu = machine.cpus[machine.pcpus]
        self._kvm = kvm
        self._live = live
        self._hfns = ffi.new("uint32_t[]", SPTE_ENT_PER_PAGE)
        self._tags = ffi.new("uint32_t[]", SPTE_ENT_PER_PAGE)
        self._writable = ffi.new("uint32_t[]", SPTE_ENT_PER_PAGE)

    def findings(
        self, where: str, spte: int, level: Level, gfn: Gfn, slot: KvmMemorySlot | None
    ) -> Iterator[str]:
        """Yield a sentence about each invariant that the leaf breaks.

        where: the entry and its table, as the subject of the sentence.  gfn: the first that the leaf maps.
        slot: the memslot of gfn in the leaf's address space.
        """
        if slot is None:
            yield f"{where} maps gfn {gfn:#x}, which is in no memslot"
            return
        writable, mmu_writable = is_writable_pte(spte), is_mmu_writable_spte(spte)
        if writable and not mmu_writable:
            yield f"{where} is writable, and not MMU-writable"
        if mmu_writable and not spte & SHADOW_HOST_WRITABLE_MASK:
            yield f"{where} is MMU-writable, and not host-writable"
        yield from self._of_the_host(where, spte, level, gfn, slot)
        if writable and not self._live and slot.dirty_bitmap is not None:
            first = gfn - slot.base_gfn
            if not all(slot.dirty_bitmap[first : first + kvm_pages_per_hpage(level)]):
                yield f"{where} lets the guest write to gfn {gfn:#x}, which is not marked in the dirty log"

    def _of_the_host(
        self, where: str, spte: int, level: Level, gfn: Gfn, slot: KvmMemorySlot
    ) -> Iterator[str]:
        pages = kvm_pages_per_hpage(level)
        if pages > SPTE_ENT_PER_PAGE or gfn < slot.base_gfn or gfn + pages > slot.end_gfn:
            yield f"{where} maps {pages} pages from gfn {gfn:#x} on, which are not all in memslot {slot.id}"
            return
        self._look_up(slot.gfn_to_hva(gfn), pages)
        for i in range(pages):
            has, maps = self._hfns[i], spte_to_child_pt(spte) + i
            if has == NO_FRAME:
                yield f"{where} maps gfn {gfn + i:#x}, and the host has no page there"
                return
            if has != maps:
                yield f"{where} maps gfn {gfn + i:#x} to frame {maps:#x}, and the host has frame {has:#x}"
                return
            if is_writable_pte(spte) and not self._writable[i]:
                yield f"{where} lets the guest write to gfn {gfn + i:#x}, which the host has read-only"
                return
        if level == PG_LEVEL_4K and spte >> _CUSTODY_SHIFT & _CUSTODY_MASK != self._tags[0]:
            yield f"{where} maps gfn {gfn:#x} by a lookup that an invalidation has overtaken"

    def _look_up(self, hva: Hva, pages: int) -> None:
        """Read the host's entries for some pages, without a fault."""
        cpu = self._cpu
        found = lib.mm_fault_range(
            self._m, cpu.id, self._kvm.id, hva, pages, False, self._hfns, self._tags, self._writable
        )
        cpu.check(found)
