"""The shadow MMU's structures: its pages, their links, the rmaps, and the accounts of guests' tables.

* each shadow page is in the hash once, and the VM counts its pages, and those that shadow a guest's table
* no other page in use has the gfn and the role of a page in use
* the pages in use are the active ones, and none of them is of an old mmu_valid_gen
* the guest's table behind a page in use is in a memslot; only such a page, of level 1, is unsync
* a link leads to a page one level below, which knows it as a parent, and no page has another parent
* a leaf is in the rmap of its gfn once, and nothing else is there
* a page that was taken out of use has no present entry
* the tables above an unsync table are marked, so that a sync finds it
* a gfn's counts of write tracking and of disallowed huge pages are the numbers of tables shadowed there
* no leaf of its address space lets the guest write to a table that is shadowed and in sync
* an SPTE of such a page grants no more than the guest's entry does now
* an MMIO SPTE of the present generation stands for a gfn in no memslot
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from emulator.audit.leaf import LeafAudit
from emulator.kvm.kvm_host import (
    APIC_ACCESS_PAGE_PRIVATE_MEMSLOT,
    KVM_MAX_HUGEPAGE_LEVEL,
    KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    SPTE_ENT_PER_PAGE,
    SPTE_LEVEL_BITS,
    kvm_pages_per_hpage,
)
from emulator.kvm.mmu.guest_walk import PAGING32, PAGING64, PT_PAGE_SIZE_MASK, PagingFormat, ept_format
from emulator.kvm.mmu.mmio import (
    MMIO_SPTE_GEN_MASK,
    get_mmio_spte_generation,
    get_mmio_spte_gfn,
    is_renewed_mmio_spte,
)
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
from emulator.kvm.structs import Kvm, KvmMemorySlot, tdp_enabled
from emulator.machine.runtime import Machine
from native import ffi, lib
from native.types import Gfn, Level, SpteIndex, WordIndex, span


class ShadowAudit:
    """An audit of one VM.  live: as in audited()."""

    def __init__(self, machine: Machine, kvm: Kvm, *, live: bool) -> None:
        self.machine = machine
        self.m = machine.m
        self.kvm = kvm
        self.live = live
        self.leafs = LeafAudit(machine, kvm, live=live)
        self.pages = list(kvm.shadow.page_of.values())

    def findings(self) -> Iterator[str]:
        yield from self._hash_and_counts()
        yield from self._in_use()
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
        # A page that was taken out of use is not counted, except for a root that a vCPU still holds.
        in_use = sum(not sp.role.invalid or sp.root_count > 0 for sp in self.pages)
        if shadow.n_mmu_pages != in_use:
            yield f"n_mmu_pages is {shadow.n_mmu_pages}, and {in_use} shadow pages are in use"
        indirect = sum(not sp.role.invalid and sp.has_gptes() for sp in self.pages)
        if shadow.indirect_shadow_pages != indirect:
            counted = shadow.indirect_shadow_pages
            yield f"indirect_shadow_pages is {counted}, and {indirect} pages shadow a table"

    def _in_use(self) -> Iterator[str]:
        in_use = [sp for sp in self.pages if not sp.role.invalid]
        if self.kvm.shadow.active_mmu_pages.keys() != set(in_use):
            yield f"{len(in_use)} shadow pages are in use, and others are on the list of active ones"
        twice = Counter((sp.gfn, sp.role) for sp in in_use if not is_obsolete_sp(self.kvm, sp))
        for (gfn, role), n in twice.items():
            if n > 1:
                yield f"{n} shadow pages in use are of gfn {gfn:#x} and {role}"
        for sp in in_use:
            if sp.mmu_valid_gen != self.kvm.shadow.mmu_valid_gen:
                # kvm_zap_obsolete_pages() yields.
                if not self.live:
                    yield f"{sp!r} is in use, and of an old mmu_valid_gen"
            elif sp.has_gptes() and self.kvm.memslots[sp.role.smm].search(sp.gfn) is None:
                yield f"{sp!r} is in use, and its table is in no memslot"
            if sp.unsync and (sp.role.direct or sp.role.level > PG_LEVEL_4K):
                yield f"{sp!r} is unsync, and shadows no table of level 1"

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
            elif is_mmio_spte(spte):
                yield from self._mmio(sptep, spte)
            else:
                yield f"entry {index} of {sp!r} is neither present nor MMIO nor empty: {spte:#x}"
            index = lib.spte_next(self.m, sp.hfn, index + 1)

    def _leaf(self, sptep: Sptep, spte: int, mapped: Counter[tuple[int, Level, Gfn, Sptep]]) -> Iterator[str]:
        sp, index = sptep
        level, gfn = sp.role.level, self._gfn(sptep)
        slot = self.kvm.memslots[sp.role.smm].search(gfn)
        yield from self.leafs.findings(f"entry {index} of {sp!r}", spte, level, gfn, slot)
        if slot is None:
            return
        mapped[slot.as_id, level, gfn & -kvm_pages_per_hpage(level), sptep] += 1
        rights = ACC_WRITE_MASK | ACC_EXEC_MASK | ACC_USER_MASK
        more = spte & rights & ~sp.get_access(index)
        if more:
            yield f"entry {index} of {sp!r} has rights {more:#x} that its walk of the guest's tables had not"
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

    def _mmio(self, sptep: Sptep, spte: int) -> Iterator[str]:
        """Look for a memslot behind an MMIO SPTE that counts.

        Linux 7.3 itself lets a sync renew one behind which a memslot has come (sync_mmio_spte()).  A run that
        is stopped may have met that and is not judged by it; an execution of a litmus test is.
        """
        renewed = is_renewed_mmio_spte(spte)
        if self.live and renewed:
            return
        slots, gfn = self.kvm.memslots[sptep.sp.role.smm], Gfn(get_mmio_spte_gfn(spte))
        replaced = slots.generation & KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
        if replaced or get_mmio_spte_generation(spte) != slots.generation & MMIO_SPTE_GEN_MASK:
            return  # the next access to the gfn looks for a memslot
        slot = slots.search(gfn)
        # A nested guest gets none of L1's APIC-access page.
        if slot is not None and slot.id != APIC_ACCESS_PAGE_PRIVATE_MEMSLOT:
            where = f"entry {sptep.idx} of {sptep.sp!r} is MMIO for gfn {gfn:#x}"
            yield f"{where}, which is in memslot {slot.id}{', since a sync renewed it' if renewed else ''}"

    def _spte(self, sptep: Sptep) -> int:
        return int(lib.spte_read(self.m, sptep.sp.hfn, sptep.idx))

    def _gfn(self, sptep: Sptep) -> Gfn:
        """kvm_mmu_page_get_gfn()"""
        sp, index = sptep
        if sp.role.direct:
            return sp.gfn + (index << SPTE_LEVEL_BITS * (sp.role.level - 1))
        return Gfn(lib.kvm_mmu_page_get_gfn(self.m, sp.hfn, index))

    def _gpte(self, sptep: Sptep) -> int | None:
        """Return the guest's entry that an SPTE stands for; None: there is none, or the SPTE may differ.

        Before KVM takes mmu_lock to zap an SPTE for an emulated store, it has stored the entry.
        """
        sp, index = sptep
        if self.live:
            return None
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
        """Look for leafs by which the guest may write to the table that `sp` shadows.

        Only in the page's own address space: account_shadowed() protects no leaf of the other one, where a
        fault that comes later finds the gfn tracked.
        """
        slot = self.kvm.memslots[sp.role.smm].search(sp.gfn)
        if slot is None:
            return
        for level in span(PG_LEVEL_4K, KVM_MAX_HUGEPAGE_LEVEL + 1):
            for sptep in slot.arch.rmap.get((level, sp.gfn & -kvm_pages_per_hpage(level)), ()):
                spte = self._spte(sptep)
                if is_writable_pte(spte) or is_mmu_writable_spte(spte):
                    yield f"{sp!r} is in sync, and {sptep.sp!r} lets the guest write to its table"
        cpu = self.machine.cpus[self.machine.pcpus]
        for root in self.kvm.tdp_mmu_roots:
            if root.role.smm != sp.role.smm:
                continue
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
