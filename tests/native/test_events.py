"""Events: the rings, the events kept with a report, and starting over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emulator.explain.events import Event, EventTail, read_events
from native import ffi, lib
from native.types import CpuId, ReportNumber, VcpuId, VmId
from tests.native.hypervisor import READ, WRITE, Hypervisor
from tests.support import CPU0, CPU1


@pytest.fixture(name="machine")
def _machine() -> Iterator[Hypervisor]:
    with Hypervisor() as machine:
        yield machine


def events_of(machine: Hypervisor, report: int) -> list[Event]:
    buffer = ffi.new("struct event[]", 512)
    n = lib.oracle_report_events(machine.m, ReportNumber(report), buffer, 512)
    return sorted((Event.of_core(buffer[i]) for i in range(n)), key=lambda event: event.time)


def reports(machine: Hypervisor) -> int:
    buffer = ffi.new("struct violation_report[]", 64)
    return int(lib.oracle_reports(machine.m, ReportNumber(0), buffer, 64))


def violate(machine: Hypervisor, vcpu: VcpuId, vm: VmId, gfn: int, cpu: CpuId = CPU0) -> None:
    """Map, unmap on the other CPU with a promise but no flush, use."""
    machine.access(cpu, vcpu, gfn << 12, READ)
    machine.zap(CpuId(1 - cpu), vm, gfn)
    machine.promise(CpuId(1 - cpu), vm, gfn, lib.PROMISE_NOTIFIER)
    machine.access(cpu, vcpu, gfn << 12, READ)


def test_events_carry_their_vm_and_more(machine: Hypervisor) -> None:
    machine.vm()
    vm = machine.vm()
    vcpu = machine.vcpu(vm, 1)
    tail = EventTail(machine.m, machine.pcpus)
    machine.access(CPU0, vcpu, 5 << 12, WRITE)
    events = tail.take()
    assert [event.kind for event in events] == ["entry", "exit", "map", "entry", "exit"]
    assert {event.vm for event in events} == {vm}
    assert events[2].covers(5)
    assert not events[2].covers(6)
    # The guest's clock: nothing was accessed before the fault, one access after it.
    assert events[4].more == events[3].more + 1
    assert tail.take() == []


def test_a_piece_of_the_tail_is_no_longer_than_the_ring(machine: Hypervisor) -> None:
    tail = EventTail(machine.m, machine.pcpus)
    for i in range(1500):
        lib.event_record(machine.m, CPU1, lib.EVENT_FREE, i, 0)
    events = tail.take()
    assert [event.a for event in events] == list(range(476, 1500))
    assert len(read_events(machine.m, CPU1, 10)) == 10


def test_a_report_keeps_what_concerns_it(machine: Hypervisor) -> None:
    vm, other = machine.vm(), machine.vm()
    vcpu, neighbour = machine.vcpu(vm, 1), machine.vcpu(other, 2)
    for gfn in (200, 300):
        machine.access(CPU0, vcpu, gfn << 12, READ)
    machine.access(CPU1, neighbour, 5 << 12, READ)
    violate(machine, vcpu, vm, 5)
    assert reports(machine) == 1
    events = events_of(machine, 0)
    assert {event.vm for event in events if event.kind != "free"} == {vm}
    mapped = [event for event in events if event.kind == "map"]
    assert mapped
    assert all(event.covers(5) for event in mapped)
    zapped = [event for event in events if event.kind == "zap"]
    assert [(event.cpu, event.a) for event in zapped] == [(1, 5)]
    promised = [event for event in events if event.kind == "promise"]
    assert promised
    assert promised[-1].covers(5)
    # The entry after which it was filled.
    entered = [event for event in events if event.kind == "entry" and event.time > mapped[0].time]
    assert entered[0].time < zapped[0].time


def test_a_frequent_kind_leaves_room_for_others(machine: Hypervisor) -> None:
    vm = machine.vm()
    vcpu = machine.vcpu(vm, 1)
    for gfn in range(8):
        violate(machine, vcpu, vm, gfn)
    assert reports(machine) == 8
    assert [bool(events_of(machine, i)) for i in range(8)] == [True] * 6 + [False] * 2


def test_reports_and_events_start_over(machine: Hypervisor) -> None:
    vm = machine.vm()
    vcpu = machine.vcpu(vm, 1)
    for gfn in range(8):
        violate(machine, vcpu, vm, gfn)
    counts = ffi.new("uint64_t[]", lib.VIOLATIONS)
    lib.oracle_counts(machine.m, counts)
    before = sum(counts)
    lib.oracle_forget(machine.m)
    assert reports(machine) == 0
    assert lib.events_count(machine.m, CPU0) == 0
    lib.oracle_counts(machine.m, counts)
    assert sum(counts) == before
    violate(machine, vcpu, vm, 20)
    assert reports(machine) == 1
    assert {event.a for event in events_of(machine, 0) if event.kind == "zap"} == {20}


def test_a_call_names_pcpus_beyond_the_first_64() -> None:
    with Hypervisor(pcpus=130, housekeeping=1) as machine:
        tail = EventTail(machine.m, 130)
        # Idle pCPUs need not run to be called: the sender runs the function for them.
        assert (
            lib.smp_call_function_single(machine.m, CPU0, CpuId(100), lib.IPI_ACK_KICK, 0, lib.IPI_NO_WAIT)
            == 1
        )
        mask = ffi.new("uint64_t[]", [1 << 3, 1 << 6 | 1 << 7, 1])
        assert lib.smp_call_function_many(machine.m, CPU0, mask, lib.IPI_ACK_KICK, 0, lib.IPI_NO_WAIT) == 4
        calls = [event for event in tail.take() if event.kind == "ipi"]
    assert [(call.targets, call.b, call.function) for call in calls] == [
        ((100,), 1, "ack_kick"),
        ((3,), 4, "ack_kick"),
        ((70, 71), 4, "ack_kick"),
        ((128,), 4, "ack_kick"),
    ]
    assert calls[0].describe() == "IPI (ack_kick) to pCPU 100"
    assert not any(call.waits for call in calls)


def test_what_the_ring_has_lost_is_in_the_story(machine: Hypervisor) -> None:
    vm = machine.vm()
    vcpu = machine.vcpu(vm, 1)
    violate(machine, vcpu, vm, 5)
    assert not [event for event in events_of(machine, 0) if event.kind == "lost"]
    machine.access(CPU0, vcpu, 6 << 12, READ)
    for i in range(1500):
        lib.event_record(machine.m, CPU1, lib.EVENT_FREE, 1 << 20, i)
    machine.zap(CPU1, vm, 6)
    machine.promise(CPU1, vm, 6, lib.PROMISE_NOTIFIER)
    machine.access(CPU0, vcpu, 6 << 12, READ)
    lost = [event for event in events_of(machine, 1) if event.kind == "lost"]
    oldest = read_events(machine.m, CPU1, 1024)[0]
    assert [(event.cpu, event.time) for event in lost] == [(1, oldest.time - 1)]
    assert lost[0].a == lib.events_count(machine.m, CPU1) - 1024
