"""Count what KVM does without EPT for one operation, as a recording of Linux 6.12 has it (64-bit guest)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from emulator.kvm.kvm_host import X86_CR0_WP, X86_CR4_PAE, X86_CR4_PGE, X86_CR4_PSE
from emulator.kvm.regs import kvm_mmu_invlpg, kvm_set_cr0, kvm_set_cr3, kvm_set_cr4
from emulator.kvm.smm import emulator_leave_smm, enter_smm
from emulator.kvm.tlb import kvm_service_local_tlb_flush_requests
from emulator.kvm.virt.kvm_main import kvm_set_memory_region
from tests.emulator.kvm.rig import GFNS, Rig
from tests.emulator.kvm.shadow_rig import ShadowedGuest, shadowed_guest

LINEAR = 0x7F00_0000_0000
SPARE, SPARE_GFN, SPARE_PAGES = 1, GFNS - 64, 64
SHOWN = ("mmu_load", "remote_tlb_flush_requests", "tlb_flush", "flush_current", "flush_guest")


@pytest.fixture
def guest(rig: Rig) -> Iterator[ShadowedGuest]:
    """The guest runs on slot 0, below a slot that comes and goes."""
    with shadowed_guest(rig, slot=False) as guest:
        kvm_set_memory_region(rig.host, guest.kvm, 0, 0, SPARE_GFN, 0)
        kvm_set_memory_region(rig.host, guest.kvm, SPARE, SPARE_GFN, SPARE_PAGES, SPARE_GFN)
        guest.map(LINEAR, 7)
        guest.map(LINEAR + (1 << 12), SPARE_GFN)
        guest.fault(LINEAR, write=True)
        guest.fault(LINEAR + (1 << 12), write=True)
        settle(guest)
        yield guest


def settle(guest: ShadowedGuest) -> None:
    """Do what the next entry does for the MMU and the TLB, in its order."""
    guest.enter()
    kvm_service_local_tlb_flush_requests(guest.cpu, guest.vcpu)


def toggle_cr0(guest: ShadowedGuest, bit: int) -> None:
    kvm_set_cr0(guest.cpu, guest.vcpu, guest.vcpu.arch.cr0 ^ bit)


def toggle_cr4(guest: ShadowedGuest, bit: int) -> None:
    kvm_set_cr4(guest.cpu, guest.vcpu, guest.vcpu.arch.cr4 ^ bit)


OPERATIONS: dict[str, tuple[Callable[[ShadowedGuest], object], dict[str, int]]] = {
    "CR0.WP": (lambda guest: toggle_cr0(guest, X86_CR0_WP), {"mmu_load": 1, "flush_current": 1}),
    "CR4.PSE": (lambda guest: toggle_cr4(guest, X86_CR4_PSE), {"mmu_load": 1, "flush_current": 1}),
    "CR4.PGE": (lambda guest: toggle_cr4(guest, X86_CR4_PGE), {"tlb_flush": 1, "flush_guest": 1}),
    "MOV to CR3": (
        lambda guest: kvm_set_cr3(guest.cpu, guest.vcpu, guest.vcpu.arch.cr3),
        {"tlb_flush": 1, "flush_current": 1},
    ),
    "INVLPG": (lambda guest: kvm_mmu_invlpg(guest.cpu, guest.vcpu, LINEAR), {}),
    # One flush frees the pages below the root, the other one the root, when its vCPU has left it.
    "a slot is deleted": (
        lambda guest: kvm_set_memory_region(guest.rig.host, guest.kvm, SPARE, 0, 0, 0),
        {"mmu_load": 1, "flush_current": 1, "remote_tlb_flush_requests": 2},
    ),
    "pages are unmapped": (
        lambda guest: guest.rig.unmap(guest.kvm, SPARE_GFN, SPARE_GFN + 8),
        {"remote_tlb_flush_requests": 1},
    ),
    "pages that are not mapped are unmapped": (
        lambda guest: guest.rig.unmap(guest.kvm, SPARE_GFN + 8, SPARE_GFN + 16),
        {},
    ),
}


@pytest.mark.parametrize(
    ("cr4", "by_pge"), [(X86_CR4_PAE, {}), (X86_CR4_PAE | X86_CR4_PGE, {"tlb_flush": 2, "flush_guest": 1})]
)
def test_an_smi_with_rsm_at_once(guest: ShadowedGuest, cr4: int, by_pge: dict[str, int]) -> None:
    """The recorded guest has CR4.PGE clear; restoring it takes another flush, as any write that sets it."""
    kvm_set_cr4(guest.cpu, guest.vcpu, cr4)
    settle(guest)
    with guest.rig.counting(guest.kvm) as changed:
        enter_smm(guest.cpu, guest.vcpu)
        settle(guest)
        emulator_leave_smm(guest.cpu, guest.vcpu)
        settle(guest)
    expected = {"mmu_load": 2, "tlb_flush": 1, "flush_current": 3} | by_pge
    assert {stat: n for stat, n in changed.items() if stat in SHOWN} == expected


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_operation(guest: ShadowedGuest, name: str) -> None:
    operation, expected = OPERATIONS[name]
    with guest.rig.counting(guest.kvm) as changed:
        operation(guest)
        settle(guest)
    assert {stat: n for stat, n in changed.items() if stat in SHOWN} == expected
