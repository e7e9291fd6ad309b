"""arch/x86/kvm/mmu/mmu.c: walks over SPTEs without mmu_lock.

RCU keeps the TDP MMU's tables for the walker.  A page of the shadow MMU is freed after a flush of the whole
VM (kvm_mmu_commit_zap_page), which interrupts each vCPU that is not OUTSIDE_GUEST_MODE and waits for the
acknowledgement.  The walker's vCPU is READING_SHADOW_PAGE_TABLES with interrupts disabled, so it acknowledges
only after the walk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from emulator.kvm.kvm_host import (
    OUTSIDE_GUEST_MODE,
    READING_SHADOW_PAGE_TABLES,
    kvm_pages_per_hpage,
)
from emulator.kvm.mmu.shadow_structs import ShadowPage
from emulator.kvm.mmu.spte import is_last_spte, is_shadow_present_pte, spte_to_child_pt
from emulator.kvm.mmu.structs import KvmMmuRootInfo
from emulator.kvm.mmu.tdp_iter import Entry
from emulator.kvm.structs import Kvm, Vcpu, tdp_mmu_enabled
from emulator.kvm.virt.requests import set_mode
from emulator.machine.runtime import Cpu, rcu_enter, rcu_leave, smp_mb
from native import ffi, lib
from native.types import Gfn, LinearPage

# Names the place where interrupts were disabled; allocated once, because the core keeps the pointer.
_WALK: Final = ffi.new("char[]", b"walk_shadow_page_lockless_begin")
_PAGES: Final = (1 << 36) - 1


def is_tdp_mmu_active(vcpu: Vcpu) -> bool:
    """is_tdp_mmu_active(): return whether the vCPU's current MMU is the TDP MMU."""
    return tdp_mmu_enabled(vcpu.kvm) and vcpu.mmu.root_role.direct


def walk_shadow_page_lockless_begin(cpu: Cpu, vcpu: Vcpu) -> None:
    """walk_shadow_page_lockless_begin(): keep the tables that are reachable now from being freed.

    The barrier completes smp_store_mb().  A flusher that does not see the mode has therefore unlinked its
    pages before the walk begins, and the walk does not find them.
    """
    if is_tdp_mmu_active(vcpu):
        rcu_enter(cpu)
        return
    cpu.check(lib.local_irq_disable(cpu.m, cpu.id, _WALK))
    set_mode(cpu, vcpu, READING_SHADOW_PAGE_TABLES)
    smp_mb(cpu)


def walk_shadow_page_lockless_end(cpu: Cpu, vcpu: Vcpu) -> None:
    """walk_shadow_page_lockless_end(): a flusher that sees the mode may free what the walk has read."""
    if is_tdp_mmu_active(vcpu):
        rcu_leave(cpu)
        return
    set_mode(cpu, vcpu, OUTSIDE_GUEST_MODE)
    cpu.check(lib.local_irq_enable(cpu.m, cpu.id))


class walk_shadow_page_lockless:  # noqa: N801 - after the kernel's functions
    """A section between walk_shadow_page_lockless_begin() and walk_shadow_page_lockless_end()."""

    __slots__ = ("cpu", "vcpu")

    def __init__(self, cpu: Cpu, vcpu: Vcpu) -> None:
        self.cpu, self.vcpu = cpu, vcpu

    def __enter__(self) -> None:
        walk_shadow_page_lockless_begin(self.cpu, self.vcpu)

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        walk_shadow_page_lockless_end(self.cpu, self.vcpu)


def kvm_mmu_is_dummy_root(kvm: Kvm, root: KvmMmuRootInfo) -> bool:
    """kvm_mmu_is_dummy_root()"""
    return root.sp is None and root.hfn == kvm.shadow.dummy_root


def shadow_walk_root(vcpu: Vcpu, addr: int) -> ShadowPage | None:
    """shadow_walk_init(): return the page in which a walk for the address begins, if there is one.

    With PAE roots, which map a GiB each, it is the root of the address's GiB, of level 2.
    """
    root = vcpu.mmu.root
    if root is None:
        return None
    return root.sp if isinstance(root.sp, ShadowPage) else vcpu.mmu.pae_root[addr >> 30 & 3]


def for_each_shadow_entry_lockless(cpu: Cpu, vcpu: Vcpu, addr: int) -> Iterator[Entry]:
    """for_each_shadow_entry_lockless(): yield the SPTEs for an address, from the root down.

    The vCPU holds a reference on its root; nothing but the section keeps the pages below it.
    """
    sp = shadow_walk_root(vcpu, addr)
    if sp is None:
        return
    page, level = addr >> 12 & _PAGES, sp.role.level
    link = lib.make_nonleaf_spte(cpu.m, sp.hfn)
    while True:
        table = spte_to_child_pt(link)
        cpu.point("sptes", (table, page), "read")
        spte = int(lib.mmu_spte_get_lockless(cpu.m, cpu.id, vcpu.kvm.id, link, level, LinearPage(page)))
        yield Entry(spte, table, level, Gfn(page & -kvm_pages_per_hpage(level)))
        if not is_shadow_present_pte(spte) or is_last_spte(spte, level):
            return
        link, level = spte, level - 1


def shadow_page_table_clear_flood(cpu: Cpu, vcpu: Vcpu, addr: int) -> None:
    """shadow_page_table_clear_flood(): note that the tables on the way to the address are in use."""
    with walk_shadow_page_lockless(cpu, vcpu):
        for entry in for_each_shadow_entry_lockless(cpu, vcpu, addr):
            sp = vcpu.kvm.shadow.page_of.get(entry.table)
            if sp is not None:
                clear_sp_write_flooding_count(cpu, sp)


def clear_sp_write_flooding_count(cpu: Cpu, sp: ShadowPage) -> None:
    """clear_sp_write_flooding_count(), also without mmu_lock.

    Two of them may come in any order, so that it takes the place of a read beside detect_write_flooding().
    """
    cpu.point("write_flooding", sp.hfn, "read")
    sp.write_flooding_count = 0
