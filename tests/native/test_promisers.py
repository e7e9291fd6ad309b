"""Each promiser has a record of its promises, and a use that breaks one is a violation of its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from native import ffi, lib
from native.types import VcpuId
from tests.native.hypervisor import Hypervisor
from tests.native.nested_rig import vmx
from tests.native.test_program import op, run
from tests.support import CPU0, CPU1, VM0

A, GFN, OTHER = 0x1000, 0x10, 0x11
VPID12 = 5


def kvm_takes_the_page_away(machine: Hypervisor, vcpu: VcpuId, completes: bool) -> None:
    """A zap without a flush; the operation that zapped returns."""
    machine.zap(CPU0, VM0, GFN)
    if completes:
        machine.promise(CPU0, VM0, GFN, lib.PROMISE_NOTIFIER)


def guest_takes_the_page_away(machine: Hypervisor, vcpu: VcpuId, completes: bool) -> None:
    """The guest maps another frame there on another pCPU; the invalidation reaches only that one."""
    ops = [op("map", A, OTHER), op("invlpg", A)]
    run(machine, vcpu, *ops[: 1 + completes], cpu=CPU1)


def l1_takes_the_page_away(machine: Hypervisor, vcpu: VcpuId, completes: bool) -> None:
    """A nested guest maps another frame there; L1 executes INVVPID, of which the hypervisor makes nothing."""
    run(machine, vcpu, op("map", A, OTHER))
    lib.vcpu_set_guest_mode(machine.m, vcpu, 0)
    if completes:
        run(machine, vcpu, vmx("invvpid", VPID12, 1))
    lib.vcpu_set_guest_mode(machine.m, vcpu, 1)


TAKES_AWAY: Final[dict[int, Callable[[Hypervisor, VcpuId, bool], None]]] = {
    lib.PROMISER_KVM: kvm_takes_the_page_away,
    lib.PROMISER_GUEST: guest_takes_the_page_away,
    lib.PROMISER_L1: l1_takes_the_page_away,
}
KIND: Final[dict[int, str]] = {
    lib.PROMISER_KVM: "stale-after-revoke",
    lib.PROMISER_GUEST: "guest-stale",
    lib.PROMISER_L1: "l1-stale",
}


def booted(machine: Hypervisor, promiser: int) -> VcpuId:
    """Return a vCPU whose guest has read the page: L1's promises are to a nested guest."""
    nested = promiser == lib.PROMISER_L1
    vcpu = machine.vcpu(machine.vm(), 1, paging=1, first_gfn=0x20)
    if nested:
        assert lib.guest_create_nested(machine.m, vcpu, 1) == 0
        run(machine, vcpu, vmx("vmptrld", 1))
        run(machine, vcpu, vmx("vmwrite", VPID12))
        lib.vcpu_set_guest_mode(machine.m, vcpu, 1)
        config = {"paging": 1, "first_gfn": 0x100, "end_gfn": 0x200}
        lib.guest_configure(machine.m, vcpu, ffi.new("struct guest_config *", config))
    machine.process(vcpu, [], [A])
    run(machine, vcpu, op("map", A, GFN), op("read", A))
    return vcpu


def test_all_promisers_are_here() -> None:
    assert set(TAKES_AWAY) == set(KIND) == set(range(lib.PROMISERS))


@pytest.mark.parametrize("completes", [True, False], ids=["promised", "not yet"])
@pytest.mark.parametrize("promiser", range(lib.PROMISERS), ids=["kvm", "guest", "l1"])
def test_a_use_after_the_promise_is_a_violation_of_the_promisers_kind(promiser: int, completes: bool) -> None:
    with Hypervisor() as machine:
        vcpu = booted(machine, promiser)
        TAKES_AWAY[promiser](machine, vcpu, completes)
        assert machine.violations() == {}, "no use yet"
        run(machine, vcpu, op("read", A))
        assert set(machine.violations()) == ({KIND[promiser]} if completes else set())


@pytest.mark.parametrize("promiser", range(lib.PROMISERS), ids=["kvm", "guest", "l1"])
def test_a_flush_in_time_averts_it(promiser: int) -> None:
    with Hypervisor() as machine:
        vcpu = booted(machine, promiser)
        TAKES_AWAY[promiser](machine, vcpu, True)
        machine.flush(VM0)
        run(machine, vcpu, op("read", A))
        assert machine.violations() == {}
        assert machine.count(lib.COUNT_AVERTED) > 0
