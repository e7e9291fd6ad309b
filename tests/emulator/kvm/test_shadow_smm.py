"""SMM without EPT: roots and write tracking of the two address spaces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emulator.kvm.kvm_host import X86_CR4_PAE, X86_CR4_PGE
from emulator.kvm.mmu.fault import RET_PF_FIXED, RET_PF_WRITE_PROTECTED
from emulator.kvm.mmu.shadow_structs import ShadowPage
from emulator.kvm.mmu.spte import is_writable_pte
from emulator.kvm.regs import kvm_set_cr4
from emulator.kvm.smm import emulator_leave_smm, enter_smm
from emulator.kvm.tlb import kvm_service_local_tlb_flush_requests
from emulator.kvm.virt.slots import gfn_to_memslot
from native.types import Gfn
from tests.emulator.kvm.rig import Rig
from tests.emulator.kvm.shadow_rig import ShadowedGuest, shadowed_guest

LINEAR = 0x7F00_0000_0000


@pytest.fixture
def guest(rig: Rig) -> Iterator[ShadowedGuest]:
    with shadowed_guest(rig) as guest:
        rig.smm_slots(guest.kvm)
        guest.map(LINEAR, 7)
        yield guest


def pae_roots(guest: ShadowedGuest) -> list[ShadowPage]:
    return [sp for sp in guest.vcpu.mmu.pae_root if sp is not None]


def test_smm_has_pae_roots_of_its_own_and_rsm_finds_the_old_root(guest: ShadowedGuest) -> None:
    guest.fault(LINEAR)
    normal = guest.root()
    enter_smm(guest.cpu, guest.vcpu)
    assert guest.fault(5 << 12) == RET_PF_FIXED
    roots = pae_roots(guest)
    assert [(sp.gfn, sp.role.smm, sp.role.direct, sp.role.level) for sp in roots] == [
        (quarter << 18, 1, True, 2) for quarter in range(4)
    ]
    emulator_leave_smm(guest.cpu, guest.vcpu)
    guest.enter()
    assert guest.root() is normal
    assert (normal.role.smm, normal.role.direct, normal.role.cr0_wp) == (0, False, True)
    assert pae_roots(guest) == []
    # The pages of SMM stay in the hash; the next SMI finds them.
    enter_smm(guest.cpu, guest.vcpu)
    guest.enter()
    assert pae_roots(guest) == roots


@pytest.mark.parametrize("mapped_before", [False, True])
def test_a_store_of_smm_to_a_table_of_the_guest_is_emulated(
    guest: ShadowedGuest, mapped_before: bool
) -> None:
    """The table is tracked in the other address space's memslot: a fault of SMM asks there as well."""
    guest.fault(LINEAR)
    upper = guest.vcpu.arch.cr3 >> 12
    enter_smm(guest.cpu, guest.vcpu)
    if mapped_before:
        assert guest.fault(upper << 12) == RET_PF_FIXED
        assert not is_writable_pte(guest.spte(upper << 12))
    assert guest.fault(upper << 12, write=True, present=mapped_before) == RET_PF_WRITE_PROTECTED
    assert not is_writable_pte(guest.spte(upper << 12))


def test_a_last_table_becomes_unsync_by_a_store_of_smm(guest: ShadowedGuest) -> None:
    table = guest.map(LINEAR, 7)
    guest.fault(LINEAR)
    shadow = guest.leaf(LINEAR).sp
    enter_smm(guest.cpu, guest.vcpu)
    assert guest.fault(table << 12, write=True) == RET_PF_FIXED
    assert shadow.unsync
    slot = gfn_to_memslot(guest.cpu, guest.kvm, Gfn(table), 1)
    assert slot is not None
    assert not slot.arch.disallow_lpage  # those are in the slot of the shadow page's role


def test_rsm_that_sets_pge_flushes_for_it_as_any_write_does(guest: ShadowedGuest) -> None:
    """The counts of an SMI without CR4.PGE are recorded (tests/fidelity); here its flush comes on top."""
    kvm_set_cr4(guest.cpu, guest.vcpu, X86_CR4_PAE | X86_CR4_PGE)
    settle(guest)
    with guest.rig.counting(guest.kvm) as changed:
        enter_smm(guest.cpu, guest.vcpu)
        settle(guest)
        emulator_leave_smm(guest.cpu, guest.vcpu)
        settle(guest)
    expected = {"mmu_load": 2, "tlb_flush": 2, "flush_current": 3, "flush_guest": 1}
    assert {stat: n for stat, n in changed.items() if stat in expected or "remote" in stat} == expected


def settle(guest: ShadowedGuest) -> None:
    """Serve the MMU and the TLB as the next entry does, in its order."""
    guest.enter()
    kvm_service_local_tlb_flush_requests(guest.cpu, guest.vcpu)
