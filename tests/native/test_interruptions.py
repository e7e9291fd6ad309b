"""Interruptions by sender and receiver: guests that halt without an exit, bystanders, flushes after one."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from native import ffi, lib
from native.types import VcpuId, VmId
from tests.native.hypervisor import READ, Hypervisor
from tests.support import CPU0, VCPU0, VM0, VM1, wait_until

PAGES = list(range(0x100, 0x110))
HALT_US = 20_000


@pytest.fixture
def machine() -> Iterator[Hypervisor]:
    with Hypervisor() as h:
        yield h


def idle_guest(machine: Hypervisor, halt_us: int = HALT_US) -> VcpuId:
    """A vCPU that halts after every 1000 accesses."""
    vcpu = machine.vcpu(machine.vm(), 1, halt_every=1000, halt_us=halt_us)
    machine.process(vcpu, [READ << 62 | page << 12 for page in PAGES], PAGES)
    for page in PAGES:
        machine.access(CPU0, vcpu, page << 12)
    return vcpu


def enter_and(machine: Hypervisor, vcpu: VcpuId, act: Callable[[], None]) -> int:
    """Run the guest on pCPU 0 on a thread of its own; `act` once it halts; the exit's reason."""
    reasons: list[int] = []

    def guest() -> None:
        machine.enter(CPU0, vcpu)
        reasons.append(lib.guest_run(machine.m, CPU0, vcpu, 1 << 30, machine.exit))

    thread = threading.Thread(target=guest, daemon=True)
    thread.start()
    wait_until(lambda: lib.cpu_power(machine.m, CPU0) == lib.CPU_GUEST_HALTED, "the guest halts")
    assert lib.vcpu_mode(machine.m, vcpu) == lib.IN_GUEST_MODE
    act()
    thread.join(10)
    assert reasons, "the guest is still asleep"
    return reasons[0]


def kick(machine: Hypervisor, vm: VmId) -> None:
    mask = ffi.new("uint64_t[]", [1])
    sender = machine.housekeeping
    assert lib.smp_call_function_many(machine.m, sender, mask, lib.IPI_ACK_KICK, vm << 32, lib.IPI_WAIT) == 1
    # Acknowledged: then it has left guest mode, with nothing else to make it.
    assert lib.vcpu_mode(machine.m, VCPU0) == lib.OUTSIDE_GUEST_MODE


def vmclear(machine: Hypervisor, vcpu: VcpuId) -> None:
    m, sender, argument = machine.m, machine.housekeeping, VM0 << 32 | machine.vmcs[vcpu]
    assert lib.smp_call_function_single(m, sender, CPU0, lib.IPI_VMCS_CLEAR, argument, lib.IPI_WAIT) == 1


def test_an_ipi_makes_a_halted_guest_exit(machine: Hypervisor) -> None:
    vcpu = idle_guest(machine, halt_us=60_000_000)
    assert enter_and(machine, vcpu, lambda: kick(machine, VM0)) == lib.EXIT_INTERRUPT
    assert machine.count(lib.COUNT_INTERRUPTIONS) == 1
    assert machine.count(lib.COUNT_BYSTANDER) == 0


def test_an_ipi_for_another_vm_makes_it_a_bystander(machine: Hypervisor) -> None:
    vcpu = idle_guest(machine, halt_us=60_000_000)
    assert enter_and(machine, vcpu, lambda: kick(machine, VM1)) == lib.EXIT_INTERRUPT
    assert machine.count(lib.COUNT_BYSTANDER) == 1


def test_a_vmclear_is_told_from_a_kick(machine: Hypervisor) -> None:
    vcpu = idle_guest(machine, halt_us=60_000_000)
    assert enter_and(machine, vcpu, lambda: vmclear(machine, vcpu)) == lib.EXIT_INTERRUPT
    enter_and(machine, vcpu, lambda: kick(machine, VM0))
    assert (machine.count(lib.COUNT_IPIS_VMCLEAR), machine.count(lib.COUNT_IPIS_SENT)) == (1, 2)
    assert machine.count(lib.COUNT_INTERRUPTIONS_VMCLEAR) == 1
    assert machine.count(lib.COUNT_INTERRUPTIONS) == 2


