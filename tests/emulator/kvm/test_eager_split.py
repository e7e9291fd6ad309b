"""Huge pages that are split before write faults meet them, and the lock that their tables are allocated
under."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emulator.kvm.kvm_host import (
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES,
)
from emulator.kvm.mmu.roots import kvm_mmu_after_set_cpuid
from emulator.kvm.mmu.spte import is_large_pte, is_writable_pte, root_to_sp
from emulator.kvm.mmu.tdp_map import tdp_entry
from emulator.kvm.structs import Vcpu
from emulator.kvm.virt.kvm_main import kvm_set_memory_region, kvm_vm_ioctl_clear_dirty_log
from emulator.machine.runtime import READ, WRITE, Cpu, rcu_read_lock
from emulator.points import PointKind
from emulator.policy import preset
from native import lib
from native.types import Gfn, Hfn, Hva, Level
from tests.emulator.kvm.rig import GFNS, SLOT, Guest, Rig, at_point

HELD = {"linux-7.3": (0, False), "linux-6.12": (0, False), "linux-5.18": (1, True)}


def huge(rig: Rig, name: str, initially_set: bool = False) -> Guest:
    """A guest with a huge page from gfn 0 on, and one from gfn 512 on."""
    kvm = rig.vm(preset(name), tdp_level=5)
    if initially_set:
        kvm.dirty_log_manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET
    guest = rig.guest(kvm)
    for gfn in (0, 512):
        guest.write(0, gfn)
        rig.collapse(kvm, gfn)
        guest.write(0, gfn)
        assert is_large_pte(spte_of(rig, guest.vcpu, gfn, 2))
    rig.rcu()
    return guest


def spte_of(rig: Rig, vcpu: Vcpu, gfn: int, level: int) -> int:
    root = root_to_sp(vcpu.mmu.root)
    assert root is not None
    with rcu_read_lock(rig.other):
        return tdp_entry(rig.other, root, Gfn(gfn), Level(level)).spte


def arm(rig: Rig, guest: Guest) -> None:
    kvm_set_memory_region(rig.host, guest.vcpu.kvm, SLOT, Gfn(0), GFNS, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)


def clear(rig: Rig, guest: Guest) -> None:
    """Clear the marks of two words in each huge page."""
    words = [0] * (GFNS // 64)
    words[0] = words[8] = 1
    kvm_vm_ioctl_clear_dirty_log(rig.host, guest.vcpu.kvm, SLOT, 0, GFNS, words)


def tables(rig: Rig) -> int:
    return int(lib.frames_in_use(rig.machine.m, lib.FRAME_TABLE))


@pytest.mark.parametrize(("how", "initially_set", "lock"), [(arm, False, READ), (clear, True, WRITE)])
@pytest.mark.parametrize("name", HELD)
def test_locks_are_dropped_for_a_table_since_6_12(
    rig: Rig, name: str, how: Callable[[Rig, Guest], None], initially_set: bool, lock: int
) -> None:
    guest = huge(rig, name, initially_set)
    if initially_set:
        arm(rig, guest)
    held, before = list[tuple[int, bool]](), tables(rig)

    def hook(at: Cpu, kind: PointKind, obj: object, mode: str) -> None:
        if kind == "frames":
            held.append((at.mmu_lock_held, at.rcu_depth > 0))

    rig.host.hook = hook
    how(rig, guest)
    rig.host.hook = None
    locked, in_rcu = HELD[name]
    assert held == [(locked * lock, in_rcu)] * 2, "once for each huge page"
    assert tables(rig) == before + 2
    for gfn in (0, 512):
        assert not is_writable_pte(spte_of(rig, guest.vcpu, gfn, 1))
    guest.write(0, 0)
    assert rig.violations() == {}


def test_a_page_that_goes_while_its_table_is_allocated_is_not_split(rig: Rig) -> None:
    """The mmu_notifier finds mmu_lock free.  The table serves the next huge page."""
    guest = huge(rig, "linux-7.3")
    before, kvm = tables(rig), guest.vcpu.kvm

    def unmap() -> None:
        hook, rig.host.hook = rig.host.hook, None
        rig.unmap(kvm, 0, 512)
        rig.host.hook = hook

    allocations: list[int] = []

    def hook(at: Cpu, kind: PointKind, obj: object, mode: str) -> None:
        if kind == "frames":
            allocations.append(at.mmu_lock_held)
            if len(allocations) == 1:
                unmap()

    rig.host.hook = hook
    arm(rig, guest)
    rig.host.hook = None
    assert allocations == [0]
    assert tables(rig) == before + 1
    assert spte_of(rig, guest.vcpu, 0, 2) == 0
    assert not is_large_pte(spte_of(rig, guest.vcpu, 512, 1))
    guest.write(0, 0)
    assert rig.violations() == {}


def test_a_table_that_is_not_needed_is_freed(rig: Rig) -> None:
    guest = huge(rig, "linux-7.3")
    kvm = guest.vcpu.kvm
    rig.unmap(kvm, 512, 1024)
    rig.rcu()
    before = tables(rig)
    with at_point(rig, rig.host.id, "frames", "write", lambda: rig.unmap(kvm, 0, 512)):
        arm(rig, guest)
    assert tables(rig) == before


def test_a_log_is_cleared_while_a_table_is_allocated(rig: Rig) -> None:
    """Marks have been cleared, and nothing is write-protected yet, when mmu_lock is free: a vCPU that writes
    leaves no mark, but the caller's flush is still to come, and user space reads the page after that."""
    guest = huge(rig, "linux-7.3", initially_set=True)
    arm(rig, guest)
    slot = guest.vcpu.kvm.memslots[0].slots[0]
    assert slot.dirty_bitmap is not None
    seen: list[tuple[int, bool]] = []

    def writes() -> None:
        assert slot.dirty_bitmap is not None
        seen.append((slot.dirty_bitmap[0], is_writable_pte(spte_of(rig, guest.vcpu, 0, 2))))
        guest.write(0, 0)

    with at_point(rig, rig.host.id, "frames", "write", writes):
        clear(rig, guest)
    assert seen == [(0, True)]
    assert slot.dirty_bitmap[0] == 0
    guest.write(0, 0)
    assert slot.dirty_bitmap[0] == 1
    assert rig.violations() == {}


