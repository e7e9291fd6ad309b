"""Memory that is read before it is written: the first write copies, and that is an invalidation."""

from __future__ import annotations

from emulator.kvm.structs import Kvm
from emulator.policy import Policy
from native import lib
from native.types import Hva
from tests.emulator.kvm.rig import Rig


def zero_page_vm(rig: Rig, policy: Policy | None = None) -> Kvm:
    kvm = rig.vm(policy)
    lib.mm_set_zero_page(rig.machine.m, kvm.id, True)
    return kvm


def test_the_first_write_flushes_and_later_ones_do_not(rig: Rig) -> None:
    kvm = zero_page_vm(rig)
    writer, reader = rig.guest(kvm), rig.guest(kvm)
    reader.read(1, 5)
    writer.read(0, 5)
    with rig.counting(kvm) as counts:
        writer.write(0, 5)
    assert counts["remote_tlb_flush_requests"] == 1
    assert counts["fault_retries"] == 1
    with rig.counting(kvm) as counts:
        writer.write(0, 5)
        reader.read(1, 5)
    assert "remote_tlb_flush_requests" not in counts
    assert rig.violations() == {}


def test_memory_that_is_written_first_is_not_copied(rig: Rig) -> None:
    kvm = zero_page_vm(rig)
    guest = rig.guest(kvm)
    with rig.counting(kvm) as counts:
        guest.write(0, 5)
    assert "remote_tlb_flush_requests" not in counts


def test_the_old_page_is_not_read_after_the_copy(rig: Rig) -> None:
    kvm = zero_page_vm(rig, Policy().with_settings({"notifier_flush": "none"}))
    writer, reader = rig.guest(kvm), rig.guest(kvm)
    writer.read(0, 5)
    reader.read(1, 5)
    writer.write(0, 5)
    reader.read(1, 5)
    assert "use-after-free" in rig.violations()


def test_a_page_that_may_not_be_written_is_not_copied(rig: Rig) -> None:
    kvm = zero_page_vm(rig)
    guest = rig.guest(kvm)
    guest.read(0, 5)
    rig.protect(kvm, 0, 64, 0)
    with rig.counting(kvm) as counts:
        guest.write(0, 5)
    assert "remote_tlb_flush_requests" not in counts
    rig.protect(kvm, 0, 64, 1)
    guest.write(0, 5)
    assert rig.violations() == {}


def test_somebody_else_may_copy_first(rig: Rig) -> None:
    kvm = zero_page_vm(rig)
    guest = rig.guest(kvm)
    guest.read(0, 5)
    m, host = rig.machine.m, rig.host
    free = lib.frames_in_use(m, lib.FRAME_GUEST)
    for _ in range(2):
        assert lib.mm_break_cow(m, host.id, kvm.id, Hva(5)) == 0
    assert lib.frames_in_use(m, lib.FRAME_GUEST) == free
