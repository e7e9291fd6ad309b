"""The audit of the TDP MMU's tables that a tree's code has built: their links.

The tree's SPTEs have the bits of its version, so their rights are not compared with the slot's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from emulator.audit.tdp import TdpAudit
from emulator.kvm.kvm_host import SPTE_ENT_PER_PAGE, SPTE_LEVEL_BITS
from emulator.kvm.mmu.spte import spte_to_child_pt
from emulator.kvm.mmu.structs import KvmMmuPage
from native import lib
from native.types import Gfn, Hfn, Level, SpteIndex

# Bits of an SPTE in each version: R, W and X; the page size; the address, with the tag of the frame's life.
_RWX: Final = 7
_HUGE: Final = 1 << 7
_ADDRESS: Final = (1 << 51) - (1 << 12)


class TreeTablesAudit(TdpAudit):
    """An audit of one VM: a link leads to a table in use, and no other entry leads there."""

    def _table(self, root: KvmMmuPage, table: Hfn, level: Level, first: Gfn) -> Iterator[str]:
        index = lib.spte_next(self._m, table, SpteIndex(0))
        while index < SPTE_ENT_PER_PAGE:
            spte = int(lib.spte_read(self._m, table, index))
            if level > 1 and spte & _RWX and not spte & _HUGE:
                gfn = first + (index << SPTE_LEVEL_BITS * (level - 1))
                where = f"entry {index} of table {table:#x} of level {level} below {root!r}"
                yield from self._link(root, where, spte, level, gfn)
            index = lib.spte_next(self._m, table, index + 1)

    def _link(self, root: KvmMmuPage, where: str, spte: int, level: Level, gfn: Gfn) -> Iterator[str]:
        child = spte_to_child_pt(spte)
        own = int(lib.make_nonleaf_spte(self._m, child))
        yield from super()._link(root, where, own ^ (own ^ spte) & _ADDRESS, level, gfn)