@pytest.mark.parametrize("name", HELD)
def test_no_other_root_is_tried_without_table_pages(rig: Rig, name: str) -> None:
    """The reference on the root where the walk ended is put.  5.18 asks twice, under mmu_lock and without."""
    guest = huge(rig, name)
    kvm = guest.vcpu.kvm
    other = rig.guest(kvm)
    kvm_mmu_after_set_cpuid(rig.host, other.vcpu, 48)
    other.write(1, 0)
    references = [(root, root.tdp_mmu_root_count.value) for root in kvm.tdp_mmu_roots]
    assert [root.role.level for root, _ in references] == [4, 5]
    assert is_large_pte(spte_of(rig, other.vcpu, 0, 2))
    taken = list[Hfn]()
    while (table := lib.ept_table_alloc(rig.machine.m, rig.other.id, lib.FRAME_TABLE)) >= 0:
        taken.append(Hfn(table))
    asked: list[int] = []

    def hook(at: Cpu, kind: PointKind, obj: object, mode: str) -> None:
        if kind == "frames":
            asked.append(at.mmu_lock_held)

    rig.host.hook = hook
    arm(rig, guest)
    rig.host.hook = None
    assert asked == ([READ, 0] if name == "linux-5.18" else [0])
    assert [(root, root.tdp_mmu_root_count.value) for root in kvm.tdp_mmu_roots] == references
    assert rig.host.rcu_depth == rig.host.mmu_lock_held == 0
    assert is_large_pte(spte_of(rig, guest.vcpu, 0, 2)), "left to the write fault"
    assert not is_writable_pte(spte_of(rig, guest.vcpu, 0, 2))
    for table in taken:
        lib.ept_table_free(rig.machine.m, rig.other.id, Hfn(table))
    guest.write(0, 0)
    assert not is_large_pte(spte_of(rig, guest.vcpu, 0, 1))
    assert rig.violations() == {}
