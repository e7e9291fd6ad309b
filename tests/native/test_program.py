"""Guest programs: an operation is one step, page tables and invalidations are the guest's own.  And CPUs that
one thread after the other plays."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from native import ffi, lib
from native.types import CpuId, SignalSlot, VcpuId
from tests.native.hypervisor import Hypervisor
from tests.support import CPU0, CPU1

A, B, C = 0x100, 0x101, 0x300
KINDS = {
    name: getattr(lib, f"GUEST_OP_{name.upper()}")
    for name in (
        *("read", "write", "execute", "invlpg", "invpcid", "mov_cr3", "map", "unmap", "protect"),
        *("hlt", "exit", "signal", "wait"),
    )
}


@pytest.fixture
def machine() -> Iterator[Hypervisor]:
    with Hypervisor(l2_entries=0, psc_entries=0) as h:
        yield h


def boot(machine: Hypervisor, processes: int = 1, **guest: int) -> VcpuId:
    """Return a vCPU with an OS that keeps its tables in the last pages."""
    settings = {"paging": 1, "pcid": 0, "first_gfn": 900, "end_gfn": 1024, **guest}
    vcpu = machine.vcpu(machine.vm(1024), 1, **settings)
    for _ in range(processes):
        machine.process(vcpu, [], [A, B, C])
    return vcpu


def op(kind: str, page: int = 0, value: int = 0, flags: int = 0) -> dict[str, int]:
    return {"kind": KINDS[kind], "linear": page << 12, "value": value, "flags": flags}


def run(machine: Hypervisor, vcpu: VcpuId, *ops: dict[str, int], cpu: CpuId = CPU0, until: int = -1) -> int:
    """The program to its end, or to another exit than an EPT violation; returns the exit reason."""
    array = ffi.new("struct guest_op[]", list(ops))
    assert lib.guest_set_program(machine.m, vcpu, array, len(ops)) == 0
    return go_on(machine, vcpu, cpu)


def go_on(machine: Hypervisor, vcpu: VcpuId, cpu: CpuId = CPU0, budget: int = 1000) -> int:
    while True:
        machine.enter(cpu, vcpu)
        reason = int(lib.guest_run(machine.m, cpu, vcpu, budget, machine.exit))
        if reason != lib.EXIT_EPT_VIOLATION:
            return reason
        machine.map(cpu, machine.vm_of[vcpu], machine.exit.gpa >> 12)


def position(machine: Hypervisor, vcpu: VcpuId) -> int:
    return int(lib.guest_program_position(machine.m, vcpu))


MAPPED = (op("map", A, 0x10), op("map", B, 0x11), op("write", A), op("read", B))


def test_it_ends_and_stays_at_its_end(machine: Hypervisor) -> None:
    vcpu = boot(machine)
    assert run(machine, vcpu, *MAPPED) == lib.EXIT_PROGRAM_END
    assert position(machine, vcpu) == 4
    assert go_on(machine, vcpu) == lib.EXIT_PROGRAM_END
    assert run(machine, vcpu, op("read", A)) == lib.EXIT_PROGRAM_END
    assert position(machine, vcpu) == 1
    assert machine.violations() == {}


def test_exits_and_the_budget(machine: Hypervisor) -> None:
    vcpu = boot(machine)
    run(machine, vcpu, *MAPPED)
    assert run(machine, vcpu, op("exit", value=7), op("hlt"), op("read", A)) == lib.EXIT_PROGRAM
    assert machine.exit.linear == 7
    assert go_on(machine, vcpu) == lib.EXIT_HLT
    assert position(machine, vcpu) == 2
    assert go_on(machine, vcpu) == lib.EXIT_PROGRAM_END
    assert run(machine, vcpu, *[op("read", A)] * 4) == lib.EXIT_PROGRAM_END
    array = ffi.new("struct guest_op[]", [op("read", A)] * 4)
    lib.guest_set_program(machine.m, vcpu, array, 4)
    assert go_on(machine, vcpu, budget=3) == lib.EXIT_PREEMPTION_TIMER
    assert position(machine, vcpu) == 3


def test_without_paging_addresses_are_guest_physical(machine: Hypervisor) -> None:
    vcpu = boot(machine, paging=0, processes=0)
    assert run(machine, vcpu, op("write", 0x20), op("execute", 0x20)) == lib.EXIT_PROGRAM_END
    assert machine.mapped(machine.vm_of[vcpu], 0x20)


# Instructions that invalidate a change of A, of process 0, made on the other pCPU.
COVERS = {
    "invlpg": [op("invlpg", A)],
    "mov-cr3": [op("mov_cr3", value=0)],
    "invpcid-address": [op("invpcid", A, 0, 0)],
    "invpcid-single": [op("invpcid", 0, 0, 1)],
    "invpcid-all": [op("invpcid", 0, 0, 2)],
    "invpcid-retain": [op("invpcid", 0, 0, 3)],
}
DOES_NOT = {
    "nothing": [],
    "another page": [op("invlpg", B)],
    "another address": [op("invpcid", B, 0, 0)],
    "another process": [op("invpcid", 0, 1, 1)],
    "no flush": [op("mov_cr3", value=0, flags=lib.GUEST_OP_NOFLUSH)],
}


def changed_away(machine: Hypervisor, change: list[dict[str, int]], then: dict[str, int]) -> dict[str, int]:
    """pCPU 0 caches A, pCPU 1 changes it, pCPU 0 uses it."""
    vcpu = boot(machine, processes=2, pcid=1)
    run(machine, vcpu, *MAPPED)
    run(machine, vcpu, *change, cpu=CPU1)
    assert machine.violations() == {}
    run(machine, vcpu, then)
    return machine.violations()


@pytest.mark.parametrize("how", COVERS)
def test_a_change_that_the_guest_has_invalidated_is_stale(machine: Hypervisor, how: str) -> None:
    change = [op("map", A, 0x12), *COVERS[how]]
    assert set(changed_away(machine, change, op("read", A))) == {"guest-stale"}


@pytest.mark.slow
@pytest.mark.parametrize("how", DOES_NOT)
def test_a_change_that_it_has_not_may_be_used(machine: Hypervisor, how: str) -> None:
    assert changed_away(machine, [op("map", A, 0x12), *DOES_NOT[how]], op("read", A)) == {}


def test_each_of_many_changes_is_remembered(machine: Hypervisor) -> None:
    """Loaded in two programs, so that the list of the first one's changes is kept and grows."""
    pages = range(0x400, 0x400 + 80)
    vcpu = boot(machine)
    machine.process(vcpu, [], list(pages))
    switch = op("mov_cr3", value=1)
    run(machine, vcpu, switch, *(op("map", page, page - 0x300) for page in pages))
    run(machine, vcpu, switch, *(op("read", page) for page in pages))
    run(machine, vcpu, switch, *(op("map", page, 0x20) for page in pages[:40]), cpu=CPU1)
    run(machine, vcpu, *(op("unmap", page) for page in pages[40:]), switch, cpu=CPU1)
    assert machine.violations() == {}
    run(machine, vcpu, *(op("read", page) for page in pages))
    assert machine.violations() == {"guest-stale": 80}


