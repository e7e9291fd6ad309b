"""Inbox and future: waits are native, and no wait is endless."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pykka
import pytest

from emulator.actors.base import MachineActor
from emulator.actors.crew import Crew
from emulator.actors.inbox import NativeFuture, current_cpu
from emulator.actors.pcpu import PCpu
from emulator.machine.runtime import MachineStopped
from native import lib
from tests.emulator.actors.crews import crew_of, small_machine
from tests.support import CPU0, CPU1, wait_until


@pytest.fixture(name="crew")
def _crew() -> Iterator[Crew]:
    with crew_of(small_machine()) as crew:
        yield crew


class Echo(MachineActor):
    """Answers questions, and performs requests."""

    def on_receive(self, message: Any) -> Any:
        return message(self) if callable(message) else message


def echo(crew: Crew, number: int = 0) -> pykka.ActorRef[Echo]:
    machine = crew.machine
    return Echo.start(crew, machine.cpus[machine.pcpus + number], f"echo{number}")


def test_ask_from_a_foreign_thread(crew: Crew) -> None:
    assert echo(crew).ask("hello") == "hello"


def test_ask_between_actors_waits_on_the_own_cpu(crew: Crew) -> None:
    first, second = echo(crew, 0), echo(crew, 1)

    def forward(actor: Echo) -> tuple[Any, Any]:
        return current_cpu(), second.ask(lambda other: current_cpu())

    mine, theirs = first.ask(forward)
    assert (mine, theirs) == tuple(crew.machine.cpus[2:4])
    assert current_cpu() is None


def test_messages_keep_their_order(crew: Crew) -> None:
    seen: list[int] = []
    ref = echo(crew)
    for i in range(1000):
        ref.tell(lambda actor, i=i: seen.append(i))
    ref.ask("done")
    assert seen == list(range(1000))


def test_many_senders_lose_no_message(crew: Crew) -> None:
    ref = echo(crew)
    seen: list[int] = []

    def send() -> None:
        for _ in range(500):
            ref.tell(lambda actor: seen.append(1))

    senders = [threading.Thread(target=send) for _ in range(4)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    ref.ask("done")
    assert len(seen) == 2000


def test_timeout_of_a_foreign_thread(crew: Crew) -> None:
    with pytest.raises(pykka.Timeout):
        echo(crew).ask(lambda actor: time.sleep(0.2), timeout=0.01)


def test_timeout_on_a_cpu(crew: Crew) -> None:
    first, second = echo(crew, 0), echo(crew, 1)

    def impatient(actor: Echo) -> str:
        try:
            second.ask(lambda other: time.sleep(0.2), timeout=0.01)
        except pykka.Timeout:
            return "timed out"
        return "answered"

    assert first.ask(impatient) == "timed out"


def test_future_is_set_once_and_read_often() -> None:
    future: NativeFuture[int] = NativeFuture()
    future.set(1)
    assert [future.get(), future.get()] == [1, 1]
    with pytest.raises(queue.Full):
        future.set(2)


def test_map_reduce_and_get_all_work(crew: Crew) -> None:
    ref = echo(crew)
    futures = [ref.ask(i, block=False) for i in range(5)]
    assert pykka.get_all([future.map(lambda x: x * x) for future in futures]) == [0, 1, 4, 9, 16]


def test_stop_answers_and_later_messages_are_refused(crew: Crew) -> None:
    ref = echo(crew)
    assert ref.stop() is True
    with pytest.raises(pykka.ActorDeadError):
        ref.ask("anyone?")
    with pytest.raises(pykka.ActorDeadError):
        ref.tell("anyone?")


def test_messages_that_wait_for_a_stopped_actor_are_answered(crew: Crew) -> None:
    ref = echo(crew)
    entered, leave = threading.Event(), threading.Event()

    def linger(actor: Echo) -> None:
        entered.set()
        leave.wait(60)

    ref.tell(linger)
    entered.wait(60)
    stop = ref.stop(block=False)
    futures = [ref.ask("too late", block=False) for _ in range(10)]
    leave.set()
    assert stop.get(timeout=60) is True
    for future in futures:
        with pytest.raises(pykka.ActorDeadError):
            future.get(timeout=60)


def test_a_message_put_after_the_end_is_answered(crew: Crew) -> None:
    """ActorRef.ask tests is_alive and puts afterwards: the actor may end in between."""
    ref = echo(crew)
    ref.stop()
    future: NativeFuture[None] = NativeFuture()
    ref.actor_inbox.put(pykka._envelope.Envelope("late", reply_to=future))
    with pytest.raises(pykka.ActorDeadError):
        future.get(timeout=60)


def test_machine_stop_ends_waits_and_actors(crew: Crew) -> None:
    first, second = echo(crew, 0), echo(crew, 1)
    never: NativeFuture[None] = NativeFuture()
    waiting = first.ask(lambda actor: never.get(), block=False)
    queued = first.ask("behind it", block=False)
    crew.stop()
    for future in (waiting, queued):
        with pytest.raises((MachineStopped, pykka.ActorDeadError)):
            future.get(timeout=60)
    assert crew.join() == []
    assert not crew.deaths
    assert not second.is_alive()


def test_a_waiting_cpu_serves_calls(crew: Crew) -> None:
    """A pCPU that awaits a future takes interrupts: two that flush each other do not deadlock."""
    machine = crew.machine
    refs = [PCpu.start(crew, machine.cpus[i]) for i in range(2)]
    sender = echo(crew)

    def broadcast(actor: Echo) -> int:
        cpu = actor.cpu
        return sum(
            cpu.check(lib.on_each_cpu(cpu.m, cpu.id, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT)) for _ in range(100)
        )

    wait_until(lambda: all(lib.cpu_power(machine.m, i) == lib.CPU_HALTED for i in (CPU0, CPU1)), "pCPUs halt")
    assert sender.ask(broadcast, timeout=10) == 200
    assert all(ref.is_alive() for ref in refs)
