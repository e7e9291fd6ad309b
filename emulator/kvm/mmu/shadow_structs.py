"""The shadow MMU's structures: a page that shadows a guest's table, and what a VM and a slot keep for it.

mmu_lock, held for write, protects all fields but those that are documented otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

from emulator.kvm.mmu.structs import KvmMmuPage, KvmMmuPageRole
from emulator.machine.locks import SpinLock
from native.types import Gfn, Hfn, Level, SpteIndex


class ShadowPage(KvmMmuPage):
    """struct kvm_mmu_page of a page that the shadow MMU uses, as a root or below one.

    gfn: the guest's table that it shadows; if it is direct, the first gfn that it maps.
    parent_ptes: the SPTEs that link it.  root_count: the vCPUs' references on it as a root.
    unsync: the guest may write to the table, of level 1, so that SPTEs may differ from it until the next
    sync. Set under mmu_unsync_pages_lock, also by faults that hold mmu_lock for read, and read without a
    lock. unsync_child_bitmap: the entries below which a table is or was unsync.  `unsync_children` counts
    its bits. shadowed_access: by index, the ACC_ bits of the guest's walk to a leaf of a page that is not
    direct.  (The gfns of sp->shadowed_translation are the core's, see native/ept/shadow_mmu.h.)
    write_flooding_count: emulated writes since its last use.
    """

    __slots__ = (
        "gfn",
        "parent_ptes",
        "root_count",
        "shadowed_access",
        "unsync",
        "unsync_child_bitmap",
        "write_flooding_count",
    )

    def __init__(
        self, hfn: Hfn, role: KvmMmuPageRole, gfn: Gfn, mmu_valid_gen: int, parent_spte: int
    ) -> None:
        super().__init__(hfn, role, tdp_mmu_page=False, parent_spte=parent_spte)
        self.gfn = gfn
        self.root_count = 0
        self.parent_ptes: list[Sptep] = []
        self.unsync = False
        self.unsync_child_bitmap = 0
        self.shadowed_access: dict[SpteIndex, int] = {}
        self.mmu_valid_gen = mmu_valid_gen
        self.write_flooding_count = 0

    def __repr__(self) -> str:
        return f"<shadow page {self.hfn:#x} of gfn {self.gfn:#x} {self.role}>"

    @property
    def unsync_children(self) -> int:
        return self.unsync_child_bitmap.bit_count()

    def has_gptes(self) -> bool:
        """sp_has_gptes(): return whether a guest's table is behind it."""
        return not self.role.direct

    def get_access(self, index: SpteIndex) -> int:
        """kvm_mmu_page_get_access(): return the guest's rights that a leaf at `index` stands for."""
        return self.role.access if self.role.direct else self.shadowed_access.get(index, self.role.access)


class Sptep(NamedTuple):
    """A pointer to an SPTE: the shadow page, and the index in it (sptep_to_sp(), spte_index())."""

    sp: ShadowPage
    idx: SpteIndex


class KvmShadowArch:
    """The shadow MMU's part of struct kvm_arch.

    active_mmu_pages: by age.  dummy_root: a table of empty entries, for a CR3 that points to no memory.
    mmu_page_hash: by gfn.  page_of: by the frame of its table, for which the kernel has struct page.
    mmu_valid_gen: 0 or 1, toggled under slots_lock and mmu_lock. indirect_shadow_pages: pages with a guest's
    table behind them, also read without a lock.  shadow_root_allocated: some vCPU has loaded a root that
    shadows a guest's table.  zapped_pages: pages that wait to be freed together (commit_zap=batch).
    """

    __slots__ = (
        "active_mmu_pages",
        "dummy_root",
        "indirect_shadow_pages",
        "mmu_page_hash",
        "mmu_unsync_pages_lock",
        "mmu_valid_gen",
        "n_max_mmu_pages",
        "n_mmu_pages",
        "page_of",
        "shadow_root_allocated",
        "zapped_pages",
    )

    def __init__(self, n_max_mmu_pages: int) -> None:
        self.dummy_root: Hfn | None = None
        # An ordered set, which pages leave from anywhere; the newest is last.
        self.active_mmu_pages: dict[ShadowPage, None] = {}
        self.mmu_page_hash: dict[Gfn, list[ShadowPage]] = {}
        self.mmu_valid_gen = 0
        self.indirect_shadow_pages = 0
        self.shadow_root_allocated = False
        self.mmu_unsync_pages_lock = SpinLock("mmu_unsync_pages_lock")
        self.n_mmu_pages = 0
        self.n_max_mmu_pages = n_max_mmu_pages
        self.page_of: dict[Hfn, ShadowPage] = {}
        self.zapped_pages: list[ShadowPage] = []


class SlotArch:
    """struct kvm_arch_memory_slot.  A slot shares it with its INVALID copy, and with its next version if only
    flags change.

    rmap: by level and gfn, the leaf SPTEs that map the page.  gfn_write_track: by gfn, reasons for which the
    guest may not write.  disallow_lpage: by level and gfn, reasons against a huge page there.
    """

    __slots__ = ("disallow_lpage", "gfn_write_track", "rmap")

    def __init__(self) -> None:
        self.rmap: dict[tuple[Level, Gfn], list[Sptep]] = {}
        self.gfn_write_track: dict[Gfn, int] = {}
        self.disallow_lpage: dict[tuple[Level, Gfn], int] = {}
