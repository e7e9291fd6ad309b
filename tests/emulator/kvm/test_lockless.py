"""Walks over shadow pages without mmu_lock: the mode of the walker's vCPU, and fast faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emulator.kvm.kvm_host import (
    KVM_MEM_LOG_DIRTY_PAGES,
    OUTSIDE_GUEST_MODE,
    READING_SHADOW_PAGE_TABLES,
    X86_CR0_PG,
)
from emulator.kvm.mmu.fault import RET_PF_FIXED, RET_PF_SPURIOUS, RET_PF_WRITE_PROTECTED
from emulator.kvm.mmu.lockless import for_each_shadow_entry_lockless, walk_shadow_page_lockless
from emulator.kvm.mmu.spte import is_writable_pte
from emulator.kvm.mmu.tdp_iter import Entry
from emulator.kvm.regs import kvm_set_cr0
from emulator.kvm.virt.kvm_main import kvm_set_memory_region, kvm_vm_ioctl_get_dirty_log
from emulator.machine.runtime import Cpu
from native import lib
from native.types import Gfn, Hva
from tests.emulator.kvm.rig import GFNS, SLOT, Rig
from tests.emulator.kvm.shadow_rig import ShadowedGuest, shadowed_guest

LINEAR = 0x7F00_0000_0000
ADDR = 5 << 12


@pytest.fixture
def guest(rig: Rig) -> Iterator[ShadowedGuest]:
    """A guest with paging, which maps LINEAR."""
    with shadowed_guest(rig) as guest:
        guest.map(LINEAR, 7)
        yield guest


@pytest.fixture
def direct(guest: ShadowedGuest) -> ShadowedGuest:
    """The guest without paging, with a page that was writable before its slot was logged."""
    kvm_set_cr0(guest.cpu, guest.vcpu, guest.vcpu.arch.cr0 & ~X86_CR0_PG)
    assert guest.fault(ADDR, write=True) == RET_PF_FIXED
    log(guest)
    return guest


def log(guest: ShadowedGuest) -> None:
    kvm_set_memory_region(guest.rig.host, guest.kvm, SLOT, Gfn(0), GFNS, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)


def mode_at_points(guest: ShadowedGuest) -> list[tuple[str, int, bool]]:
    """Note each ordering point of the guest's CPU: kind, the vCPU's mode, and whether interrupts are off."""
    seen: list[tuple[str, int, bool]] = []

    def hook(cpu: Cpu, kind: str, obj: object, mode: str) -> None:
        if cpu is guest.cpu:
            seen.append((kind, lib.vcpu_mode(cpu.m, guest.vcpu.id), bool(lib.irqs_disabled(cpu.m, cpu.id))))

    guest.rig.machine.install(hook)
    return seen


def walked(guest: ShadowedGuest, addr: int) -> list[Entry]:
    with walk_shadow_page_lockless(guest.cpu, guest.vcpu):
        return list(for_each_shadow_entry_lockless(guest.cpu, guest.vcpu, addr))


READS = ("sptes", READING_SHADOW_PAGE_TABLES, True)
SECTION = [
    ("mode", OUTSIDE_GUEST_MODE, True),
    ("smp_mb", READING_SHADOW_PAGE_TABLES, True),
]


def test_a_walk_is_announced_and_takes_no_interrupt(guest: ShadowedGuest) -> None:
    """The barrier stands between the store of the mode and the first read of an SPTE."""
    guest.fault(LINEAR)
    seen = mode_at_points(guest)
    found = walked(guest, LINEAR)
    guest.rig.machine.install(None)
    assert seen == [*SECTION, *[READS] * 4, ("mode", READING_SHADOW_PAGE_TABLES, True)]
    assert lib.vcpu_mode(guest.cpu.m, guest.vcpu.id) == OUTSIDE_GUEST_MODE
    assert not lib.irqs_disabled(guest.cpu.m, guest.cpu.id)
    last = guest.leaf(LINEAR)
    assert [entry.level for entry in found] == [4, 3, 2, 1]
    assert (found[-1].table, found[-1].index, found[-1].spte) == (last.sp.hfn, last.idx, guest.spte(LINEAR))


def test_a_walk_ends_where_nothing_is_mapped(guest: ShadowedGuest) -> None:
    guest.enter()
    found = walked(guest, LINEAR)
    assert [(entry.level, entry.spte) for entry in found] == [(4, 0)]


def test_a_fast_fault_without_paging_takes_no_lock(direct: ShadowedGuest) -> None:
    assert not is_writable_pte(direct.spte(ADDR))
    seen = mode_at_points(direct)
    assert direct.fault(ADDR, write=True, present=True) == RET_PF_FIXED
    direct.rig.machine.install(None)
    assert is_writable_pte(direct.spte(ADDR))
    assert "mmu_lock" not in [kind for kind, *_ in seen]
    assert ("spte", READING_SHADOW_PAGE_TABLES, True) in seen
    marked = kvm_vm_ioctl_get_dirty_log(direct.rig.host, direct.kvm, SLOT)
    assert marked is not None
    assert direct.fault(ADDR, write=True, present=True) == RET_PF_FIXED
    assert direct.fault(ADDR, write=True, present=True) == RET_PF_SPURIOUS


def test_a_fault_on_the_shadow_of_a_table_takes_the_lock(guest: ShadowedGuest) -> None:
    """The gfn that such an SPTE maps may change, so that KVM would mark another page dirty."""
    assert guest.fault(LINEAR, write=True) == RET_PF_FIXED
    log(guest)
    seen = mode_at_points(guest)
    assert guest.fault(LINEAR, write=True, present=True) == RET_PF_FIXED
    guest.rig.machine.install(None)
    assert "mmu_lock" in [kind for kind, *_ in seen]
    assert not [one for one in seen if one[1] == READING_SHADOW_PAGE_TABLES]


def test_a_store_to_a_tracked_table_clears_its_flooding_count_without_the_lock(guest: ShadowedGuest) -> None:
    other = LINEAR + (1 << 12)
    guest.map(other, 102)
    guest.fault(LINEAR)
    assert guest.fault(other) == RET_PF_FIXED
    tables = [entry.table for entry in walked(guest, other)]
    for table in tables:
        guest.kvm.shadow.page_of[table].write_flooding_count = 2
    seen = mode_at_points(guest)
    assert guest.fault(other, write=True, present=True) == RET_PF_WRITE_PROTECTED
    guest.rig.machine.install(None)
    assert [guest.kvm.shadow.page_of[table].write_flooding_count for table in tables] == [0] * 4
    assert seen.count(READS) == 4
    assert "mmu_lock" not in [kind for kind, *_ in seen]
