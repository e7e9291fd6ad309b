"""Actors that die: with locks held, in the middle of a broadcast, in RCU.  The run ends, with a report."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator
from typing import Any

import pykka
import pytest
from crews import crew_of, small_machine
from support import wait_until

from emulator.actors.base import MachineActor
from emulator.actors.crew import Crew
from emulator.actors.pcpu import PCpu
from emulator.actors.rcu import RcuThread
from emulator.runtime import MachineStopped, rcu_enter
from native import lib


@pytest.fixture(name="crew")
def _crew() -> Iterator[Crew]:
    with crew_of(small_machine()) as crew:
        yield crew


class Killed(BaseException):
    """What no handler of ours expects."""


class Doer(MachineActor):
    def on_receive(self, message: Any) -> Any:
        return message(self)


def start(crew: Crew, number: int) -> pykka.ActorRef[Doer]:
    return Doer.start(crew, crew.machine.cpus[crew.machine.pcpus + number], f"doer{number}")


def kill(actor: MachineActor) -> None:
    """Raise in the actor's thread, wherever it is (at its next bytecode)."""
    assert actor.thread is not None
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(actor.thread.ident), ctypes.py_object(Killed)
    )


def die(actor: Doer) -> None:
    raise Killed("on purpose")


def test_death_is_reported_and_stops_the_machine(crew: Crew) -> None:
    ref, other = start(crew, 0), start(crew, 1)
    ref.tell(die)
    assert crew.stopped.wait(5)
    assert crew.join() == []
    (death,) = crew.deaths
    assert (death.who, death.cpu) == ("doer0", 2)
    assert "on purpose" in death.cause
    assert "in die" in death.traceback
    with pytest.raises(pykka.ActorDeadError):
        other.ask(lambda actor: None)


def test_the_asker_hears_of_the_death(crew: Crew) -> None:
    with pytest.raises(Killed):
        start(crew, 0).ask(die)
    assert crew.stopped.wait(5)


@pytest.mark.parametrize("how", ["read", "write"])
def test_dies_with_mmu_lock(crew: Crew, how: str) -> None:
    machine = crew.machine
    assert lib.vm_create(machine.m, 64) == 0
    holder, waiter = start(crew, 0), start(crew, 1)
    held, go = threading.Event(), threading.Event()

    def hold(actor: Doer) -> None:
        take = lib.mmu_write_lock if how == "write" else lib.mmu_read_lock
        actor.cpu.check(take(actor.cpu.m, actor.cpu.id, 0))
        held.set()
        go.wait(5)
        die(actor)

    def want(actor: Doer) -> int:
        held.wait(5)
        rc: int = lib.mmu_write_lock(actor.cpu.m, actor.cpu.id, 0)
        actor.cpu.check(rc)
        lib.mmu_write_unlock(actor.cpu.m, actor.cpu.id, 0)
        return rc

    holder.tell(hold)
    wanted = waiter.ask(want, block=False)
    held.wait(5)
    wait_until(lambda: bool(lib.mmu_lock_contended(machine.m, 0)), "the waiter waits")
    go.set()
    with contextlib.suppress(MachineStopped, pykka.ActorDeadError):
        assert wanted.get(timeout=5) == 0
    assert crew.join() == []
    assert f"mmu_lock of VM 0 for {how}" in crew.deaths[0].held


def test_dies_inside_rcu(crew: Crew) -> None:
    machine = crew.machine
    RcuThread.start(crew, machine.cpus[machine.pcpus + 2])
    reader, updater = start(crew, 0), start(crew, 1)
    inside, go = threading.Event(), threading.Event()

    def read(actor: Doer) -> None:
        rcu_enter(actor.cpu)
        inside.set()
        go.wait(5)
        die(actor)

    reader.tell(read)
    inside.wait(5)
    waiting = updater.ask(
        lambda actor: actor.cpu.check(lib.synchronize_rcu(actor.cpu.m, actor.cpu.id)), block=False
    )
    go.set()
    with contextlib.suppress(MachineStopped, pykka.ActorDeadError):
        assert waiting.get(timeout=5) == 0
    assert crew.join() == []
    assert crew.deaths[0].held == ("an RCU read section",)


def broadcast_for_ever(actor: Doer) -> None:
    cpu = actor.cpu
    # A broadcast that finds nobody has nothing to wait for and does not see the stop.
    while not actor.crew.machine.stopping:
        cpu.check(lib.on_each_cpu(cpu.m, cpu.id, lib.IPI_ACK_KICK, 0, 1))


@pytest.mark.parametrize("victim", ["sender", "target"])
@pytest.mark.parametrize("round_", range(3))
def test_dies_in_the_middle_of_broadcasts(victim: str, round_: int) -> None:
    with crew_of(small_machine(pcpus=4)) as crew:
        for cpu in crew.machine.cpus[:4]:
            PCpu.start(crew, cpu)
        for i in range(2):
            start(crew, i).tell(broadcast_for_ever)
        time.sleep(0.02 * round_)
        kill(crew.actors[-1 if victim == "sender" else 1])
        # A halted pCPU executes no bytecode until somebody wakes it.
        lib.cpu_notify(crew.machine.m, 1, lib.ATTENTION_MESSAGE)
        assert crew.stopped.wait(5)
        assert crew.join() == []
        assert [death.cause.split(":")[0] for death in crew.deaths] == ["Killed"]


def test_dies_in_on_start(crew: Crew) -> None:
    class Stillborn(Doer):
        def on_start(self) -> None:
            raise ValueError("no")

    ref = Stillborn.start(crew, crew.machine.cpus[2], "stillborn")
    assert crew.stopped.wait(5)
    assert crew.join() == []
    assert crew.deaths[0].cause == "ValueError: no"
    with pytest.raises(pykka.ActorDeadError):
        ref.ask(lambda actor: None)


def test_boot_and_stop_of_many_pcpus() -> None:
    started = time.monotonic()
    with crew_of(small_machine(pcpus=1024)) as crew:
        refs = [PCpu.start(crew, cpu) for cpu in crew.machine.cpus[:1024]]
        assert all(ref.is_alive() for ref in refs)
        m = crew.machine.m
        wait_until(lambda: all(lib.cpu_power(m, i) == lib.CPU_HALTED for i in range(1024)), "all halt")
        stopping = time.monotonic()
        crew.stop()
        assert crew.join() == []
        assert time.monotonic() - stopping < 2
    assert time.monotonic() - started < 20
