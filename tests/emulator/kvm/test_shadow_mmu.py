"""KVM's shadow MMU: faults, unsync tables, write tracking, zaps; driven without hardware."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emulator.kvm.kvm_host import (
    KVM_REQ_MMU_FREE_OBSOLETE_ROOTS,
    KVM_REQ_TLB_FLUSH,
    X86_CR0_PG,
    X86_CR4_PCIDE,
)
from emulator.kvm.mmu.fault import (
    RET_PF_FIXED,
    RET_PF_INJECTED,
    RET_PF_SPURIOUS,
    RET_PF_WRITE_PROTECTED,
    KvmPageFault,
)
from emulator.kvm.mmu.page_fault import is_page_fault_stale
from emulator.kvm.mmu.page_track import kvm_gfn_is_write_tracked
from emulator.kvm.mmu.roots import (
    is_obsolete_root,
    kvm_mmu_free_obsolete_roots,
    kvm_mmu_reset_context,
    mmu_roots,
)
from emulator.kvm.mmu.spte import is_mmu_writable_spte, is_shadow_present_pte, is_writable_pte
from emulator.kvm.mmu.track_write import kvm_mmu_track_write
from emulator.kvm.regs import kvm_mmu_invlpg, kvm_set_cr3, kvm_set_cr4
from emulator.kvm.virt.kvm_main import kvm_set_memory_region
from emulator.kvm.virt.requests import kvm_check_request, kvm_test_request
from emulator.kvm.virt.slots import gfn_to_memslot
from emulator.policy import Policy
from native import lib
from native.types import Gfn, Hva
from tests.emulator.kvm.rig import GFNS, SLOT, Rig
from tests.emulator.kvm.shadow_rig import PAGE, A, D, P, ShadowedGuest, U, W, shadowed_guest

LINEAR = 0x7F00_0000_0000
OTHER = LINEAR + (1 << 12)


@pytest.fixture
def guest(rig: Rig) -> Iterator[ShadowedGuest]:
    with shadowed_guest(rig) as guest:
        yield guest


def test_a_fault_maps_what_the_guests_tables_say(guest: ShadowedGuest) -> None:
    table = guest.map(LINEAR, 7)
    assert guest.fault(LINEAR) == RET_PF_FIXED
    assert is_shadow_present_pte(guest.spte(LINEAR))
    assert is_writable_pte(guest.spte(LINEAR))
    sp = guest.leaf(LINEAR).sp
    assert (sp.gfn, sp.role.level, sp.role.direct) == (table, 1, False)
    # One page per table of the guest, found by the gfn of the table.
    assert len(guest.kvm.shadow.active_mmu_pages) == 4
    assert guest.root().gfn == guest.vcpu.arch.cr3 >> 12
    assert guest.root().root_count == 1


def test_the_guests_own_fault_is_the_guests(guest: ShadowedGuest) -> None:
    guest.map(LINEAR, 7, 0)
    assert guest.fault(LINEAR) == RET_PF_INJECTED
    assert not is_shadow_present_pte(guest.spte(LINEAR))


def test_a_clean_page_is_mapped_read_only_until_it_is_written(guest: ShadowedGuest) -> None:
    table = guest.map(LINEAR, 7, P | W | U)
    assert guest.fault(LINEAR) == RET_PF_FIXED
    assert guest.entry(table, guest.index(LINEAR, 1)) & (A | D) == A
    assert not is_writable_pte(guest.spte(LINEAR))
    assert guest.fault(LINEAR, write=True, present=True) == RET_PF_FIXED
    assert guest.entry(table, guest.index(LINEAR, 1)) & D
    assert is_writable_pte(guest.spte(LINEAR))


def test_upper_tables_are_write_tracked_and_last_ones_become_unsync(guest: ShadowedGuest) -> None:
    table = guest.map(LINEAR, 7)
    guest.map(OTHER, table)  # the guest's own mapping of its last table
    guest.fault(LINEAR)
    slot = gfn_to_memslot(guest.cpu, guest.kvm, Gfn(table))
    cpu, kvm = guest.cpu, guest.kvm
    tracked = [gfn for gfn in range(100, 104) if kvm_gfn_is_write_tracked(cpu, kvm, slot, Gfn(gfn))]
    assert tracked == [100, 101, 102]
    assert guest.fault(OTHER, write=True) == RET_PF_FIXED
    assert is_writable_pte(guest.spte(OTHER))
    sp = guest.leaf(LINEAR).sp
    assert sp.unsync
    assert guest.root().unsync_children == 1


def test_a_store_to_an_upper_table_is_emulated(guest: ShadowedGuest) -> None:
    guest.map(LINEAR, 7)
    guest.map(OTHER, 102)
    guest.fault(LINEAR)
    with guest.rig.counting(guest.kvm) as changed:
        assert guest.fault(OTHER, write=True) == RET_PF_WRITE_PROTECTED
        assert guest.fault(OTHER, write=True, present=True) == RET_PF_WRITE_PROTECTED
    assert changed["pf_emulate"] == 2
    assert not is_writable_pte(guest.spte(OTHER))
    assert not is_mmu_writable_spte(guest.spte(OTHER))
    # The emulator has written 0 to the entry that leads to the last table.
    guest.write(102, guest.index(LINEAR, 2), 0)
    with guest.rig.counting(guest.kvm) as changed:
        kvm_mmu_track_write(guest.cpu, guest.kvm, 102 << 12 | guest.index(LINEAR, 2) * 8, 8)
    assert changed["mmu_pte_write"] == 1
    assert changed["remote_tlb_flush_requests"] == 1
    assert guest.leaf(LINEAR).sp.role.level == 2


def test_a_table_that_is_flooded_with_writes_is_zapped(guest: ShadowedGuest) -> None:
    guest.map(LINEAR, 7)
    guest.fault(LINEAR)
    with guest.rig.counting(guest.kvm) as changed:
        for index in range(3):
            kvm_mmu_track_write(guest.cpu, guest.kvm, 102 << 12 | index * 8, 8)
    assert changed["mmu_flooded"] == 1
    assert changed["mmu_shadow_zapped"] == 1
    slot = gfn_to_memslot(guest.cpu, guest.kvm, Gfn(102))
    assert not kvm_gfn_is_write_tracked(guest.cpu, guest.kvm, slot, Gfn(102))


def test_an_unsync_table_is_out_of_date_until_the_guest_invalidates(guest: ShadowedGuest) -> None:
    table = guest.map(LINEAR, 7)
    guest.map(OTHER, table)
    guest.fault(LINEAR)
    guest.fault(OTHER, write=True)
    guest.write(table, guest.index(LINEAR, 1), 0)
    assert is_shadow_present_pte(guest.spte(LINEAR))
    kvm_mmu_invlpg(guest.cpu, guest.vcpu, LINEAR)
    assert not is_shadow_present_pte(guest.spte(LINEAR))
    # Single addresses leave the table unsync; a MOV to CR3 protects it again.
    assert guest.leaf(LINEAR).sp.unsync
    kvm_set_cr3(guest.cpu, guest.vcpu, guest.vcpu.arch.cr3)
    guest.enter()
    assert not guest.leaf(LINEAR).sp.unsync
    assert not is_writable_pte(guest.spte(OTHER))
    assert not guest.root().unsync_children


def test_a_sync_protects_the_table_before_it_reads_it(guest: ShadowedGuest) -> None:
    table = guest.map(LINEAR, 7)
    guest.map(OTHER, table)
    guest.fault(LINEAR)
    guest.fault(OTHER, write=True)
    guest.write(table, guest.index(LINEAR, 1), 8 << 12 | PAGE)
    kvm_check_request(guest.cpu, guest.vcpu, KVM_REQ_TLB_FLUSH)
    order = []

    def hook(at: object, kind: str, obj: object, mode: str) -> None:
        order.append(kind)

    guest.rig.machine.install(hook)
    kvm_set_cr3(guest.cpu, guest.vcpu, guest.vcpu.arch.cr3)
    guest.enter()
    guest.rig.machine.install(None)
    flushed = order.index("requests", order.index("spte"))
    assert flushed < order.index("guest-memory")
    assert not is_shadow_present_pte(guest.spte(LINEAR))


def test_rights_that_the_guest_took_are_gone_after_its_invalidation(guest: ShadowedGuest) -> None:
    table = guest.map(LINEAR, 7)
    guest.map(OTHER, table)
    guest.fault(LINEAR, write=True)
    guest.fault(OTHER, write=True)
    guest.write(table, guest.index(LINEAR, 1), 7 << 12 | P | U | A | D)
    kvm_mmu_invlpg(guest.cpu, guest.vcpu, LINEAR)
    assert is_shadow_present_pte(guest.spte(LINEAR))
    assert not is_writable_pte(guest.spte(LINEAR))


def test_roots_are_cached_by_cr3(guest: ShadowedGuest) -> None:
    guest.map(LINEAR, 7)
    guest.fault(LINEAR)
    first = guest.root()
    kvm_set_cr3(guest.cpu, guest.vcpu, 200 << 12)
    guest.enter()
    assert guest.root() is not first
    assert first.root_count == 1
    with guest.rig.counting(guest.kvm) as changed:
        kvm_set_cr3(guest.cpu, guest.vcpu, 100 << 12)
        guest.enter()
    assert guest.root() is first
    assert "mmu_load" not in changed
    assert changed["cached_roots"] == 1


def test_setting_pcide_frees_all_roots(guest: ShadowedGuest) -> None:
    """Their CR3s had no PCID; one of PCID 0 would look the same, and a MOV that flushes nothing could find
    it."""
    guest.map(LINEAR, 7)
    guest.fault(LINEAR)
    kvm_set_cr3(guest.cpu, guest.vcpu, 200 << 12)
    guest.enter()
    kvm_set_cr4(guest.cpu, guest.vcpu, guest.vcpu.arch.cr4 | X86_CR4_PCIDE)
    assert not any((guest.vcpu.mmu.root, *guest.vcpu.mmu.prev_roots))


def test_a_zapped_root_makes_all_vcpus_reload(guest: ShadowedGuest) -> None:
    guest.map(LINEAR, 7)
    guest.fault(LINEAR)
    for _ in range(3):
        kvm_mmu_track_write(guest.cpu, guest.kvm, 100 << 12 | 5 * 8, 8)
    assert guest.root().role.invalid
    assert kvm_test_request(guest.cpu, guest.vcpu, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS)
    guest.enter()
    assert not guest.root().role.invalid
    # The pages below the old root are found again, with their SPTEs.
    assert guest.fault(LINEAR) == RET_PF_SPURIOUS


def test_an_unmap_finds_each_spte_by_its_rmap(guest: ShadowedGuest) -> None:
    guest.map(LINEAR, 7)
    guest.map(OTHER, 7)
    guest.fault(LINEAR)
    guest.fault(OTHER, write=True)
    with guest.rig.counting(guest.kvm) as changed:
        guest.rig.unmap(guest.kvm, 7, 8)
    assert changed["remote_tlb_flush_requests"] == 1
    assert not is_shadow_present_pte(guest.spte(LINEAR))
    assert not is_shadow_present_pte(guest.spte(OTHER))
    assert not guest.rig.violations()


def test_a_slot_is_deleted_with_its_shadow_pages(guest: ShadowedGuest) -> None:
    guest.map(LINEAR, 7)
    guest.fault(LINEAR)
    with guest.rig.counting(guest.kvm) as changed:
        kvm_set_memory_region(guest.rig.host, guest.kvm, SLOT, Gfn(0), 0, Hva(0))
    # Three tables are freed after one flush; the root waits for its vCPU.
    assert changed["mmu_shadow_zapped"] == 4
    assert changed["remote_tlb_flush_requests"] == 1
    assert list(guest.kvm.shadow.page_of.values()) == [guest.root()]
    kvm_set_memory_region(guest.rig.host, guest.kvm, SLOT, Gfn(0), GFNS, Hva(0))
    guest.enter()
    assert guest.fault(LINEAR) == RET_PF_FIXED


def test_the_oldest_pages_make_room(rig: Rig) -> None:
    with shadowed_guest(rig, mmu_pages=12) as guest, rig.counting(guest.kvm) as changed:
        for i in range(20):
            guest.map(LINEAR + (i << 21), 7 + i)
            assert guest.fault(LINEAR + (i << 21)) == RET_PF_FIXED
            assert guest.kvm.shadow.n_mmu_pages <= 12
        assert not rig.violations()
        left = guest.kvm.shadow.n_mmu_pages
    assert changed["mmu_recycled"] == changed["mmu_shadow_zapped"] > 0
    assert changed["mmu_cache_miss"] == changed["mmu_recycled"] + left


def test_a_guest_without_paging_has_four_roots_without_a_table(guest: ShadowedGuest) -> None:
    guest.vcpu.arch.cr0 &= ~X86_CR0_PG
    kvm_mmu_reset_context(guest.cpu, guest.vcpu)
    assert guest.fault(7 << 12, write=True, user=False) == RET_PF_FIXED
    assert guest.vcpu.mmu.root is not None
    assert guest.vcpu.mmu.root.sp is None
    assert is_writable_pte(guest.spte(7 << 12))


@pytest.mark.parametrize("answer", ["flush-then-free", "batch"])
def test_no_page_is_left_over(rig: Rig, answer: str) -> None:
    used = lib.frames_in_use(rig.machine.m, lib.FRAME_TABLE)
    with shadowed_guest(rig, policy=Policy(commit_zap=answer)) as guest:
        guest.map(LINEAR, 7)
        guest.fault(LINEAR)
        guest.vcpu.arch.cr0 &= ~X86_CR0_PG
        kvm_mmu_reset_context(guest.cpu, guest.vcpu)
        guest.fault(7 << 12, write=True, user=False)
        guest.vcpu.arch.cr0 |= X86_CR0_PG
        kvm_mmu_reset_context(guest.cpu, guest.vcpu)
        kvm_set_cr3(guest.cpu, guest.vcpu, GFNS << 12)
        guest.enter()
        rig.destroy(guest.kvm)
    assert lib.frames_in_use(rig.machine.m, lib.FRAME_TABLE) == used


def test_a_cr3_that_points_to_no_memory_has_a_dummy_root(guest: ShadowedGuest) -> None:
    kvm_set_cr3(guest.cpu, guest.vcpu, GFNS << 12)
    assert guest.fault(LINEAR) == RET_PF_INJECTED
    assert guest.vcpu.mmu.root is not None
    assert guest.vcpu.mmu.root.sp is None
    assert guest.vcpu.mmu.root.hfn == guest.kvm.shadow.dummy_root


def _delete_and_create(guest: ShadowedGuest) -> None:
    kvm_set_memory_region(guest.rig.host, guest.kvm, SLOT, Gfn(0), 0, Hva(0))
    kvm_set_memory_region(guest.rig.host, guest.kvm, SLOT, Gfn(0), GFNS, Hva(0))


@pytest.mark.parametrize("times", [1, 2])
def test_roots_of_an_older_generation_stay_obsolete(guest: ShadowedGuest, times: int) -> None:
    """mmu_valid_gen has two values; the roots are marked invalid besides, so that the second change does not
    make them valid again before their vCPU serves the request."""
    guest.map(LINEAR, 7)
    guest.fault(LINEAR)
    kvm_set_cr3(guest.cpu, guest.vcpu, 200 << 12)
    guest.enter()
    kvm_set_cr3(guest.cpu, guest.vcpu, 100 << 12)
    guest.enter()
    mmu = guest.vcpu.mmu
    roots = mmu_roots(mmu)
    assert [root.pgd >> 12 for root in roots] == [100, 200]
    used = guest.kvm.shadow.mmu_valid_gen
    for _ in range(times):
        _delete_and_create(guest)
    assert guest.kvm.shadow.mmu_valid_gen == (used + times) % 2
    assert [is_obsolete_root(guest.kvm, root) for root in roots] == [True, True]
    # A fault that had begun, and a switch to the cached root: neither may use an obsolete one.
    fault = KvmPageFault(LINEAR, lib.ACCESS_READ, present=False, is_tdp=False)
    assert is_page_fault_stale(guest.cpu, guest.vcpu, fault)
    kvm_set_cr3(guest.cpu, guest.vcpu, 200 << 12)
    assert kvm_test_request(guest.cpu, guest.vcpu, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS)
    assert kvm_check_request(guest.cpu, guest.vcpu, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS)
    kvm_mmu_free_obsolete_roots(guest.cpu, guest.vcpu)
    assert mmu_roots(mmu) == []
    assert not guest.kvm.shadow.page_of
    guest.enter()
    assert guest.root().mmu_valid_gen == guest.kvm.shadow.mmu_valid_gen
    assert not guest.rig.violations()
