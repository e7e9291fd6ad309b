"""The last checks before VM entry."""

from __future__ import annotations

import pytest

from emulator.kvm.kvm_host import EXITING_GUEST_MODE, IN_GUEST_MODE, KVM_REQ_TLB_FLUSH, OUTSIDE_GUEST_MODE
from emulator.kvm.virt.requests import kvm_check_request, kvm_make_request, set_mode
from emulator.kvm.x86 import kvm_vcpu_exit_request
from emulator.machine.runtime import Cpu
from emulator.points import PointKind
from native import lib
from tests.emulator.kvm.rig import Guest, Rig, at_point


def ready(rig: Rig) -> Guest:
    """A guest without pending requests."""
    guest = rig.guest(rig.vm())
    guest.read(0, 5)
    assert not lib.kvm_requests(rig.machine.m, guest.vcpu.id)
    return guest


@pytest.mark.parametrize(
    ("mode", "requested", "exits"),
    [
        (IN_GUEST_MODE, False, False),
        (IN_GUEST_MODE, True, True),
        (EXITING_GUEST_MODE, False, True),
        (EXITING_GUEST_MODE, True, True),
    ],
)
def test_a_mode_or_a_request_cancels_the_entry(rig: Rig, mode: int, requested: bool, exits: bool) -> None:
    vcpu = ready(rig).vcpu
    if requested:
        kvm_make_request(rig.host, vcpu, KVM_REQ_TLB_FLUSH)
    set_mode(rig.host, vcpu, mode)
    assert kvm_vcpu_exit_request(rig.host, vcpu) is exits
    set_mode(rig.host, vcpu, OUTSIDE_GUEST_MODE)


def test_the_mode_is_read_before_the_requests(rig: Rig) -> None:
    """A request that comes between the two is seen, and a kick that comes between them interrupts."""
    vcpu = ready(rig).vcpu
    set_mode(rig.host, vcpu, IN_GUEST_MODE)
    with at_point(
        rig, rig.host.id, "mode", "read", lambda: kvm_make_request(rig.host, vcpu, KVM_REQ_TLB_FLUSH)
    ):
        assert kvm_vcpu_exit_request(rig.host, vcpu)
    assert kvm_check_request(rig.host, vcpu, KVM_REQ_TLB_FLUSH)
    with at_point(
        rig, rig.host.id, "requests", "read", lambda: lib.vcpu_exiting_guest_mode(rig.machine.m, vcpu.id)
    ):
        assert not kvm_vcpu_exit_request(rig.host, vcpu)
    set_mode(rig.host, vcpu, OUTSIDE_GUEST_MODE)


def test_pending_work_ends_guest_mode_before_the_first_access(rig: Rig) -> None:
    """It is what kvm_vcpu_exit_request() checks last, and comes when the requests have been read."""
    guest = ready(rig)
    accesses, cpu = rig.counter(lib.COUNT_ACCESSES), rig.machine.cpus[0]

    def hook(at: Cpu, kind: PointKind, obj: object, mode: str) -> None:
        if at is cpu and kind == "guest":
            lib.cpu_notify(rig.machine.m, cpu.id, lib.ATTENTION_RESCHED)

    rig.machine.install(hook)
    guest.next_slice(0)
    rig.machine.install(None)
    assert guest.vcpu.exit.accesses == 0
    assert rig.counter(lib.COUNT_ACCESSES) == accesses
    lib.cpu_clear_attention(rig.machine.m, cpu.id, lib.ATTENTION_RESCHED)
    guest.next_slice(0)
    assert rig.counter(lib.COUNT_ACCESSES) == accesses + 1