def test_a_global_page_outlives_mov_cr3(machine: Hypervisor) -> None:
    flags = lib.GUEST_OP_GLOBAL
    vcpu = boot(machine, processes=2, pcid=1)
    run(machine, vcpu, op("map", A, 0x10, flags), op("read", A))
    run(machine, vcpu, op("map", A, 0x12, flags), op("mov_cr3", value=0), op("invpcid", 0, 0, 3), cpu=CPU1)
    run(machine, vcpu, op("read", A))
    assert machine.violations() == {}
    run(machine, vcpu, op("invpcid", 0, 0, 2), cpu=CPU1)
    run(machine, vcpu, op("read", A))
    assert set(machine.violations()) == {"guest-stale"}


def test_write_access_alone(machine: Hypervisor) -> None:
    assert changed_away(machine, [op("protect", A), op("invlpg", A)], op("read", A)) == {}
    vcpu = next(iter(machine.vm_of))
    run(machine, vcpu, op("write", A))
    assert set(machine.violations()) == {"guest-stale"}


def test_unmapped_pages_are_faulted_in_by_the_guests_os(machine: Hypervisor) -> None:
    vcpu = boot(machine)
    run(machine, vcpu, *MAPPED, op("unmap", A), op("unmap", C), op("invlpg", A))
    faults = machine.count(lib.COUNT_GUEST_FAULTS)
    assert run(machine, vcpu, op("read", A)) == lib.EXIT_PROGRAM_END
    assert machine.count(lib.COUNT_GUEST_FAULTS) > faults
    assert machine.violations() == {}


def test_address_spaces(machine: Hypervisor) -> None:
    vcpu = boot(machine, processes=2, pcid=1)
    ops = (op("map", A, 0x10), op("write", A), op("mov_cr3", value=1), op("map", A, 0x20), op("write", A))
    assert run(machine, vcpu, *ops) == lib.EXIT_PROGRAM_END
    vm = machine.vm_of[vcpu]
    assert machine.mapped(vm, 0x10)
    assert machine.mapped(vm, 0x20)
    assert machine.count(lib.COUNT_GUEST_SWITCHES) == 1


