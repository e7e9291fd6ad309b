"""INVEPT and INVVPID fail for a descriptor that the processor refuses, and then invalidate nothing."""

from __future__ import annotations

import pytest

from native import ffi, lib
from native.types import LinearPage, Vpid
from tests.native.hypervisor import READ, Hypervisor
from tests.support import CPU0

FOUR, FIVE, WB, UC, AD = 3 << 3, 4 << 3, 6, 0, 1 << 6


def cached(machine: Hypervisor) -> int:
    return lib.tlb_dump(lib.cpu_tlb(machine.m, CPU0), ffi.NULL, 0)


def failures(machine: Hypervisor) -> list[tuple[int, int]]:
    """Return scope and operand of each recorded failure."""
    number = lib.events_count(machine.m, CPU0)
    events = ffi.new("struct event[]", number)
    found = lib.events_read(machine.m, CPU0, events, number)
    return [(e.a >> 32, e.b) for e in events[0:found] if e.kind == lib.EVENT_VMFAIL]


@pytest.mark.parametrize(
    "low",
    [
        0,  # an address alone: no levels
        WB,
        FOUR | 1,  # write-combining, write-through, write-protected and reserved types
        FOUR | 4,
        FOUR | 5,
        FOUR | 7,
        WB | 2 << 3,
        WB | 5 << 3,
        WB | FOUR | 1 << 7,
        WB | FOUR | 1 << 11,
        WB | FOUR | 1 << 52,
    ],
)
def test_invept_of_a_bad_eptp(low: int) -> None:
    with Hypervisor() as machine:
        vm = machine.vm()
        machine.access(CPU0, machine.vcpu(vm, 1), 0x5000, READ)
        before = cached(machine)
        assert before > 0
        eptp = machine.roots[vm] << 12 | low
        failed = lib.flush_invept_single(machine.m, CPU0, vm, eptp, lib.REASON_OTHER)
        assert failed == lib.VMFAIL_INVALID_OPERAND == 28
        assert cached(machine) == before
        assert failures(machine) == [(lib.SCOPE_INVEPT_SINGLE, eptp)]


@pytest.mark.parametrize("low", [WB | FOUR, WB | FIVE, WB | FOUR | AD, UC | FOUR])
def test_invept_of_a_good_eptp(low: int) -> None:
    with Hypervisor() as machine:
        vm = machine.vm()
        machine.access(CPU0, machine.vcpu(vm, 1), 0x5000, READ)
        eptp = machine.roots[vm] << 12 | low
        assert lib.flush_invept_single(machine.m, CPU0, vm, eptp, lib.REASON_OTHER) == 0
        assert cached(machine) == 0
        assert failures(machine) == []


def test_invvpid() -> None:
    beyond, last = 1 << 35, (1 << 35) - 1
    with Hypervisor() as machine:
        m, vm = machine.m, machine.vm()
        machine.access(CPU0, machine.vcpu(vm, 1), 0x5000, READ)
        before, why = cached(machine), lib.REASON_OTHER
        assert lib.flush_invvpid_single(m, CPU0, vm, Vpid(0), why) == lib.VMFAIL_INVALID_OPERAND
        assert (
            lib.flush_invvpid_address(m, CPU0, vm, Vpid(0), LinearPage(5), why) == lib.VMFAIL_INVALID_OPERAND
        )
        assert (
            lib.flush_invvpid_address(m, CPU0, vm, Vpid(1), LinearPage(beyond), why)
            == lib.VMFAIL_INVALID_OPERAND
        )
        assert cached(machine) == before > 0
        single, address = lib.SCOPE_INVVPID_SINGLE, lib.SCOPE_INVVPID_ADDRESS
        assert failures(machine) == [(single, 0), (address, 0), (address, beyond << 12)]
        for page in (last, (1 << 52) - 1, (1 << 52) - (1 << 35)):
            assert lib.flush_invvpid_address(m, CPU0, vm, Vpid(1), LinearPage(page), why) == 0
        assert lib.flush_invvpid_single(m, CPU0, vm, Vpid(1), why) == 0
        assert len(failures(machine)) == 3
