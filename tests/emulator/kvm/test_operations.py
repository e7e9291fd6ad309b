"""The counts and the remains of each operation, on two vCPUs that one thread drives."""

from __future__ import annotations

import pytest

from emulator.kvm.kvm_host import (
    HALTED,
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES,
    PREEMPTIBLE,
    RESCHED,
    ExitToUser,
)
from emulator.kvm.mmu.mmu import kvm_zap_gfn_range
from emulator.kvm.structs import Kvm
from emulator.kvm.virt.kvm_main import (
    kvm_set_memory_region,
    kvm_vm_ioctl_clear_dirty_log,
    kvm_vm_ioctl_enable_manual_dirty_log,
    kvm_vm_ioctl_get_dirty_log,
)
from emulator.policy import Policy, preset
from native import lib
from native.types import FrameKind, Gfn, Hfn, Hva
from tests.emulator.kvm.rig import GFNS, SLOT, Guest, Rig

# Counts that these tests are about.
FLUSHES = (
    "remote_tlb_flush_requests",
    "make_all_cpus_request",
    "mmu_load",
    "tlb_flush",
    "flush_all",
    "flush_current",
    "flush_guest",
)


def two_guests(rig: Rig, kvm: Kvm, *gfns: int) -> list[Guest]:
    guests = [rig.guest(kvm), rig.guest(kvm)]
    for pcpu, guest in enumerate(guests):
        for gfn in (*gfns, 2048):
            guest.write(pcpu, gfn)
    return guests


def enter_all(guests: list[Guest]) -> None:
    """Every vCPU enters again, and so services its requests."""
    for guest in guests:
        assert guest.on is not None
        guest.read(guest.on.id, 2048)


def flushes(counts: dict[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in FLUSHES if name in counts}


def set_slot(rig: Rig, kvm: Kvm, npages: int = GFNS, flags: int = 0) -> None:
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), npages, Hva(0), flags)


REMOTE = {"remote_tlb_flush_requests": 1, "make_all_cpus_request": 1, "tlb_flush": 2, "flush_all": 2}


def test_first_entry(rig: Rig) -> None:
    kvm = rig.vm()
    guest = rig.guest(kvm)
    with rig.counting(kvm) as counts:
        guest.read(0, 5)
    assert flushes(counts) == {
        "mmu_load": 1,
        "tlb_flush": 2,
        "flush_all": 1,
        "flush_current": 1,
        "flush_guest": 1,
    }


def test_unmap_flushes_once_if_something_was_mapped(rig: Rig) -> None:
    kvm = rig.vm()
    guests = two_guests(rig, kvm, 5, 6)
    with rig.counting(kvm) as counts:
        rig.unmap(kvm, 0, 64)
        enter_all(guests)
    assert flushes(counts) == REMOTE
    with rig.counting(kvm) as counts:
        rig.unmap(kvm, 0, 64)
        enter_all(guests)
    assert flushes(counts) == {}


@pytest.mark.parametrize("single", [False, True])
def test_unmap_flushes_once_more_per_yield_with_a_flush_pending(rig: Rig, single: bool) -> None:
    kvm = rig.vm(chunk=32, single=single, resched_chunks=1)
    guests = two_guests(rig, kvm, 5, 100)
    with rig.counting(kvm) as counts:
        rig.unmap(kvm, 0, 128)
        enter_all(guests)
    # Four chunks: pages 5 and 100 lie in the first and in the last, the yields in between.
    assert counts["yields"] == 3
    assert counts["remote_tlb_flush_requests"] == 2


def test_memory_that_no_slot_maps_needs_nothing(rig: Rig) -> None:
    kvm = rig.vm(slot=False)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), 64, Hva(0))
    with rig.counting(kvm) as counts:
        rig.unmap(kvm, 64, 128)
    assert counts == {}


def test_mprotect_and_back(rig: Rig) -> None:
    kvm = rig.vm()
    guests = two_guests(rig, kvm, 5)
    with rig.counting(kvm) as counts:
        rig.protect(kvm, 0, 64, writable=0)
        enter_all(guests)
    assert flushes(counts) == REMOTE
    assert guests[0].read(0, 5) is RESCHED
    assert guests[0].write(0, 5) == ExitToUser("fault", 5 << 12, True)
    rig.protect(kvm, 0, 64, writable=1)
    assert guests[0].write(0, 5) is RESCHED
    assert rig.violations() == {}


def test_slot_delete_and_create(rig: Rig) -> None:
    kvm = rig.vm()
    guests = two_guests(rig, kvm, 5)
    with rig.counting(kvm) as counts:
        set_slot(rig, kvm, npages=0)
        set_slot(rig, kvm)
        enter_all(guests)
    assert flushes(counts) == {"make_all_cpus_request": 1, "mmu_load": 2, "flush_current": 2}
    assert guests[0].vcpu.mmu.root == guests[1].vcpu.mmu.root
    assert len(kvm.tdp_mmu_roots) == 1


