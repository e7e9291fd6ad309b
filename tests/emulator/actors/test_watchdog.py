"""Stalls are noticed by CPU time burned or by one endless sleep, never by the clock on the wall."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pykka
import pytest

from emulator.actors import watchdog
from emulator.actors.base import MachineActor
from emulator.actors.crew import Crew
from emulator.actors.pcpu import PCpu
from emulator.actors.rcu import RcuThread
from emulator.actors.watchdog import Stall, Watchdog
from native import ffi, lib
from tests.emulator.actors.crews import crew_of, small_machine
from tests.support import VM0


class Doer(MachineActor):
    def on_receive(self, message: Any) -> Any:
        return message(self)


class BadPCpu(PCpu):
    """A pCPU with a thread that does something else on request."""

    def on_receive(self, message: Any) -> Any:
        return message(self)


@pytest.fixture(name="crew")
def _crew(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    monkeypatch.setattr(watchdog, "BURN_SECONDS", 0.2)
    monkeypatch.setattr(watchdog, "SLEEP_ROUNDS", 5)
    with crew_of(small_machine()) as crew:
        yield crew


def doer(crew: Crew, number: int) -> pykka.ActorRef[Doer]:
    return Doer.start(crew, crew.machine.cpus[crew.machine.pcpus + number], f"doer{number}")


def watch(crew: Crew, seconds: float = 10.0) -> list[Stall]:
    dog = Watchdog(crew)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stalls = dog.check()
        if stalls:
            for stall in stalls:
                dog.report(stall)
            return stalls
        time.sleep(0.02)
    return []


def burn(actor: MachineActor) -> None:
    while not actor.crew.machine.stopping:
        sum(range(1000))


@pytest.mark.slow
def test_a_cpu_that_burns_time_with_interrupts_off(crew: Crew) -> None:
    m = crew.machine.m
    bad = BadPCpu.start(crew, crew.machine.cpus[0])
    started = threading.Event()

    def spin(actor: MachineActor) -> None:
        lib.local_irq_disable(actor.cpu.m, actor.cpu.id, b"test")
        started.set()
        burn(actor)
        lib.local_irq_enable(actor.cpu.m, actor.cpu.id)

    bad.tell(spin)
    assert started.wait(5)
    doer(crew, 0).tell(
        lambda actor: actor.cpu.check(
            lib.on_each_cpu(actor.cpu.m, actor.cpu.id, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT)
        )
    )
    (stall,) = watch(crew)
    assert (stall.kind, stall.who, stall.cpu) == ("ipi-stall", "pcpu0", 0)
    assert "CPU time" in stall.doing
    counts = ffi.new("uint64_t[]", lib.VIOLATIONS)
    lib.oracle_counts(m, counts)
    assert counts[lib.VIOLATION_IPI_STALL] == 1


@pytest.mark.slow
def test_a_reader_that_never_leaves_rcu(crew: Crew) -> None:
    RcuThread.start(crew, crew.machine.cpus[crew.machine.pcpus + 2])
    started = threading.Event()

    def read(actor: MachineActor) -> None:
        lib.rcu_read_lock(actor.cpu.m, actor.cpu.id)
        started.set()
        burn(actor)
        lib.rcu_read_unlock(actor.cpu.m, actor.cpu.id)

    doer(crew, 0).tell(read)
    assert started.wait(5)
    doer(crew, 1).tell(lambda actor: lib.synchronize_rcu(actor.cpu.m, actor.cpu.id))
    (stall,) = watch(crew)
    assert (stall.kind, stall.who) == ("rcu-stall", "doer0")


def test_a_lock_whose_holder_sleeps(crew: Crew) -> None:
    assert lib.vm_create(crew.machine.m, 64) == 0
    held = threading.Event()
    release = threading.Event()

    def hold(actor: MachineActor) -> None:
        actor.cpu.check(lib.mmu_write_lock(actor.cpu.m, actor.cpu.id, VM0))
        held.set()
        release.wait()
        lib.mmu_write_unlock(actor.cpu.m, actor.cpu.id, VM0)

    doer(crew, 0).tell(hold)
    assert held.wait(5)
    doer(crew, 1).tell(lambda actor: lib.mmu_read_lock(actor.cpu.m, actor.cpu.id, VM0))
    (stall,) = watch(crew)
    release.set()
    assert (stall.kind, stall.who) == ("deadlock", "doer0")
    assert "mmu_lock of VM 0" in stall.waits_for


@pytest.mark.slow
def test_busy_actors_are_no_stall(crew: Crew) -> None:
    for cpu in crew.machine.cpus[:2]:
        PCpu.start(crew, cpu)

    def broadcast(actor: MachineActor) -> None:
        while not actor.crew.machine.stopping:
            actor.cpu.check(lib.on_each_cpu(actor.cpu.m, actor.cpu.id, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT))

    for number in range(2):
        doer(crew, number).tell(broadcast)
    assert watch(crew, seconds=1.0) == []
