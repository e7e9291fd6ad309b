"""Actors that die: with locks held, in the middle of a broadcast, in RCU.  The run ends, with a report."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pykka
import pytest

from emulator.actors.base import MachineActor
from emulator.actors.crew import Crew
from emulator.actors.pcpu import PCpu
from emulator.actors.rcu import RcuThread
from emulator.machine.runtime import MachineStopped, rcu_enter
from native import lib
from native.types import CpuId
from tests.emulator.actors.crews import crew_of, small_machine
from tests.support import CPU1, VM0, wait_until


@pytest.fixture(name="crew")
def _crew() -> Iterator[Crew]:
    with crew_of(small_machine()) as crew:
        yield crew


class Killed(BaseException):
    """An exception that no handler of the emulator expects."""


class Doer(MachineActor):
    def on_receive(self, message: Any) -> Any:
        return message(self)


def start(crew: Crew, number: int) -> pykka.ActorRef[Doer]:
    return Doer.start(crew, crew.machine.cpus[crew.machine.pcpus + number], f"doer{number}")


def kill(actor: MachineActor) -> None:
    """Raise in the actor's thread, wherever it is in its loop (at its next bytecode)."""
    assert actor.thread is not None
    ident = actor.thread.ident
    assert ident is not None
    # Before it is in its loop, the exception would end the thread alone.
    wait_until(lambda: in_loop(ident), f"{actor} receives")
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Killed))


def in_loop(ident: int) -> bool:
    """Return whether the thread receives messages, or is in on_start(), where the RCU thread stays."""
    frame = sys._current_frames().get(ident)
    while frame is not None and frame.f_code.co_name not in ("_receive_one", "on_start"):
        frame = frame.f_back
    return frame is not None


def die(actor: Doer) -> None:
    raise Killed("on purpose")


def test_death_is_reported_and_stops_the_machine(crew: Crew) -> None:
    ref, other = start(crew, 0), start(crew, 1)
    ref.tell(die)
    assert crew.stopped.wait(60)
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
    assert crew.stopped.wait(60)


@pytest.mark.parametrize("how", ["read", "write"])
def test_dies_with_mmu_lock(crew: Crew, how: str) -> None:
    machine = crew.machine
    assert lib.vm_create(machine.m, 64) == 0
    holder, waiter = start(crew, 0), start(crew, 1)
    held, go = threading.Event(), threading.Event()

    def hold(actor: Doer) -> None:
        take = lib.mmu_write_lock if how == "write" else lib.mmu_read_lock
        actor.cpu.check(take(actor.cpu.m, actor.cpu.id, VM0))
        held.set()
        go.wait(60)
        die(actor)

    def want(actor: Doer) -> int:
        held.wait(60)
        rc: int = lib.mmu_write_lock(actor.cpu.m, actor.cpu.id, VM0)
        actor.cpu.check(rc)
        lib.mmu_write_unlock(actor.cpu.m, actor.cpu.id, VM0)
        return rc

    holder.tell(hold)
    wanted = waiter.ask(want, block=False)
    held.wait(60)
    wait_until(lambda: bool(lib.mmu_lock_contended(machine.m, VM0)), "the waiter waits")
    go.set()
    with contextlib.suppress(MachineStopped, pykka.ActorDeadError):
        assert wanted.get(timeout=60) == 0
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
        go.wait(60)
        die(actor)

    reader.tell(read)
    inside.wait(60)
    waiting = updater.ask(
        lambda actor: actor.cpu.check(lib.synchronize_rcu(actor.cpu.m, actor.cpu.id)), block=False
    )
    go.set()
    with contextlib.suppress(MachineStopped, pykka.ActorDeadError):
        assert waiting.get(timeout=60) == 0
    assert crew.join() == []
    assert crew.deaths[0].held == ("an RCU read section",)


@pytest.mark.parametrize("when", ["idle", "in a grace period"])
def test_the_rcu_thread_dies(crew: Crew, when: str) -> None:
    """Waits for a grace period or for callbacks end; queued callbacks still run before the end."""
    machine = crew.machine
    reader, updater, barrier = (start(crew, i) for i in range(3))
    RcuThread.start(crew, machine.cpus[machine.pcpus + 3])
    m, thread, waiting = machine.m, crew.actors[-1], []
    wait_until(lambda: lib.cpu_power(m, thread.cpu.id) == lib.CPU_HALTED, "it waits for work")
    if when != "idle":
        read_until(reader, machine.m, threading.Event())
        frame = lib.ept_table_alloc(m, reader_cpu(crew), lib.FRAME_TABLE)
        lib.call_rcu(m, reader_cpu(crew), lib.RCU_FREE_FRAME, frame)
        for ref, wait in (updater, lib.synchronize_rcu), (barrier, lib.rcu_barrier):
            waiting.append(
                ref.ask(lambda actor, wait=wait: actor.cpu.check(wait(m, actor.cpu.id)), block=False)
            )
        wait_until(lambda: lib.rcu_holdout(m) == reader_cpu(crew), "the grace period waits for the reader")
    kill(thread)
    lib.cpu_notify(m, thread.cpu.id, lib.ATTENTION_MESSAGE)
    assert crew.stopped.wait(60)
    assert crew.join() == []
    assert [(death.who, death.cause.split(":")[0]) for death in crew.deaths] == [("rcu", "Killed")]
    for future in waiting:
        with pytest.raises((MachineStopped, pykka.ActorDeadError)):
            future.get(timeout=60)
    assert lib.rcu_pending(m) == (0 if when == "idle" else 1), "freeing the machine runs it"