def test_slot_delete_by_leafs(rig: Rig) -> None:
    kvm = rig.vm(Policy(slot_delete="zap-slot-leafs"))
    guests = two_guests(rig, kvm, 5)
    with rig.counting(kvm) as counts:
        set_slot(rig, kvm, npages=0)
        set_slot(rig, kvm)
        enter_all(guests)
    assert flushes(counts) == REMOTE


def test_mmio(rig: Rig) -> None:
    kvm = rig.vm(slot=False)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), 64, Hva(0))
    guest = rig.guest(kvm)
    assert guest.write(0, 100) == ExitToUser("mmio", 100 << 12, True)
    assert guest.read(0, 5) is RESCHED


@pytest.mark.parametrize("name", ["linux-7.3", "linux-6.12"])
def test_dirty_log(rig: Rig, name: str) -> None:
    kvm = rig.vm(preset(name))
    guests = two_guests(rig, kvm, 5, 70)
    with rig.counting(kvm) as counts:
        set_slot(rig, kvm, flags=KVM_MEM_LOG_DIRTY_PAGES)
        enter_all(guests)
    assert flushes(counts) == REMOTE
    assert not any(kvm_vm_ioctl_get_dirty_log(rig.host, kvm, SLOT))

    with rig.counting(kvm) as counts:
        guests[0].write(0, 5)
        guests[1].write(1, 70)
        guests[1].read(1, 6)
    assert flushes(counts) == {}
    with rig.counting(kvm) as counts:
        words = kvm_vm_ioctl_get_dirty_log(rig.host, kvm, SLOT)
        enter_all(guests)
    # A page that was read is mapped writable, too, and so counts as dirty.
    assert (words[0], words[1]) == (1 << 5 | 1 << 6, 1 << (70 - 64))
    assert flushes(counts) == REMOTE
    guests[0].write(0, 5)
    assert kvm_vm_ioctl_get_dirty_log(rig.host, kvm, SLOT)[0] == 1 << 5
    enter_all(guests)

    with rig.counting(kvm) as counts:
        set_slot(rig, kvm)
        enter_all(guests)
    assert flushes(counts) == {}
    assert rig.violations() == {}


