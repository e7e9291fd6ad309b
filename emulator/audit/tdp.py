"""The TDP MMU's structures: its tables, from each root on.

* a link leads to a table in use, of one level below, and no other entry leads there
* no SPTE is frozen, and each is present or empty
* a root maps pages of its own address space
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from emulator.audit.leaf import LeafAudit
from emulator.kvm.kvm_host import PG_LEVEL_4K, SPTE_ENT_PER_PAGE, SPTE_LEVEL_BITS
from emulator.kvm.mmu.spte import is_frozen_spte, is_last_spte, is_shadow_present_pte, spte_to_child_pt
from emulator.kvm.mmu.structs import KvmMmuPage
from emulator.kvm.structs import Kvm
from emulator.machine.runtime import Machine
from native import lib
from native.types import Gfn, Hfn, Level, SpteIndex

_ACCESSED: Final[int] = lib.SPTE_ACCESSED


class TdpAudit:
    """An audit of one VM.  live: as in audited()."""

    def __init__(self, machine: Machine, kvm: Kvm, *, live: bool) -> None:
        self._m = machine.m
        self._kvm = kvm
        self._leafs = LeafAudit(machine, kvm, live=live)
        self._live = live
        self._linked: set[Hfn] = set()

    def findings(self) -> Iterator[str]:
        for root in self._kvm.tdp_mmu_roots:
            yield from self._table(root, root.hfn, root.role.level, Gfn(0))

    def _table(self, root: KvmMmuPage, table: Hfn, level: Level, first: Gfn) -> Iterator[str]:
        index = lib.spte_next(self._m, table, SpteIndex(0))
        while index < SPTE_ENT_PER_PAGE:
            spte = int(lib.spte_read(self._m, table, index))
            gfn = first + (index << SPTE_LEVEL_BITS * (level - 1))
            where = f"entry {index} of table {table:#x} of level {level} below {root!r}"
            if is_frozen_spte(spte):
                yield f"{where} is frozen, and no thread is changing the entry"
            elif not is_shadow_present_pte(spte):
                yield f"{where} is neither present nor empty: {spte:#x}"
            elif is_last_spte(spte, level):
                slot = self._kvm.memslots[root.role.smm].search(gfn)
                yield from self._leafs.findings(where, spte, level, gfn, slot)
            else:
                yield from self._link(root, where, spte, level, gfn)
            index = lib.spte_next(self._m, table, index + 1)

    def _link(self, root: KvmMmuPage, where: str, spte: int, level: Level, gfn: Gfn) -> Iterator[str]:
        child = spte_to_child_pt(spte)
        if level == PG_LEVEL_4K or (spte ^ lib.make_nonleaf_spte(self._m, child)) & ~_ACCESSED:
            yield f"{where} leads to frame {child:#x}, which is no table of this link any more"
        elif child in self._linked:
            yield f"{where} leads to table {child:#x}, and so does another entry"
        else:
            self._linked.add(child)
            yield from self._table(root, child, level - 1, gfn)