def test_entered_again_it_halts_for_the_rest_of_the_time(machine: Hypervisor) -> None:
    vcpu = idle_guest(machine, halt_us=300_000)
    started = time.monotonic()
    enter_and(machine, vcpu, lambda: kick(machine, VM0))
    machine.enter(CPU0, vcpu)
    # 1000 accesses to the next HLT: the timer has fired by then.
    assert lib.guest_run(machine.m, CPU0, vcpu, 500, machine.exit) == lib.EXIT_PREEMPTION_TIMER
    assert time.monotonic() - started >= 0.29


def test_a_message_wakes_it(machine: Hypervisor) -> None:
    vcpu = idle_guest(machine, halt_us=60_000_000)
    notify = lambda: lib.cpu_notify(machine.m, CPU0, lib.ATTENTION_MESSAGE)  # noqa: E731
    assert enter_and(machine, vcpu, notify) == lib.EXIT_MESSAGE


def test_stop_wakes_it(machine: Hypervisor) -> None:
    vcpu = idle_guest(machine, halt_us=60_000_000)
    assert enter_and(machine, vcpu, lambda: lib.machine_stop(machine.m)) == lib.EXIT_MESSAGE


@pytest.mark.parametrize("by", ["kick", "vmclear", "nothing"])
def test_a_necessary_flush_knows_whether_an_interruption_led_to_it(machine: Hypervisor, by: str) -> None:
    vcpu = idle_guest(machine, halt_us=60_000_000)
    if by == "kick":
        enter_and(machine, vcpu, lambda: kick(machine, VM0))
    elif by == "vmclear":
        enter_and(machine, vcpu, lambda: vmclear(machine, vcpu))
    gfn = PAGES[0]
    machine.zap(CPU0, VM0, gfn)
    lib.flush_invept_global(machine.m, CPU0, VM0, lib.REASON_REMOTE_ZAP)
    machine.promise(CPU0, VM0, gfn, lib.PROMISE_ZAP_RANGE)
    machine.access(CPU0, vcpu, gfn << 12)
    assert machine.count(lib.COUNT_AVERTED) > 0
    assert machine.count(lib.COUNT_NECESSARY_INTERRUPTIONS) == int(by == "kick")


@pytest.mark.parametrize("chaos", [0, 5])
def test_no_interrupt_is_lost_on_a_guest_that_is_about_to_halt(chaos: int) -> None:
    """The sender waits for each acknowledgement, and only an exit gives it: a lost wake-up hangs."""
    rounds = 3000
    with Hypervisor(chaos=chaos) as machine:
        # Halts right after each entry, for longer than the test may take.
        vcpu = machine.vcpu(machine.vm(), 1, halt_every=1, halt_us=200_000_000)
        machine.process(vcpu, [READ << 62 | page << 12 for page in PAGES], PAGES)
        for page in PAGES:
            machine.access(CPU0, vcpu, page << 12)
        done = threading.Event()

        def guest() -> None:
            exit_info = ffi.new("struct vcpu_exit *")
            while not done.is_set():
                machine.enter(CPU0, vcpu)
                lib.guest_run(machine.m, CPU0, vcpu, 1000, exit_info)

        thread = threading.Thread(target=guest, daemon=True)
        thread.start()
        mask = ffi.new("uint64_t[]", [1])
        rng = random.Random(1)
        for _ in range(rounds):
            # At any moment of the guest's way from Python into its sleep.
            until = time.perf_counter() + rng.random() * 60e-6
            while time.perf_counter() < until:
                pass
            sender = machine.housekeeping
            assert lib.smp_call_function_many(machine.m, sender, mask, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT) == 1
        done.set()
        lib.cpu_notify(machine.m, CPU0, lib.ATTENTION_MESSAGE)
        thread.join(10)
        assert not thread.is_alive()
        assert machine.count(lib.COUNT_INTERRUPTIONS) > 0