def test_dirty_log_with_manual_protect(rig: Rig) -> None:
    kvm = rig.vm()
    flags = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET
    kvm_vm_ioctl_enable_manual_dirty_log(rig.host, kvm, flags)
    guests = two_guests(rig, kvm, 5)
    with rig.counting(kvm) as counts:
        set_slot(rig, kvm, flags=KVM_MEM_LOG_DIRTY_PAGES)
        words = kvm_vm_ioctl_get_dirty_log(rig.host, kvm, SLOT)
        enter_all(guests)
    assert words == [(1 << 64) - 1] * (GFNS // 64)
    assert flushes(counts) == {}
    with rig.counting(kvm) as counts:
        kvm_vm_ioctl_clear_dirty_log(rig.host, kvm, SLOT, 0, GFNS, words)
        enter_all(guests)
    assert flushes(counts) == REMOTE
    with rig.counting(kvm) as counts:
        kvm_vm_ioctl_clear_dirty_log(rig.host, kvm, SLOT, 0, 64, words[:1])
        enter_all(guests)
    assert flushes(counts) == {}
    guests[0].write(0, 5)
    assert kvm_vm_ioctl_get_dirty_log(rig.host, kvm, SLOT)[0] == 1 << 5
    assert rig.violations() == {}


@pytest.mark.parametrize(("name", "recovery"), [("linux-7.3", 1), ("linux-6.12", 2)])
def test_huge_pages_split_and_come_back(rig: Rig, name: str, recovery: int) -> None:
    kvm = rig.vm(preset(name))
    guests = two_guests(rig, kvm, 1024, 1536)
    rig.collapse(kvm, 1024)
    rig.collapse(kvm, 1536)
    with rig.counting(kvm) as counts:
        for gfn in (1024, 1536):
            guests[0].write(0, gfn)
    # The leaf replaces the table.
    assert counts["remote_tlb_flush_requests"] == 2
    rig.rcu()
    tables = lib.frames_in_use(rig.machine.m, lib.FRAME_TABLE)
    with rig.counting(kvm) as counts:
        set_slot(rig, kvm, flags=KVM_MEM_LOG_DIRTY_PAGES)
        enter_all(guests)
    assert flushes(counts) == REMOTE
    assert lib.frames_in_use(rig.machine.m, lib.FRAME_TABLE) == tables + 2
    guests[0].write(0, 1024)
    assert kvm_vm_ioctl_get_dirty_log(rig.host, kvm, SLOT)[16] == 1
    enter_all(guests)
    with rig.counting(kvm) as counts:
        set_slot(rig, kvm)
        enter_all(guests)
    assert counts["remote_tlb_flush_requests"] == recovery
    guests[0].write(0, 1030)
    guests[1].write(1, 1540)
    rig.rcu()
    assert lib.frames_in_use(rig.machine.m, lib.FRAME_TABLE) == tables
    assert rig.violations() == {}


def test_huge_pages_are_split_by_the_fault_that_logs_them(rig: Rig) -> None:
    kvm = rig.vm(eager_page_split=False)
    guest = rig.guest(kvm)
    guest.write(0, 1024)
    rig.collapse(kvm, 1024)
    guest.write(0, 1024)
    set_slot(rig, kvm, flags=KVM_MEM_LOG_DIRTY_PAGES)
    guest.write(0, 1025)
    assert kvm_vm_ioctl_get_dirty_log(rig.host, kvm, SLOT)[16] == 2
    guest.write(0, 1025)
    guest.write(0, 1026)
    assert kvm_vm_ioctl_get_dirty_log(rig.host, kvm, SLOT)[16] == 6
    assert rig.violations() == {}


PAST = ["linux-7.3", "linux-6.12", "linux-5.18", "linux-5.14"]


@pytest.mark.parametrize("name", PAST)
def test_a_huge_page_that_a_fault_splits_is_flushed_before_6_2(rig: Rig, name: str) -> None:
    """On two huge pages a real 6.1 made three requests: one when logging was armed, and one for each."""
    kvm = rig.vm(preset(name), eager_page_split=False)
    guests = two_guests(rig, kvm, 1024, 1536)
    for gfn in (1024, 1536):
        rig.collapse(kvm, gfn)
        guests[0].write(0, gfn)
    before_6_2 = name in ("linux-5.18", "linux-5.14")
    with rig.counting(kvm) as counts:
        set_slot(rig, kvm, flags=KVM_MEM_LOG_DIRTY_PAGES)
        for gfn in (1025, 1537):
            guests[0].write(0, gfn)
            guests[1].write(1, gfn + 1)
    assert counts["remote_tlb_flush_requests"] == (3 if before_6_2 else 1)
    # Where the huge page was zapped, each page of it faults again.
    assert counts["faults"] == 4
    assert kvm_vm_ioctl_get_dirty_log(rig.host, kvm, SLOT)[16] == 0b110
    with rig.counting(kvm) as counts:
        guests[0].read(0, 1030)
    assert counts.get("faults", 0) == (1 if before_6_2 else 0)
    assert rig.violations() == {}


@pytest.mark.parametrize("name", PAST)
@pytest.mark.parametrize("manual", [False, True])
def test_huge_pages_are_split_before_they_are_written_to_since_5_18(
    rig: Rig, name: str, manual: bool
) -> None:
    kvm = rig.vm(preset(name))
    if manual:
        kvm_vm_ioctl_enable_manual_dirty_log(
            rig.host, kvm, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET
        )
    guest = rig.guest(kvm)
    guest.write(0, 1024)
    rig.collapse(kvm, 1024)
    guest.write(0, 1024)
    rig.rcu()
    tables = lib.frames_in_use(rig.machine.m, lib.FRAME_TABLE)
    set_slot(rig, kvm, flags=KVM_MEM_LOG_DIRTY_PAGES)
    if manual:
        kvm_vm_ioctl_clear_dirty_log(rig.host, kvm, SLOT, 1024, 64, [(1 << 64) - 1])
    eagerly = name != "linux-5.14"
    assert lib.frames_in_use(rig.machine.m, lib.FRAME_TABLE) == tables + eagerly
    with rig.counting(kvm) as counts:
        guest.write(0, 1025)
    assert counts.get("remote_tlb_flush_requests", 0) == (0 if eagerly else 1)
    assert kvm_vm_ioctl_get_dirty_log(rig.host, kvm, SLOT)[16] & 0b10
    assert rig.violations() == {}


def test_zap_gfn_range(rig: Rig) -> None:
    kvm = rig.vm()
    guests = two_guests(rig, kvm, 5)
    with rig.counting(kvm) as counts:
        kvm_zap_gfn_range(rig.host, kvm, Gfn(0), Gfn(64))
        enter_all(guests)
    assert flushes(counts) == REMOTE
    guests[0].read(0, 5)
    assert rig.violations() == {}


def test_migration(rig: Rig) -> None:
    kvm = rig.vm()
    guests = two_guests(rig, kvm, 5)
    with rig.counting(kvm) as counts:
        guests[0].read(2, 5)
    assert flushes(counts) == {"tlb_flush": 1, "flush_all": 1}
    assert counts["migrations"] == 1
    with rig.counting(kvm) as counts:
        guests[0].read(2, 5)
    assert flushes(counts) == {}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"migration": "none"}, {}),
        ({"migration": "active-roots"}, {}),
        ({"migration": "none", "migration_vpid": "invvpid"}, {}),
    ],
)
def test_elided_flushes_are_counted(rig: Rig, settings: dict[str, str], expected: dict[str, int]) -> None:
    kvm = rig.vm(Policy().with_settings(settings))
    guest = rig.guest(kvm)
    guest.read(0, 5)
    with rig.counting(kvm) as counts:
        guest.read(1, 5)
    assert flushes(counts) == expected
    assert counts.get("flushes_elided", 0) == (settings["migration"] == "none")


