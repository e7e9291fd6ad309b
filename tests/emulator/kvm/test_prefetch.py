"""Faults of the shadow MMU that map neighbours of their page as well."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES, X86_CR0_PG
from emulator.kvm.mmu.fault import RET_PF_FIXED
from emulator.kvm.mmu.shadow_spte import PT_ACCESSED_MASK, spte_of
from emulator.kvm.mmu.shadow_structs import Sptep
from emulator.kvm.mmu.spte import is_shadow_present_pte, is_writable_pte
from emulator.kvm.regs import kvm_set_cr0
from emulator.kvm.virt.kvm_main import kvm_set_memory_region
from native import lib
from native.types import Gfn, Hva, SpteIndex
from tests.emulator.kvm.rig import GFNS, SLOT, Rig
from tests.emulator.kvm.shadow_rig import PAGE, A, ShadowedGuest, shadowed_guest

LINEAR, FIRST, GROUP = 0x7F00_0000_0000, 0x10, 8


@pytest.fixture
def guest(rig: Rig) -> Iterator[ShadowedGuest]:
    """A guest that has a group of pages mapped, all of which the host has, and their neighbour."""
    with shadowed_guest(rig, prefetch=GROUP) as guest:
        for i in range(GROUP + 1):
            guest.map(LINEAR + (i << 12), FIRST + i)
        host_has(guest, *range(FIRST, FIRST + GROUP + 1))
        yield guest


def host_has(guest: ShadowedGuest, *pages: int) -> None:
    for page in pages:
        guest.cpu.check(
            lib.mm_fault(guest.cpu.m, guest.cpu.id, guest.kvm.id, Hva(page), True, guest.cpu.page)
        )


def sptes(guest: ShadowedGuest) -> list[int]:
    """Return the SPTEs of the group, and of its neighbour."""
    sp = guest.leaf(LINEAR + (3 << 12)).sp
    return [spte_of(guest.cpu, Sptep(sp, SpteIndex(i))) for i in range(GROUP + 1)]


def mapped(guest: ShadowedGuest) -> list[int]:
    return [i for i, spte in enumerate(sptes(guest)) if is_shadow_present_pte(spte)]


def test_a_fault_maps_its_group_and_only_its_own_page_counts_as_used(guest: ShadowedGuest) -> None:
    assert guest.fault(LINEAR + (3 << 12)) == RET_PF_FIXED
    assert mapped(guest) == list(range(GROUP))
    assert [i for i, spte in enumerate(sptes(guest)) if spte & PT_ACCESSED_MASK] == [3]
    assert all(is_writable_pte(spte) for spte in sptes(guest)[:GROUP])


def test_without_it_a_fault_maps_its_page(rig: Rig) -> None:
    with shadowed_guest(rig, prefetch=0) as guest:
        for i in range(GROUP):
            guest.map(LINEAR + (i << 12), FIRST + i)
        host_has(guest, *range(FIRST, FIRST + GROUP))
        guest.fault(LINEAR + (3 << 12))
        assert mapped(guest) == [3]


@pytest.mark.parametrize("entry", [0, (FIRST + 5) << 12 | PAGE & ~A])
def test_it_ends_at_an_entry_that_the_guest_has_not_used(guest: ShadowedGuest, entry: int) -> None:
    table = guest.map(LINEAR, FIRST)
    guest.write(table, 5, entry)
    guest.fault(LINEAR + (3 << 12))
    assert mapped(guest) == [0, 1, 2, 3, 4]


def test_it_ends_at_a_page_that_the_host_does_not_have(guest: ShadowedGuest) -> None:
    guest.rig.unmap(guest.kvm, FIRST + 2, FIRST + 3)
    guest.fault(LINEAR + (3 << 12))
    assert mapped(guest) == [0, 1, 3]


def test_it_ends_at_a_page_that_must_not_be_written(guest: ShadowedGuest) -> None:
    lib.mm_protect(guest.cpu.m, guest.cpu.id, guest.kvm.id, Hva(FIRST + 4), Hva(FIRST + 5), False)
    guest.fault(LINEAR + (3 << 12))
    assert mapped(guest) == [0, 1, 2, 3]


def test_no_neighbour_becomes_writable_where_dirty_pages_are_logged(guest: ShadowedGuest) -> None:
    """A page that is mapped writable counts as dirty."""
    kvm_set_memory_region(guest.rig.host, guest.kvm, SLOT, Gfn(0), GFNS, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)
    guest.fault(LINEAR + (3 << 12))
    assert mapped(guest) == [3]


def test_nothing_is_mapped_while_an_invalidation_is_in_progress(guest: ShadowedGuest) -> None:
    m, vm = guest.cpu.m, guest.kvm.id
    guest.enter()
    lib.mmu_invalidate_begin(m, vm)
    lib.mmu_invalidate_range_add(m, vm, Gfn(900), Gfn(901))
    guest.fault(LINEAR + (3 << 12))
    assert mapped(guest) == [3]
    lib.mmu_invalidate_end(m, vm)
    guest.fault(LINEAR + (2 << 12))
    assert mapped(guest) == list(range(GROUP))


def test_a_table_is_not_made_unsync_for_a_neighbour(guest: ShadowedGuest) -> None:
    """It is mapped read-only, because the guest may never write to it."""
    table = guest.map(LINEAR, FIRST)
    guest.map(LINEAR + (4 << 12), table)
    guest.fault(LINEAR + (3 << 12))
    assert mapped(guest) == list(range(GROUP))
    assert not is_writable_pte(sptes(guest)[4])
    assert not guest.leaf(LINEAR).sp.unsync


def test_a_guest_without_paging_gets_runs_of_pages(guest: ShadowedGuest) -> None:
    kvm_set_cr0(guest.cpu, guest.vcpu, guest.vcpu.arch.cr0 & ~X86_CR0_PG)
    assert guest.fault((FIRST + 3) << 12) == RET_PF_FIXED
    sp = guest.leaf((FIRST + 3) << 12).sp
    found = [
        i
        for i in range(FIRST + GROUP + 1)
        if is_shadow_present_pte(spte_of(guest.cpu, Sptep(sp, SpteIndex(i))))
    ]
    assert found == list(range(FIRST, FIRST + GROUP))