def test_huge_pages_of_the_guest(machine: Hypervisor) -> None:
    vcpu = boot(machine)
    run(machine, vcpu, op("map", 0x400, 0x200, lib.GUEST_OP_HUGE), op("write", 0x405))
    assert machine.mapped(machine.vm_of[vcpu], 0x205)


def test_signals_and_waits_in_guest_mode(machine: Hypervisor) -> None:
    vcpu = boot(machine)
    run(machine, vcpu, *MAPPED)
    lib.signal_add(machine.m, SignalSlot(3), 1)
    waits = [op("signal", value=5), {"kind": KINDS["wait"], "linear": 3, "value": 2, "flags": 0}]
    thread = threading.Thread(target=run, args=(machine, vcpu, *waits, op("read", A)))
    thread.start()
    deadline = time.monotonic() + 10
    while not lib.signal_get(machine.m, SignalSlot(5)):
        assert time.monotonic() < deadline
    assert lib.vcpu_mode(machine.m, vcpu) == lib.IN_GUEST_MODE
    time.sleep(0.002)
    assert position(machine, vcpu) == 1
    lib.signal_add(machine.m, SignalSlot(3), 1)
    thread.join(10)
    assert position(machine, vcpu) == 3
    lib.signal_reset(machine.m)
    assert lib.signal_get(machine.m, SignalSlot(3)) == lib.signal_get(machine.m, SignalSlot(5)) == 0


def test_whoever_waits_in_guest_mode_takes_interrupts(machine: Hypervisor) -> None:
    vcpu = boot(machine)
    run(machine, vcpu, *MAPPED)
    exits: list[int] = []
    forever = {"kind": KINDS["wait"], "linear": 1, "value": 1, "flags": 0}
    thread = threading.Thread(target=lambda: exits.append(run(machine, vcpu, op("signal"), forever)))
    thread.start()
    while not lib.signal_get(machine.m, SignalSlot(0)):
        time.sleep(0.0001)
    assert (
        lib.smp_call_function_single(machine.m, machine.housekeeping, CPU0, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT)
        == 1
    )
    thread.join(10)
    assert exits == [lib.EXIT_INTERRUPT]
    assert lib.vcpu_mode(machine.m, vcpu) == lib.OUTSIDE_GUEST_MODE


# --- CPUs without a thread of their own


def test_an_idle_cpu_runs_what_is_called_on_it(machine: Hypervisor) -> None:
    vcpu = boot(machine)
    run(machine, vcpu, *MAPPED, cpu=CPU1)
    assert lib.cpu_idle(machine.m, CPU1) == 0
    assert lib.cpu_power(machine.m, CPU1) == lib.CPU_HALTED
    root = machine.roots[machine.vm_of[vcpu]]
    before = machine.count(lib.COUNT_CALLS_SERVICED)
    argument = machine.vm_of[vcpu] << 32 | root
    m, sender = machine.m, machine.housekeeping
    assert lib.smp_call_function_single(m, sender, CPU1, lib.IPI_INVEPT_SINGLE, argument, lib.IPI_WAIT) == 1
    assert machine.count(lib.COUNT_CALLS_SERVICED) == before + 1
    assert lib.cpu_take(machine.m, CPU1) == 0
    assert lib.cpu_power(machine.m, CPU1) == lib.CPU_RUNNING
    misses = machine.count(lib.COUNT_L2_MISSES)
    run(machine, vcpu, op("read", A), cpu=CPU1)
    assert machine.count(lib.COUNT_L2_MISSES) == misses + 1


def test_taking_an_offline_cpu_brings_it_online(machine: Hypervisor) -> None:
    lib.cpu_offline(machine.m, CPU1)
    assert lib.cpu_idle(machine.m, CPU1) == lib.MACHINE_OFFLINE
    assert lib.cpu_take(machine.m, CPU1) == 0
    assert lib.cpu_power(machine.m, CPU1) == lib.CPU_RUNNING


def test_a_reset_cpu_has_nothing_cached_and_averts_nothing(machine: Hypervisor) -> None:
    vcpu = boot(machine)
    run(machine, vcpu, *MAPPED)
    vm = machine.vm_of[vcpu]
    machine.zap(CPU0, vm, 0x10)
    lib.flush_reset(machine.m, CPU0)
    machine.promise(CPU0, vm, 0x10, lib.PROMISE_NOTIFIER)
    run(machine, vcpu, op("read", A))
    assert machine.violations() == {}
    assert machine.count(lib.COUNT_AVERTED) == machine.count(lib.COUNT_REFILLS) == 0