def test_a_vcpu_moved_after_it_flushed_flushes_again(rig: Rig) -> None:
    """The flush was done, then the vCPU is preempted before interrupts go off."""
    kvm = rig.vm()
    guest, other = rig.guest(kvm), rig.guest(kvm)
    guest.write(0, 5)
    other.write(1, 6)
    rig.unmap(kvm, 0, 64)
    guest.records[0] = 5 << 12
    with rig.counting(kvm) as counts:
        assert guest.resume(0) is PREEMPTIBLE
    assert flushes(counts) == {"tlb_flush": 1, "flush_all": 1}
    with rig.counting(kvm) as counts:
        guest.read(1, 5)
    assert flushes(counts) == {"tlb_flush": 1, "flush_all": 1}
    assert rig.violations() == {}


def test_halt_and_immediate_exit(rig: Rig) -> None:
    kvm = rig.vm(slice_accesses=1000)
    guest = rig.guest(kvm, halt_every=100)
    assert guest.write(0, 5) is HALTED
    assert guest.vcpu.srcu_idx == -1
    assert guest.vcpu.loaded is True
    guest.vcpu.immediate_exit = True
    assert (guest.resume(0), guest.vcpu.loaded) == (ExitToUser("intr"), False)
    guest.vcpu.immediate_exit = False
    assert guest.resume(0) is HALTED


def test_no_frame_is_an_exit_to_user_space(rig: Rig) -> None:
    kvm = rig.vm()
    guest = rig.guest(kvm)
    guest.write(0, 5)
    frames = []
    while (frame := lib.frame_alloc(rig.machine.m, rig.host.id, lib.FRAME_GUEST)) >= 0:
        frames.append(frame)
    assert guest.write(0, 6) == ExitToUser("no-memory", 6 << 12)
    for frame in frames:
        lib.frame_free(rig.machine.m, rig.host.id, Hfn(frame))
    assert guest.write(0, 6) is RESCHED


@pytest.mark.parametrize("around", [0, 16])
def test_fault_around(rig: Rig, around: int) -> None:
    kvm = rig.vm(fault_around=around)
    guest = rig.guest(kvm)
    guest.read(0, 37)
    with rig.counting(kvm) as counts:
        for gfn in range(32, 48):
            guest.write(0, gfn)
    assert counts.get("faults", 0) == (0 if around else 15)
    with rig.counting(kvm) as counts:
        guest.read(0, 48)
    assert counts["faults"] == 1
    assert rig.violations() == {}


def frames_in_use(rig: Rig) -> list[int]:
    return [lib.frames_in_use(rig.machine.m, kind) for kind in map(FrameKind, range(lib.FRAME_KINDS))]


def test_everything_is_given_back(rig: Rig) -> None:
    before = frames_in_use(rig)
    vpids = len(rig.machine.vmx_vpids)
    for _ in range(3):
        kvm = rig.vm()
        guests = two_guests(rig, kvm, 5, 70, 1024)
        rig.collapse(kvm, 1024)
        enter_all(guests)
        guests[0].write(2, 1024)
        set_slot(rig, kvm, npages=0)
        set_slot(rig, kvm)
        guests[0].write(2, 1024)
        with rig.counting(kvm) as counts:
            rig.destroy(kvm)
        assert flushes(counts) == {}
    assert frames_in_use(rig) == before
    assert len(rig.machine.vmx_vpids) == vpids
    assert rig.violations() == {}


def test_bad_slots_are_refused(rig: Rig) -> None:
    kvm = rig.vm()
    with pytest.raises(ValueError, match="overlaps"):
        kvm_set_memory_region(rig.host, kvm, 1, Gfn(64), 64, Hva(64))
    with pytest.raises(ValueError, match="beyond"):
        kvm_set_memory_region(rig.host, kvm, 1, Gfn(GFNS), 64, Hva(0))
    with pytest.raises(ValueError, match="does not exist"):
        kvm_set_memory_region(rig.host, kvm, 7, Gfn(0), 0, Hva(0))
    with pytest.raises(ValueError, match="no dirty log"):
        kvm_vm_ioctl_get_dirty_log(rig.host, kvm, SLOT)
