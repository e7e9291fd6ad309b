"""The shadow MMU's structures at the end of an execution, compared with each other and the guest's tables.

All threads have ended, and no emulated store is under way, so the structures agree, as they do whenever
mmu_lock is free.  arch/x86/kvm/mmu/mmu_audit.c looked for much of this before 5.18:

* each shadow page is in the hash once, and the VM counts its pages, and those that shadow a guest's table
* a link leads to a page one level below, which knows it as a parent, and no page has another parent
* a leaf is in the rmap of its gfn once, and nothing else is there
* a page that was taken out of use has no present entry
* the tables above an unsync table are marked, so that a sync finds it
* a gfn's counts of write tracking and of disallowed huge pages are the numbers of tables shadowed there
* no leaf lets the guest write to a table that is shadowed and in sync
* an SPTE of such a page grants no more than the guest's entry does now
* a page that the guest may write to is marked in the dirty log

A disagreement is the violation `inconsistent`: no guest may have been harmed yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from emulator.kvm.kvm_host import (
    KVM_MAX_HUGEPAGE_LEVEL,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    SPTE_ENT_PER_PAGE,
    SPTE_LEVEL_BITS,
    kvm_pages_per_hpage,
)
from emulator.kvm.mmu.guest_walk import PAGING32, PAGING64, PT_PAGE_SIZE_MASK, PagingFormat, ept_format
from emulator.kvm.mmu.shadow_spte import is_mmio_spte
from emulator.kvm.mmu.shadow_structs import ShadowPage, Sptep
from emulator.kvm.mmu.spte import (
    is_last_spte,
    is_mmu_writable_spte,
    is_obsolete_sp,
    is_shadow_present_pte,
    is_writable_pte,
    spte_to_child_pt,
)
from emulator.kvm.mmu.structs import ACC_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK
from emulator.kvm.structs import Kvm, KvmMemorySlot, kvm_memslots_have_rmaps, tdp_enabled
from emulator.machine.runtime import Machine
from native import ffi, lib
from native.types import Gfn, Level, SpteIndex, WordIndex, span

# The most findings of one execution that a report has.
_MOST = 3


def audited(machine: Machine, kvms: Iterable[Kvm]) -> str:
    """Return a sentence about each of the first disagreements; "" if there is none."""
    found: list[str] = []
    for kvm in kvms:
        if kvm_memslots_have_rmaps(kvm):
            for text in _ShadowAudit(machine, kvm).findings():
                found.append(f"VM {kvm.id}: {text}")
                if len(found) == _MOST:
                    return "; ".join(found)
    return "; ".join(found)


class _ShadowAudit:
    """An audit of one VM."""

    def __init__(self, machine: Machine, kvm: Kvm) -> None:
        self.machine = machine
        self.m = machine.m
        self.kvm = kvm
        self.pages = list(kvm.shadow.page_of.values())

    def findings(self) -> Iterator[str]:
        yield from self._hash_and_counts()
        mapped: Counter[tuple[int, Level, Gfn, Sptep]] = Counter()
        for sp in self.pages:
            yield from self._page(sp, mapped)
        yield from self._rmaps(mapped)
        yield from self._accounts()

    def _hash_and_counts(self) -> Iterator[str]:
        shadow = self.kvm.shadow
        hashed = Counter(sp for chain in shadow.mmu_page_hash.values() for sp in chain)
        if hashed != Counter(self.pages) or any(
            sp.gfn != gfn for gfn, chain in shadow.mmu_page_hash.items() for sp in chain
        ):
            yield f"of {len(self.pages)} shadow pages, {hashed.total()} are in the hash, or elsewhere in it"
        in_use = len(self.pages) - len(shadow.zapped_pages)
        if shadow.n_mmu_pages != in_use:
            yield f"n_mmu_pages is {shadow.n_mmu_pages}, and {in_use} shadow pages are in use"
        indirect = sum(not sp.role.invalid and sp.has_gptes() for sp in self.pages)
        if shadow.indirect_shadow_pages != indirect:
            counted = shadow.indirect_shadow_pages
            yield f"indirect_shadow_pages is {counted}, and {indirect} pages shadow a table"

    # --- one page ---------------------------------------------------------------------------------------

    def _page(self, sp: ShadowPage, mapped: Counter[tuple[int, Level, Gfn, Sptep]]) -> Iterator[str]:
        for parent in sp.parent_ptes:
            of = parent.sp
            spte = self._spte(parent)
            linked = is_shadow_present_pte(spte) and not is_last_spte(spte, of.role.level)
            if (
                self.kvm.shadow.page_of.get(of.hfn) is not of
                or not linked
                or spte_to_child_pt(spte) != sp.hfn
            ):
                yield f"{sp!r} has a parent that does not link it"
            elif (sp.unsync or sp.unsync_children) and not of.unsync_child_bitmap >> parent.idx & 1:
                yield f"a table below {of!r} is unsync, and entry {parent.idx} is not marked"
        index = lib.spte_next(self.m, sp.hfn, SpteIndex(0))
        while index < SPTE_ENT_PER_PAGE:
            sptep = Sptep(sp, index)
            spte = self._spte(sptep)
            if is_shadow_present_pte(spte):
                if sp.role.invalid:
                    yield f"{sp!r} was taken out of use, and entry {index} is present"
                elif is_last_spte(spte, sp.role.level):
                    yield from self._leaf(sptep, spte, mapped)
                else:
                    yield from self._link(sptep, spte)
            elif not is_mmio_spte(spte):
                yield f"entry {index} of {sp!r} is neither present nor MMIO nor empty: {spte:#x}"
            index = lib.spte_next(self.m, sp.hfn, index + 1)

    def _leaf(self, sptep: Sptep, spte: int, mapped: Counter[tuple[int, Level, Gfn, Sptep]]) -> Iterator[str]:
        sp, index = sptep
        level, gfn = sp.role.level, self._gfn(sptep)
        slot = self.kvm.memslots[sp.role.smm].search(gfn)
        if slot is None:
            yield f"entry {index} of {sp!r} maps gfn {gfn:#x}, which is in no memslot"
            return
        mapped[slot.as_id, level, gfn & -kvm_pages_per_hpage(level), sptep] += 1
        rights = ACC_WRITE_MASK | ACC_EXEC_MASK | ACC_USER_MASK
        more = spte & rights & ~sp.get_access(index)
        if more:
            yield f"entry {index} of {sp!r} has rights {more:#x} that its walk of the guest's tables had not"
        if (
            is_writable_pte(spte)
            and slot.dirty_bitmap is not None
            and not slot.dirty_bitmap[gfn - slot.base_gfn]
        ):
            yield f"gfn {gfn:#x} may be written to, and is not marked in the dirty log"
        gpte = self._gpte(sptep)
        if gpte is None:
            return
        fmt = self._format(sp)
        if not fmt.is_present_gpte(gpte):
            yield f"entry {index} of {sp!r} maps gfn {gfn:#x}, and the guest's entry is not present"
            return
        guests = fmt.gpte_to_gfn_lvl(gpte, level)
        if gfn != guests:
            yield f"entry {index} of {sp!r} maps gfn {gfn:#x}, and the guest's entry gfn {guests:#x}"
        allowed = fmt.protect_clean_gpte(sp.role.access & fmt.gpte_access(gpte), gpte)
        # A supervisor's write with CR0.WP clear ignores W.
        more = sp.get_access(index) & ~allowed & ~(0 if sp.role.cr0_wp else ACC_WRITE_MASK)
        if more:
            yield f"entry {index} of {sp!r} has rights {more:#x} that the guest's entry does not give"

    def _link(self, sptep: Sptep, spte: int) -> Iterator[str]:
        sp, index = sptep
        child = self.kvm.shadow.page_of.get(spte_to_child_pt(spte))
        if child is None:
            yield f"entry {index} of {sp!r} leads to a table that is no shadow page"
            return
        if child.parent_ptes.count(sptep) != 1 or child.role.level != sp.role.level - 1:
            yield f"entry {index} of {sp!r} leads to {child!r}, which is not its child"
        gpte = self._gpte(sptep)
        if gpte is None:
            return
        fmt = self._format(sp)
        level = sp.role.level
        huge = level <= fmt.max_huge_level and bool(gpte & PT_PAGE_SIZE_MASK)
        guests = fmt.gpte_to_gfn_lvl(gpte, level) if huge else fmt.gpte_to_gfn(gpte)
        if child.role.has_4_byte_gpte and huge:
            guests = child.gfn  # two SPTEs share a directory entry
        if not fmt.is_present_gpte(gpte) or child.gfn != guests:
            yield f"entry {index} of {sp!r} leads to {child!r}, and the guest's entry is {gpte:#x}"

    def _spte(self, sptep: Sptep) -> int:
        return int(lib.spte_read(self.m, sptep.sp.hfn, sptep.idx))

    def _gfn(self, sptep: Sptep) -> Gfn:
        """kvm_mmu_page_get_gfn()"""
        sp, index = sptep
        if sp.role.direct:
            return sp.gfn + (index << SPTE_LEVEL_BITS * (sp.role.level - 1))
        return Gfn(lib.kvm_mmu_page_get_gfn(self.m, sp.hfn, index))

    def _gpte(self, sptep: Sptep) -> int | None:
        """Return the guest's entry that an SPTE stands for; None: there is none, or the SPTE may differ."""
        sp, index = sptep
        slot = self.kvm.memslots[sp.role.smm].search(sp.gfn)
        if not sp.has_gptes() or sp.unsync or is_obsolete_sp(self.kvm, sp) or slot is None:
            return None
        fmt = self._format(sp)
        entry = sp.role.quadrant * SPTE_ENT_PER_PAGE + int(index)
        sptes = 2 if sp.role.has_4_byte_gpte and sp.role.level > PG_LEVEL_4K else 1
        word, shift = divmod(entry // sptes * fmt.entry_bytes, 8)
        value = ffi.new("uint64_t *")
        main = self.machine.cpus[self.machine.pcpus]
        if lib.mm_read_word(self.m, main.id, self.kvm.id, slot.gfn_to_hva(sp.gfn), WordIndex(word), value):
            return None
        return int(value[0]) >> 8 * shift & (1 << 8 * fmt.entry_bytes) - 1

    # --- the slots' accounts ----------------------------------------------------------------------------

    def _rmaps(self, mapped: Counter[tuple[int, Level, Gfn, Sptep]]) -> Iterator[str]:
        found = Counter(
            (slot.as_id, level, gfn, sptep)
            for slot in self._slots()
            for (level, gfn), rmap_head in slot.arch.rmap.items()
            for sptep in rmap_head
        )
        for (_, level, gfn, sptep), n in ((mapped - found) | (found - mapped)).items():
            where = f"entry {sptep.idx} of {sptep.sp!r}"
            yield f"the rmap of gfn {gfn:#x} at level {level} has {where} {n} times too often or too seldom"

    def _accounts(self) -> Iterator[str]:
        tracked: Counter[tuple[int, Gfn]] = Counter()
        disallowed: Counter[tuple[int, Level, Gfn]] = Counter()
        for sp in self.pages:
            if sp.role.invalid or not sp.has_gptes():
                continue
            as_id = sp.role.smm
            tracked[as_id, sp.gfn] += sp.role.level > PG_LEVEL_4K
            for level in span(PG_LEVEL_2M, KVM_MAX_HUGEPAGE_LEVEL + 1):
                disallowed[as_id, level, sp.gfn & -kvm_pages_per_hpage(level)] += 1
            if not sp.unsync and not is_obsolete_sp(self.kvm, sp):
                yield from self._writable(sp)
        counted: Counter[tuple[int, Gfn]] = Counter()
        lpages: Counter[tuple[int, Level, Gfn]] = Counter()
        for slot in self._slots():
            counted.update({(slot.as_id, gfn): n for gfn, n in slot.arch.gfn_write_track.items()})
            lpages.update({(slot.as_id, *key): n for key, n in slot.arch.disallow_lpage.items()})
        for (_, gfn), n in ((counted - tracked) | (tracked - counted)).items():
            yield f"gfn {gfn:#x} is write-tracked {n} times too often or too seldom"
        for (_, level, gfn), n in ((lpages - disallowed) | (disallowed - lpages)).items():
            yield f"gfn {gfn:#x} disallows pages of level {level} {n} times too often or too seldom"

    def _writable(self, sp: ShadowPage) -> Iterator[str]:
        """Look for leafs by which the guest may write to the table that `sp` shadows."""
        for slot in self._slots():
            if not slot.base_gfn <= sp.gfn < slot.end_gfn:
                continue
            for level in span(PG_LEVEL_4K, KVM_MAX_HUGEPAGE_LEVEL + 1):
                for sptep in slot.arch.rmap.get((level, sp.gfn & -kvm_pages_per_hpage(level)), ()):
                    spte = self._spte(sptep)
                    if is_writable_pte(spte) or is_mmu_writable_spte(spte):
                        yield f"{sp!r} is in sync, and {sptep.sp!r} lets the guest write to its table"
        cpu = self.machine.cpus[self.machine.pcpus]
        for root in self.kvm.tdp_mmu_roots:
            level = lib.tdp_mmu_get_walk(
                self.m, root.hfn, root.role.level, sp.gfn, cpu.sptes, cpu.tables
            )
            spte = cpu.sptes[level]
            if is_last_spte(spte, level) and (is_writable_pte(spte) or is_mmu_writable_spte(spte)):
                yield f"{sp!r} is in sync, and {root!r} lets the guest write to its table"

    def _slots(self) -> Iterator[KvmMemorySlot]:
        for slots in self.kvm.memslots:
            yield from slots.slots


    def _format(self, sp: ShadowPage) -> PagingFormat:
        if tdp_enabled(self.kvm):
            return ept_format(accessed_dirty=not sp.role.ad_disabled)
        return PAGING32 if sp.role.has_4_byte_gpte else PAGING64
