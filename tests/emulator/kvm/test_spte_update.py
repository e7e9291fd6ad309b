"""Flushes for changed leafs of the shadow MMU, since 6.13 and before (decision spte_update)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emulator.kvm.mmu.fault import RET_PF_FIXED, RET_PF_SPURIOUS
from emulator.kvm.mmu.shadow_spte import PT_ACCESSED_MASK, PT_DIRTY_MASK, mmu_spte_update, spte_of
from emulator.kvm.mmu.spte import PT_WRITABLE_MASK, SHADOW_MMU_WRITABLE_MASK
from emulator.kvm.regs import kvm_mmu_invlpg
from emulator.policy import Policy
from native.types import Gfn
from tests.emulator.kvm.rig import Rig
from tests.emulator.kvm.shadow_rig import PAGE, ShadowedGuest, W, shadowed_guest

LINEAR = 0x7F00_0000_0000
SINCE, BEFORE = "mmu-writable", "accessed-dirty"


@pytest.fixture(params=[SINCE, BEFORE])
def guest(rig: Rig, request: pytest.FixtureRequest) -> Iterator[ShadowedGuest]:
    with shadowed_guest(rig, policy=Policy(spte_update=request.param)) as guest:
        yield guest


def before_6_13(guest: ShadowedGuest) -> bool:
    return guest.kvm.policy.spte_update(guest.cpu, guest.kvm, Gfn(0)) == BEFORE


def remote_flushes(changed: dict[str, int]) -> int:
    return changed.get("remote_tlb_flush_requests", 0)


def test_a_fault_on_a_page_that_is_mapped_by_now(guest: ShadowedGuest) -> None:
    guest.map(LINEAR, 7)
    guest.fault(LINEAR, write=True)
    assert guest.spte(LINEAR) & PT_DIRTY_MASK
    with guest.rig.counting(guest.kvm) as changed:
        r = guest.fault(LINEAR, write=True)
    old = before_6_13(guest)
    assert (r, remote_flushes(changed)) == ((RET_PF_FIXED, 1) if old else (RET_PF_SPURIOUS, 0))
    assert bool(guest.spte(LINEAR) & PT_DIRTY_MASK) is not old


def test_rights_that_the_guest_gave_and_then_invalidated(guest: ShadowedGuest) -> None:
    """A sync of an SPTE that gains rights flushes only because the accessed flag goes."""
    table = guest.map(LINEAR, 7, PAGE & ~W)
    guest.fault(LINEAR)
    guest.map(0x5000, table)
    guest.fault(0x5000, write=True)
    assert guest.leaf(LINEAR).sp.unsync
    guest.write(table, 0, 7 << 12 | PAGE)
    with guest.rig.counting(guest.kvm) as changed:
        kvm_mmu_invlpg(guest.cpu, guest.vcpu, LINEAR)
    old = before_6_13(guest)
    assert guest.spte(LINEAR) & PT_WRITABLE_MASK
    assert remote_flushes(changed) == old
    assert bool(guest.spte(LINEAR) & PT_ACCESSED_MASK) is not old


@pytest.mark.parametrize(
    ("lost", "flushes_since", "flushed_before"),
    [
        (PT_ACCESSED_MASK, False, True),
        (PT_DIRTY_MASK, False, True),
        (PT_WRITABLE_MASK, False, True),
        (PT_WRITABLE_MASK | SHADOW_MMU_WRITABLE_MASK, True, True),
        (0, False, False),
    ],
)
def test_each_bit_that_an_spte_loses(
    guest: ShadowedGuest, lost: int, flushes_since: bool, flushed_before: bool
) -> None:
    guest.map(LINEAR, 7)
    guest.fault(LINEAR, write=True)
    sptep = guest.leaf(LINEAR)
    spte = spte_of(guest.cpu, sptep)
    assert spte & lost == lost
    flush = mmu_spte_update(guest.cpu, guest.kvm, sptep, Gfn(7), spte & ~lost)
    assert flush is (flushed_before if before_6_13(guest) else flushes_since)
