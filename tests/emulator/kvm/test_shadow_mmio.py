"""MMIO SPTEs of the shadow MMU: made for gfns without a memslot, void after an update of the memslots."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emulator.audit import audited
from emulator.kvm.kvm_host import KVM_REQ_MMU_FREE_OBSOLETE_ROOTS
from emulator.kvm.mmu.fault import RET_PF_EMULATE, RET_PF_FIXED, RET_PF_RETRY
from emulator.kvm.mmu.mmio import (
    MMIO_SPTE_GEN_MASK,
    get_mmio_spte_generation,
    get_mmio_spte_gfn,
    handle_mmio_page_fault,
    is_renewed_mmio_spte,
    make_mmio_spte,
)
from emulator.kvm.mmu.page_fault import kvm_mmu_page_fault
from emulator.kvm.mmu.rmap import gfn_to_rmap
from emulator.kvm.mmu.shadow_spte import is_mmio_spte
from emulator.kvm.mmu.spte import is_shadow_present_pte
from emulator.kvm.regs import kvm_mmu_invlpg
from emulator.kvm.virt.kvm_main import kvm_set_memory_region
from emulator.kvm.virt.requests import kvm_check_request, kvm_test_request
from emulator.kvm.virt.slots import gfn_to_memslot
from native import lib
from native.types import Gfn, Hva, Level
from tests.emulator.kvm.rig import SLOT, Rig
from tests.emulator.kvm.shadow_rig import PAGE, A, D, P, ShadowedGuest, U, shadowed_guest

LINEAR = 0x7F00_0000_0000
OTHER = LINEAR + (1 << 12)
PAGES = 200  # of the slot; higher gfns are in none
MMIO = 300


@pytest.fixture
def guest(rig: Rig) -> Iterator[ShadowedGuest]:
    with shadowed_guest(rig) as guest:
        kvm_set_memory_region(rig.host, guest.kvm, SLOT, Gfn(0), 0, Hva(0))
        kvm_set_memory_region(rig.host, guest.kvm, SLOT, Gfn(0), PAGES, Hva(0))
        yield guest


def reserved(guest: ShadowedGuest, linear: int) -> int:
    """Take the fault that the CPU takes at an MMIO SPTE."""
    guest.enter()
    error = lib.PFERR_RSVD | lib.PFERR_PRESENT | lib.PFERR_USER
    return kvm_mmu_page_fault(guest.cpu, guest.vcpu, linear, lib.ACCESS_READ, True, error)


def test_an_access_without_a_memslot_is_noted_and_emulated(guest: ShadowedGuest) -> None:
    guest.map(LINEAR, MMIO)
    with guest.rig.counting(guest.kvm) as changed:
        assert guest.fault(LINEAR) == RET_PF_EMULATE
        assert reserved(guest, LINEAR) == RET_PF_EMULATE
    assert changed["pf_mmio_spte_created"] == 1
    spte = guest.spte(LINEAR)
    assert is_mmio_spte(spte)
    assert not is_shadow_present_pte(spte)
    assert get_mmio_spte_gfn(spte) == MMIO
    assert get_mmio_spte_generation(spte) == guest.kvm.memslots[0].generation & MMIO_SPTE_GEN_MASK


def test_an_update_of_the_memslots_makes_it_void(guest: ShadowedGuest) -> None:
    guest.map(LINEAR, MMIO)
    assert guest.fault(LINEAR) == RET_PF_EMULATE
    kvm_set_memory_region(guest.rig.host, guest.kvm, SLOT + 1, Gfn(MMIO), 8, Hva(MMIO))
    assert not kvm_test_request(guest.cpu, guest.vcpu, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS)
    # The SPTE is still there, and its page is in a memslot by now.
    assert is_mmio_spte(guest.spte(LINEAR))
    assert reserved(guest, LINEAR) == RET_PF_FIXED
    assert is_shadow_present_pte(guest.spte(LINEAR))


@pytest.fixture
def unsync(guest: ShadowedGuest) -> ShadowedGuest:
    """Return a guest with an MMIO SPTE in a page that is unsync."""
    guest.map(OTHER, guest.map(LINEAR, MMIO))
    assert guest.fault(LINEAR) == RET_PF_EMULATE
    guest.fault(OTHER, write=True)
    assert guest.leaf(LINEAR).sp.unsync
    return guest


def test_a_sync_renews_it_although_a_memslot_has_come(unsync: ShadowedGuest) -> None:
    """As in Linux 7.3, sync_mmio_spte() gives it the present generation without a look at the memslots."""
    kvm_set_memory_region(unsync.rig.host, unsync.kvm, SLOT + 1, Gfn(MMIO), 8, Hva(MMIO))
    with unsync.rig.counting(unsync.kvm) as changed:
        kvm_mmu_invlpg(unsync.cpu, unsync.vcpu, LINEAR)
        assert reserved(unsync, LINEAR) == RET_PF_EMULATE
    assert is_renewed_mmio_spte(unsync.spte(LINEAR))
    assert "pf_mmio_spte_created" not in changed
    kvm_mmu_invlpg(unsync.cpu, unsync.vcpu, LINEAR)
    assert is_renewed_mmio_spte(unsync.spte(LINEAR))
    assert audited(unsync.rig.machine, unsync.rig.vms).endswith("in memslot 1, since a sync renewed it")
    assert not audited(unsync.rig.machine, unsync.rig.vms, live=True)


def test_a_sync_of_the_present_generation_renews_nothing(unsync: ShadowedGuest) -> None:
    kvm_mmu_invlpg(unsync.cpu, unsync.vcpu, LINEAR)
    assert is_mmio_spte(unsync.spte(LINEAR))
    assert not is_renewed_mmio_spte(unsync.spte(LINEAR))


def test_generations_are_unique_among_address_spaces(guest: ShadowedGuest) -> None:
    first, second = guest.kvm.memslots
    assert (first.generation % 2, second.generation % 2) == (0, 1)
    before = first.generation
    kvm_set_memory_region(guest.rig.host, guest.kvm, SLOT + 1, Gfn(MMIO), 8, Hva(MMIO))
    assert guest.kvm.memslots[0].generation == before + 2


@pytest.mark.parametrize(("left", "zapped"), [(1, True), (2, False)])
def test_all_pages_are_zapped_at_a_wrap(guest: ShadowedGuest, left: int, zapped: bool) -> None:
    guest.map(LINEAR, MMIO)
    guest.fault(LINEAR)
    guest.kvm.memslots[0].generation = MMIO_SPTE_GEN_MASK + 1 - 2 * left
    kvm_check_request(guest.cpu, guest.vcpu, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS)
    kvm_set_memory_region(guest.rig.host, guest.kvm, SLOT + 1, Gfn(MMIO + 16), 8, Hva(MMIO + 16))
    assert kvm_test_request(guest.cpu, guest.vcpu, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS) == zapped
    assert guest.root().role.invalid == zapped


def test_all_bits_of_a_generation_come_back(guest: ShadowedGuest) -> None:
    for gen in (0, 2, 1 << 15, MMIO_SPTE_GEN_MASK - 1):
        guest.kvm.memslots[0].generation = gen
        spte = make_mmio_spte(guest.cpu, guest.kvm, 0, Gfn(MMIO))
        assert (get_mmio_spte_generation(spte), get_mmio_spte_gfn(spte)) == (gen, MMIO)
        assert is_mmio_spte(spte)


def test_a_sync_follows_the_guests_entry(guest: ShadowedGuest) -> None:
    table = guest.map(LINEAR, MMIO)
    guest.map(OTHER, table)
    guest.fault(LINEAR)
    guest.fault(OTHER, write=True)
    assert guest.leaf(LINEAR).sp.unsync
    kvm_mmu_invlpg(guest.cpu, guest.vcpu, LINEAR)
    assert get_mmio_spte_gfn(guest.spte(LINEAR)) == MMIO
    guest.write(table, guest.index(LINEAR, 1), MMIO + 1 << 12 | PAGE)
    kvm_mmu_invlpg(guest.cpu, guest.vcpu, LINEAR)
    assert guest.spte(LINEAR) == 0
    assert handle_mmio_page_fault(guest.cpu, guest.vcpu, LINEAR) == RET_PF_RETRY


def test_a_present_spte_is_dropped_for_it_and_flushed(guest: ShadowedGuest) -> None:
    table = guest.map(LINEAR, 7, P | U | A | D)
    guest.map(OTHER, table)
    guest.fault(LINEAR)
    guest.fault(OTHER, write=True)
    slot = gfn_to_memslot(guest.cpu, guest.kvm, Gfn(7))
    assert slot is not None
    assert len(gfn_to_rmap(slot, Gfn(7), Level(1))) == 1
    guest.write(table, guest.index(LINEAR, 1), MMIO << 12 | PAGE)
    with guest.rig.counting(guest.kvm) as changed:
        assert guest.fault(LINEAR, write=True, present=True) == RET_PF_EMULATE
    assert changed["remote_tlb_flush_requests"] == 1
    assert gfn_to_rmap(slot, Gfn(7), Level(1)) == []
    assert is_mmio_spte(guest.spte(LINEAR))
