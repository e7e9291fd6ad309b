"""Guests in 32-bit mode whose tables KVM shadows: PAE paging, and two levels of 4-byte entries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emulator.kvm.kvm_host import (
    EFER_NX,
    KVM_REQ_MMU_SYNC,
    KVM_REQ_TLB_FLUSH_CURRENT,
    X86_CR0_PG,
    X86_CR4_PAE,
    X86_CR4_PSE,
)
from emulator.kvm.mmu.fault import RET_PF_FIXED, RET_PF_INJECTED
from emulator.kvm.mmu.roots import kvm_mmu_reset_context
from emulator.kvm.mmu.shadow_structs import ShadowPage
from emulator.kvm.mmu.spte import is_shadow_present_pte
from emulator.kvm.mmu.track_write import kvm_mmu_track_write
from emulator.kvm.regs import (
    kvm_mmu_invlpg,
    kvm_set_cr0,
    kvm_set_cr3,
    kvm_set_cr4,
    set_efer,
    set_sregs,
    sregs_of,
)
from emulator.kvm.virt.requests import kvm_check_request, kvm_test_request
from native.types import Gfn, Level
from tests.emulator.kvm.rig import GFNS, Rig
from tests.emulator.kvm.shadow_rig import PAGE, PS, TABLE, P, ShadowedGuest, U, W, shadowed_guest

DIRECTORY, LAST, OTHER_LAST = 100, 101, 102
LINEAR = 0xC030_0000  # the fourth GiB; of 4 MiB the second half
NX = 1 << 63


class Guest32(ShadowedGuest):
    """A guest with a page directory in gfn 100, and a last table in 101 for the 4 MiB that LINEAR is in."""

    def entry32(self, table: int, index: int) -> int:
        return self.entry(table, index // 2) >> index % 2 * 32 & 0xFFFFFFFF

    def write32(self, table: int, index: int, value: int) -> None:
        shift = index % 2 * 32
        word = self.entry(table, index // 2) & ~(0xFFFFFFFF << shift)
        self.write(table, index // 2, word | value << shift)

    def map32(self, linear: int, gfn: int, flags: int = PAGE, last: int = LAST) -> None:
        self.write32(DIRECTORY, linear >> 22, last << 12 | TABLE)
        self.write32(last, linear >> 12 & 1023, gfn << 12 | flags)

    def quarters(self) -> list[ShadowPage | None]:
        return self.vcpu.mmu.pae_root


@pytest.fixture
def guest(rig: Rig) -> Iterator[Guest32]:
    with shadowed_guest(rig, Guest32) as guest:
        assert isinstance(guest, Guest32)
        guest.vcpu.arch.efer = 0
        guest.vcpu.arch.cr4 = X86_CR4_PSE
        kvm_mmu_reset_context(guest.cpu, guest.vcpu)
        yield guest


@pytest.fixture
def pae(rig: Rig) -> Iterator[ShadowedGuest]:
    """A guest with PAE paging, whose PDPT leads to directories for the first and the fourth GiB."""
    with shadowed_guest(rig) as guest:
        guest.write(DIRECTORY, 0, 110 << 12 | P)
        guest.write(DIRECTORY, 3, 111 << 12 | P)
        guest.write(111, LINEAR >> 21 & 511, 112 << 12 | TABLE)
        guest.write(112, LINEAR >> 12 & 511, 7 << 12 | PAGE)
        guest.vcpu.arch.efer = 0
        guest.vcpu.arch.cr0 &= ~X86_CR0_PG
        kvm_mmu_reset_context(guest.cpu, guest.vcpu)
        assert kvm_set_cr0(guest.cpu, guest.vcpu, guest.vcpu.arch.cr0 | X86_CR0_PG)
        yield guest


def test_four_pages_shadow_the_quarters_of_a_page_directory(guest: Guest32) -> None:
    guest.map32(LINEAR, 7)
    assert guest.fault(LINEAR) == RET_PF_FIXED
    quarters = [sp for sp in guest.quarters() if sp is not None]
    assert [(sp.gfn, sp.role.level, sp.role.quadrant) for sp in quarters] == [(100, 2, i) for i in range(4)]
    assert guest.vcpu.mmu.root is not None
    assert guest.vcpu.mmu.root.sp is None
    # Of a last table each half has a page: LINEAR is in the second one.
    leaf = guest.leaf(LINEAR)
    assert (leaf.sp.gfn, leaf.sp.role.level, leaf.sp.role.quadrant) == (LAST, 1, 1)
    assert leaf.idx == LINEAR >> 12 & 511
    first_half = LINEAR - (1 << 21)
    guest.map32(first_half, 8)
    assert guest.fault(first_half) == RET_PF_FIXED
    assert guest.leaf(first_half).sp.role.quadrant == 0
    assert not guest.rig.violations()


def test_entries_of_four_bytes_get_their_flags_alone(guest: Guest32) -> None:
    guest.map32(LINEAR, 7, P | W | U)
    guest.map32(LINEAR + 4096, 8, P | W | U)
    assert guest.fault(LINEAR, write=True) == RET_PF_FIXED
    assert guest.entry32(LAST, LINEAR >> 12 & 1023) == 7 << 12 | PAGE
    assert guest.entry32(LAST, (LINEAR >> 12 & 1023) + 1) == 8 << 12 | P | W | U


def test_a_page_of_four_mebibytes_needs_pse(guest: Guest32) -> None:
    # Bits 35:32 of its address are bits 16:13 of the entry: here 0.
    guest.write32(DIRECTORY, LINEAR >> 22, 0 << 22 | PAGE | PS)
    assert guest.fault(LINEAR) == RET_PF_FIXED
    assert guest.leaf(LINEAR).sp.role.direct
    kvm_set_cr4(guest.cpu, guest.vcpu, 0)
    # The entry now points to a table in gfn 0, which maps nothing.
    assert guest.fault(LINEAR) == RET_PF_INJECTED


def test_the_upper_bits_of_a_large_page_are_in_the_entry(guest: Guest32) -> None:
    w = guest.vcpu.mmu.w
    assert w is not None
    assert w.fmt.gpte_to_gfn_lvl(0x12C00000 | PS | 3 << 13, Level(2)) == 0x12C00 + (3 << 20)
    assert w.fmt.gpte_to_gfn_lvl(0x12345000, Level(1)) == 0x12345


def test_an_unsync_half_of_a_table_is_synced_by_its_own_entries(guest: Guest32) -> None:
    guest.map32(LINEAR, 7)
    other = LINEAR + (1 << 22)
    guest.map32(other, LAST, last=OTHER_LAST)
    assert guest.fault(LINEAR) == RET_PF_FIXED
    assert guest.fault(other, write=True) == RET_PF_FIXED
    assert guest.leaf(LINEAR).sp.unsync
    guest.write32(LAST, LINEAR >> 12 & 1023, 9 << 12 | PAGE)
    kvm_set_cr3(guest.cpu, guest.vcpu, guest.vcpu.arch.cr3)
    assert kvm_test_request(guest.cpu, guest.vcpu, KVM_REQ_MMU_SYNC)
    guest.enter()
    assert not guest.leaf(LINEAR).sp.unsync
    assert not is_shadow_present_pte(guest.spte(LINEAR))
    # INVLPG finds the page below a quarter, too.
    assert guest.fault(LINEAR) == RET_PF_FIXED
    assert guest.fault(other, write=True, present=True) == RET_PF_FIXED
    guest.write32(LAST, LINEAR >> 12 & 1023, 0)
    kvm_mmu_invlpg(guest.cpu, guest.vcpu, LINEAR)
    assert not is_shadow_present_pte(guest.spte(LINEAR))


@pytest.mark.parametrize(("nbytes", "zapped"), [(4, 0), (8, 4)])
def test_a_store_to_a_directory_drops_both_halves(guest: Guest32, nbytes: int, zapped: int) -> None:
    guest.map32(LINEAR, 7)
    guest.map32(LINEAR - (1 << 21), 8)
    for address in (LINEAR, LINEAR - (1 << 21)):
        assert guest.fault(address) == RET_PF_FIXED
    with guest.rig.counting(guest.kvm) as changed:
        # 8 bytes are two entries: all pages that shadow the directory go.
        kvm_mmu_track_write(guest.cpu, guest.kvm, DIRECTORY << 12 | (LINEAR >> 22) * 4, nbytes)
    assert changed.get("mmu_shadow_zapped", 0) == zapped
    if not zapped:
        assert [guest.leaf(at).sp.role.level for at in (LINEAR, LINEAR - (1 << 21))] == [2, 2]


def test_a_root_of_32_bit_paging_is_never_cached(guest: Guest32) -> None:
    guest.map32(LINEAR, 7)
    guest.fault(LINEAR)
    before = guest.quarters()[:]
    with guest.rig.counting(guest.kvm) as changed:
        kvm_set_cr3(guest.cpu, guest.vcpu, 200 << 12)
        assert not any(guest.quarters())
        guest.enter()
        kvm_set_cr3(guest.cpu, guest.vcpu, DIRECTORY << 12)
        guest.enter()
    assert changed["mmu_load"] == 2
    assert "cached_roots" not in changed
    assert guest.quarters() == before
    assert not any(guest.vcpu.mmu.prev_roots)


def test_pae_paging_has_a_root_for_each_pdpte(pae: ShadowedGuest) -> None:
    assert pae.fault(LINEAR) == RET_PF_FIXED
    found = [(sp.gfn, sp.role.quadrant) if sp else None for sp in pae.vcpu.mmu.pae_root]
    assert found == [(110, 0), None, None, (111, 0)]
    # The second GiB has no PDPTE.
    assert pae.fault(1 << 30) == RET_PF_INJECTED


def test_pdptes_are_registers_until_cr3_is_loaded(pae: ShadowedGuest) -> None:
    assert pae.fault(LINEAR) == RET_PF_FIXED
    pae.write(DIRECTORY, 3, 0)
    pae.enter()
    assert pae.vcpu.mmu.pae_root[3] is not None
    assert is_shadow_present_pte(pae.spte(LINEAR))
    # The value of CR3 is the same.
    assert kvm_set_cr3(pae.cpu, pae.vcpu, DIRECTORY << 12)
    pae.enter()
    assert [sp is None for sp in pae.vcpu.mmu.pae_root] == [False, True, True, True]
    assert pae.fault(LINEAR) == RET_PF_INJECTED


@pytest.mark.parametrize("cr3", [GFNS << 12, 120 << 12])
def test_pdptes_that_cannot_be_loaded_are_a_fault(pae: ShadowedGuest, cr3: int) -> None:
    pae.write(120, 1, 110 << 12 | P | W)  # a reserved bit
    assert not kvm_set_cr3(pae.cpu, pae.vcpu, cr3)
    assert pae.vcpu.arch.cr3 == DIRECTORY << 12


def test_toggling_pae_changes_the_format_of_the_tables(guest: Guest32) -> None:
    guest.map32(LINEAR, 7)
    guest.fault(LINEAR)
    guest.write(DIRECTORY, 3, 111 << 12 | P)
    assert kvm_set_cr4(guest.cpu, guest.vcpu, X86_CR4_PAE | X86_CR4_PSE)
    assert kvm_test_request(guest.cpu, guest.vcpu, KVM_REQ_TLB_FLUSH_CURRENT)
    guest.write(111, LINEAR >> 21 & 511, 0x200 << 12 | PAGE | PS)
    assert guest.fault(LINEAR) == RET_PF_FIXED
    assert [sp.gfn for sp in guest.quarters() if sp] == [111]
    # The old pages stay in the hash, by a role of their own.
    assert {sp.role.has_4_byte_gpte for sp in guest.kvm.shadow.mmu_page_hash[Gfn(DIRECTORY)]} == {True}


def test_long_mode_needs_pae(rig: Rig) -> None:
    with shadowed_guest(rig) as guest:
        assert not kvm_set_cr4(guest.cpu, guest.vcpu, 0)
        assert guest.vcpu.arch.cr4 & X86_CR4_PAE
        assert not set_efer(guest.cpu, guest.vcpu, EFER_NX)
        guest.vcpu.arch.cr0 &= ~X86_CR0_PG
        guest.vcpu.arch.efer &= ~(1 << 10)
        guest.vcpu.arch.cr4 = 0
        assert not kvm_set_cr0(guest.cpu, guest.vcpu, guest.vcpu.arch.cr0 | X86_CR0_PG)


def test_without_nx_its_bit_is_reserved(rig: Rig) -> None:
    """A change of EFER.NX frees the roots, and pages that are mapped are not used by the old meaning."""
    with shadowed_guest(rig) as guest:
        guest.map(LINEAR, 7, PAGE | NX)
        assert guest.fault(LINEAR) == RET_PF_FIXED
        assert set_efer(guest.cpu, guest.vcpu, guest.vcpu.arch.efer & ~EFER_NX)
        assert guest.vcpu.mmu.root is None
        assert guest.fault(LINEAR) == RET_PF_INJECTED
        # The page and its root have the role that they had: KVM sets NX for itself.
        assert is_shadow_present_pte(guest.spte(LINEAR))


def test_sregs_bring_another_cr3_and_mode(rig: Rig) -> None:
    with shadowed_guest(rig) as guest:
        guest.map(LINEAR, 7)
        guest.fault(LINEAR)
        old = guest.root()
        sregs = sregs_of(guest.vcpu)
        set_sregs(guest.cpu, guest.vcpu, sregs._replace(cr3=200 << 12))
        assert guest.vcpu.mmu.root is None
        guest.enter()
        assert guest.root().gfn == 200
        assert old.root_count == 0
        # With other registers the same tables are read in another format, at once.
        mode = sregs._replace(cr4=X86_CR4_PSE, efer=0)
        set_sregs(guest.cpu, guest.vcpu, mode)
        guest.write(100, (LINEAR >> 22) // 2, 0)
        assert guest.fault(LINEAR & 0xFFFFFFFF) == RET_PF_INJECTED
        assert [sp.role.quadrant for sp in guest.vcpu.mmu.pae_root if sp] == [0, 1, 2, 3]
        kvm_check_request(guest.cpu, guest.vcpu, KVM_REQ_MMU_SYNC)
