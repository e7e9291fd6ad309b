"""Hyper-V's hypercalls that flush an EPT: their scopes, and that guests do not exit for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from native import FLUSH_REASONS, lib
from native.reader import CounterReader
from native.types import CpuId, Gfn, VcpuId, VmId
from tests.native.hypervisor import READ, Hypervisor
from tests.native.test_interruptions import idle_guest, kick
from tests.support import CPU0, CPU1, VM0, wait_until

PAGES = (0x10, 0x11, 0x250)


@pytest.fixture
def machine() -> Iterator[Hypervisor]:
    with Hypervisor(hyperv=1) as h:
        yield h


def hypercall(
    h: Hypervisor, vm: VmId, gfn: int = 0, pages: int = 0, idle: tuple[CpuId, ...] = (CPU0, CPU1)
) -> None:
    """Flush the VM's root on all pCPUs; `idle` are those that no thread drives."""
    for cpu in idle:
        lib.cpu_idle(h.m, cpu)
    reason = lib.REASON_REMOTE_ZAP
    assert lib.hv_flush_guest_mapping(h.m, h.housekeeping, vm, h.roots[vm], Gfn(gfn), pages, reason) == 0
    for cpu in idle:
        assert lib.cpu_take(h.m, cpu) == 0


def misses(h: Hypervisor, cpu: CpuId, vcpu: VcpuId, page: int) -> int:
    before = h.count(lib.COUNT_L2_MISSES)
    h.access(cpu, vcpu, page << 12)
    return h.count(lib.COUNT_L2_MISSES) - before


def test_a_hypercall_flushes_a_root_on_all_pcpus(machine: Hypervisor) -> None:
    vcpu = machine.vcpu(machine.vm(), 1)
    other = machine.vcpu(machine.vm(), 2)
    for cpu in (CPU0, CPU1):
        machine.access(cpu, vcpu, PAGES[0] << 12)
        machine.access(cpu, other, PAGES[0] << 12)
    hypercall(machine, VM0)
    for cpu in (CPU0, CPU1):
        assert misses(machine, cpu, vcpu, PAGES[0]) == 1
        assert misses(machine, cpu, other, PAGES[0]) == 0
    assert machine.count(lib.COUNT_HYPERCALLS) == 1
    assert machine.count(lib.COUNT_HYPERCALL_FLUSHES) == 2
    assert machine.count(lib.COUNT_SHADOW_EPT_FILLS) == machine.count(lib.COUNT_REFILLS) == 2
    assert machine.count(lib.COUNT_CSD_QUEUED) == machine.count(lib.COUNT_IPIS_SENT) == 0


@pytest.mark.parametrize(
    ("gfn", "pages", "dropped"),
    [
        (0x10, 1, {0x10}),
        (0x11, 0x23F, {0x11}),
        (0x0, 0x200, {0x10, 0x11}),
        (0x200, 0x200, {0x250}),
        (0x12, 0x100, set()),
    ],
)
def test_a_range_drops_its_pages_alone(
    machine: Hypervisor, gfn: int, pages: int, dropped: set[int]
) -> None:
    vcpu = machine.vcpu(machine.vm(), 1)
    for page in PAGES:
        machine.access(CPU0, vcpu, page << 12)
    hypercall(machine, VM0, gfn, pages)
    assert {page for page in PAGES if misses(machine, CPU0, vcpu, page)} == dropped


def test_a_range_drops_the_pointers_to_its_tables(machine: Hypervisor) -> None:
    vcpu = machine.vcpu(machine.vm(), 1)
    machine.access(CPU0, vcpu, PAGES[0] << 12)
    before = machine.count(lib.COUNT_WALK_REFERENCES)
    for gfn, references in ((0x11, 4), (0x12, 1)):
        if references == 4:
            hypercall(machine, VM0, 0, 0x200)
        machine.map(CPU0, VM0, gfn)
        machine.access(CPU0, vcpu, gfn << 12)
        assert machine.count(lib.COUNT_WALK_REFERENCES) - before == references
        before = machine.count(lib.COUNT_WALK_REFERENCES)


def test_a_flush_counts_by_scope_and_reason(machine: Hypervisor) -> None:
    machine.vm()
    hypercall(machine, VM0)
    hypercall(machine, VM0, 0x10, 1)
    cells = CounterReader(machine.m, vms=2).flushes()
    counted = {(cell.scope, cell.reason): cell.count for cell in cells}
    reason = FLUSH_REASONS[lib.REASON_REMOTE_ZAP]
    assert counted == {("hv_space", reason): 2, ("hv_list", reason): 2}


def halted_run(machine: Hypervisor, vcpu: VcpuId) -> tuple[threading.Thread, list[int]]:
    """Run the guest on pCPU 0 on a thread of its own, until it halts without an exit."""
    reasons: list[int] = []

    def guest() -> None:
        machine.enter(CPU0, vcpu)
        reasons.append(lib.guest_run(machine.m, CPU0, vcpu, 1 << 30, machine.exit))

    thread = threading.Thread(target=guest, daemon=True)
    thread.start()
    wait_until(lambda: lib.cpu_power(machine.m, CPU0) == lib.CPU_GUEST_HALTED, "the guest halts")
    return thread, reasons


def test_a_guest_does_not_exit_for_a_hypercall_but_for_a_kick(machine: Hypervisor) -> None:
    vcpu = idle_guest(machine, halt_us=60_000_000)
    thread, reasons = halted_run(machine, vcpu)
    for _ in range(3):
        hypercall(machine, VM0, idle=(CPU1,))
    assert lib.vcpu_mode(machine.m, vcpu) == lib.IN_GUEST_MODE
    assert not reasons
    assert machine.count(lib.COUNT_HYPERCALL_FLUSHES) == 6
    kick(machine, VM0)
    thread.join(10)
    assert reasons == [lib.EXIT_INTERRUPT]
    assert machine.count(lib.COUNT_INTERRUPTIONS) == machine.count(lib.COUNT_IPIS_RECEIVED) == 1


def test_hypercalls_and_kicks_together(machine: Hypervisor) -> None:
    """Neither is lost while a guest runs: each sender waits for its own."""
    vcpu = machine.vcpu(machine.vm(), 1)
    pages = list(range(0x100, 0x110))
    machine.process(vcpu, [READ << 62 | page << 12 for page in pages], pages)
    stop, kicks = threading.Event(), 0

    def guest() -> None:
        for page in pages:
            machine.access(CPU0, vcpu, page << 12)
        while not stop.is_set():
            machine.enter(CPU0, vcpu)
            lib.guest_run(machine.m, CPU0, vcpu, 20_000, machine.exit)
        lib.cpu_idle(machine.m, CPU0)

    thread = threading.Thread(target=guest, daemon=True)
    thread.start()
    wait_until(lambda: machine.count(lib.COUNT_ACCESSES) > 0, "the guest runs")
    for _ in range(200):
        hypercall(machine, VM0, 0x100, 8, idle=(CPU1,))
        mode = lib.vcpu_exiting_guest_mode(machine.m, vcpu)
        if mode == lib.IN_GUEST_MODE:
            kicks += 1
            lib.smp_call_function_single(
                machine.m, machine.housekeeping, CPU0, lib.IPI_ACK_KICK, VM0 << 32, lib.IPI_WAIT
            )
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert kicks
    assert machine.count(lib.COUNT_CALLS_RUN) == machine.count(lib.COUNT_CSD_QUEUED) == kicks
    assert machine.count(lib.COUNT_HYPERCALL_FLUSHES) == 2 * 200