def read_until(reader: pykka.ActorRef[Doer], m: Any, go: threading.Event) -> None:
    """The actor is inside an RCU read section from now on, until then or until the machine stops."""
    inside = threading.Event()

    def read(actor: Doer) -> None:
        rcu_enter(actor.cpu)
        inside.set()
        while not go.wait(0.01) and not lib.machine_stopping(m):
            pass
        lib.rcu_read_unlock(m, actor.cpu.id)

    reader.tell(read)
    assert inside.wait(60)


def reader_cpu(crew: Crew) -> CpuId:
    return CpuId(crew.machine.pcpus)


def test_a_message_to_the_rcu_thread_does_no_harm(crew: Crew) -> None:
    """It leaves its grace period and begins another: callbacks run once, in order, after the reader left."""
    machine = crew.machine
    reader, updater = start(crew, 0), start(crew, 1)
    RcuThread.start(crew, machine.cpus[machine.pcpus + 3])
    m, thread = machine.m, crew.actors[-1]
    go = threading.Event()
    read_until(reader, m, go)
    for _ in range(3):
        updater.ask(lambda actor: actor.cpu.check(lib.call_rcu(m, actor.cpu.id, lib.RCU_NOTHING, 0)))
        wait_until(lambda: lib.rcu_holdout(m) == reader_cpu(crew), "the grace period waits for the reader")
        lib.cpu_notify(m, thread.cpu.id, lib.ATTENTION_MESSAGE)
        wait_until(lambda: not lib.cpu_attention(m, thread.cpu.id) & lib.ATTENTION_MESSAGE, "it was seen")
    assert lib.rcu_pending(m) == 3
    go.set()
    updater.ask(lambda actor: actor.cpu.check(lib.rcu_barrier(m, actor.cpu.id)))
    assert lib.rcu_pending(m) == 0
    assert lib.counter_sum(m, lib.COUNT_RCU_INVOKED) == 3


def test_dies_inside_srcu(crew: Crew) -> None:
    """Nothing ends the dead reader's section; the machine's stop ends the wait for it."""
    machine = crew.machine
    assert lib.vm_create(machine.m, 64) == 0
    reader, updater = start(crew, 0), start(crew, 1)
    inside, go = threading.Event(), threading.Event()

    def read(actor: Doer) -> None:
        assert lib.srcu_read_lock(actor.cpu.m, actor.cpu.id, VM0) >= 0
        inside.set()
        go.wait(60)
        die(actor)

    reader.tell(read)
    inside.wait(60)
    waiting = updater.ask(
        lambda actor: actor.cpu.check(lib.synchronize_srcu(actor.cpu.m, actor.cpu.id, VM0)), block=False
    )
    cpu = CpuId(machine.pcpus + 1)
    wait_until(lambda: lib.cpu_power(machine.m, cpu) == lib.CPU_HALTED, "the updater waits")
    go.set()
    with pytest.raises((MachineStopped, pykka.ActorDeadError)):
        waiting.get(timeout=60)
    assert crew.join() == []
    assert [death.who for death in crew.deaths] == ["doer0"]


def broadcast_for_ever(actor: Doer) -> None:
    cpu = actor.cpu
    # A broadcast that finds no pCPU has nothing to wait for and does not see the stop.
    while not actor.crew.machine.stopping:
        cpu.check(lib.on_each_cpu(cpu.m, cpu.id, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT))


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
        # A halted pCPU executes no bytecode until it is woken.
        lib.cpu_notify(crew.machine.m, CPU1, lib.ATTENTION_MESSAGE)
        assert crew.stopped.wait(60)
        assert crew.join() == []
        assert [death.cause.split(":")[0] for death in crew.deaths] == ["Killed"]


def test_dies_in_on_start(crew: Crew) -> None:
    class Stillborn(Doer):
        def on_start(self) -> None:
            raise ValueError("no")

    ref = Stillborn.start(crew, crew.machine.cpus[2], "stillborn")
    assert crew.stopped.wait(60)
    assert crew.join() == []
    assert crew.deaths[0].cause == "ValueError: no"
    with pytest.raises(pykka.ActorDeadError):
        ref.ask(lambda actor: None)


@pytest.mark.slow
def test_boot_and_stop_of_many_pcpus() -> None:
    with crew_of(small_machine(pcpus=1024)) as crew:
        refs = [PCpu.start(crew, cpu) for cpu in crew.machine.cpus[:1024]]
        assert all(ref.is_alive() for ref in refs)
        m, ids = crew.machine.m, [CpuId(i) for i in range(1024)]
        wait_until(lambda: all(lib.cpu_power(m, cpu) == lib.CPU_HALTED for cpu in ids), "all halt")
        crew.stop()
        assert crew.join() == []
