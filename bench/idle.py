"""Very many idle pCPUs: a broadcast to them, their boot and their stop, beside as many plain pykka actors.

Both sides are measured as they are used: pCPUs are the emulator's own actors, halted in the core; plain
actors wait in pykka's inbox, and all are asked before the first answer is awaited.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import pykka

from bench.benchmark import Context
from bench.errors import BenchFailed
from bench.figures import Figure
from bench.machine import machine_fields
from emulator.actors.crew import Crew
from emulator.actors.pcpu import PCpu
from emulator.job.emulation import SWITCH_INTERVAL
from emulator.machine.runtime import Machine
from native import ffi, lib

_PATIENCE_SECONDS = 60.0


class PlainActor(pykka.ThreadingActor):
    def __init__(self, threads: list[threading.Thread]) -> None:
        super().__init__()
        self._threads = threads

    def on_start(self) -> None:
        self._threads.append(threading.current_thread())

    def on_receive(self, message: object) -> object:
        return message


@dataclass(slots=True)
class Times:
    """Times of one side in microseconds, one per repeat."""

    boot: list[float] = field(default_factory=list)
    broadcast: list[float] = field(default_factory=list)
    stop: list[float] = field(default_factory=list)


def idle(context: Context) -> Iterator[Figure]:
    sizes, pcpus, actors = context.sizes, Times(), Times()
    for repeat in range(sizes.idle_repeats):
        context.say(f"{sizes.idle_pcpus} idle pCPUs: {repeat + 1} of {sizes.idle_repeats}")
        try:
            measure_pcpus(pcpus, sizes.idle_pcpus, sizes.idle_rounds)
            measure_actors(actors, sizes.idle_pcpus, sizes.idle_rounds)
        except RuntimeError as error:
            # "can't start new thread"
            raise BenchFailed(f"{sizes.idle_pcpus} threads: {error}") from None
    n = sizes.idle_pcpus
    yield _figure(
        f"on_each_cpu to {n} idle pCPUs",
        "with wait; all halted",
        pcpus.broadcast,
        f"pykka ask to {n} plain actors",
        actors.broadcast,
        wanted="ratio >= 50",
    )
    yield _figure(
        f"boot of {n} pCPUs",
        "from nothing until all are halted, threads and TLBs made",
        pcpus.boot,
        f"start of {n} plain actors",
        actors.boot,
    )
    yield _figure(
        f"stop of {n} pCPUs",
        "until all threads have ended and the memory is free",
        pcpus.stop,
        f"stop of {n} plain actors",
        actors.stop,
    )


def _figure(
    name: str, what: str, values: list[float], reference_name: str, references: list[float], wanted: str = ""
) -> Figure:
    return Figure(
        name=name,
        what=what,
        unit="us",
        values=tuple(values),
        reference_name=reference_name,
        references=tuple(references),
        ratio_of="reference/value",
        wanted=wanted,
    )


def measure_pcpus(times: Times, pcpus: int, rounds: int) -> None:
    with _switch_interval(SWITCH_INTERVAL):
        started = time.perf_counter_ns()
        machine = Machine(_config(pcpus))
        crew = Crew(machine, machine.cpus[pcpus])
        try:
            for cpu in machine.cpus[:pcpus]:
                PCpu.start(crew, cpu)
            _wait_until_halted(machine)
            times.boot.append(_since(started))
            times.broadcast.append(_broadcast(machine, rounds))
        finally:
            started = time.perf_counter_ns()
            crew.stop()
            late = crew.join(_PATIENCE_SECONDS)
        if late:
            raise BenchFailed(f"{len(late)} of {pcpus} pCPUs did not stop")
        machine.destroy()
        times.stop.append(_since(started))
    if crew.deaths:
        raise BenchFailed(str(crew.deaths[0]))


def measure_actors(times: Times, actors: int, rounds: int) -> None:
    threads: list[threading.Thread] = []
    started = time.perf_counter_ns()
    refs = [PlainActor.start(threads) for _ in range(actors)]
    _wait_until(lambda: len(threads) == actors, "plain actors did not start")
    times.boot.append(_since(started))
    try:
        samples = []
        for number in range(rounds):
            started = time.perf_counter_ns()
            answers = pykka.get_all([ref.ask(number, block=False) for ref in refs])
            samples.append(_since(started))
            if list(answers) != [number] * actors:
                raise BenchFailed("a plain actor gave another answer")
        times.broadcast.append(median(samples))
    finally:
        started = time.perf_counter_ns()
        pykka.get_all([ref.stop(block=False) for ref in refs])
        for thread in threads:
            thread.join()
        times.stop.append(_since(started))


def _broadcast(machine: Machine, rounds: int) -> float:
    """Return the median microseconds of on_each_cpu() from the main thread's CPU."""
    sender = machine.cpus[machine.pcpus]
    before, samples = _calls_run(machine), []
    for _ in range(rounds):
        started = time.perf_counter_ns()
        called = lib.on_each_cpu(machine.m, sender.id, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT)
        samples.append(_since(started))
        if called != machine.pcpus:
            raise BenchFailed(f"{called} of {machine.pcpus} pCPUs called")
    run = _calls_run(machine) - before
    if run != rounds * machine.pcpus:
        raise BenchFailed(f"{rounds} broadcasts to {machine.pcpus} pCPUs ran {run} calls")
    return median(samples)


def _calls_run(machine: Machine) -> int:
    counters = ffi.new("uint64_t[]", lib.COUNTERS)
    lib.counters_sum(machine.m, counters)
    return int(counters[lib.COUNT_CALLS_RUN])


def _wait_until_halted(machine: Machine) -> None:
    waiting = machine.cpus[: machine.pcpus]

    def all_halted() -> bool:
        while waiting and lib.cpu_power(machine.m, waiting[-1].id) == lib.CPU_HALTED:
            waiting.pop()
        return not waiting

    _wait_until(all_halted, "pCPUs did not halt")


def _wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise BenchFailed(f"{otherwise} in {_PATIENCE_SECONDS:g} s")
        # Let the threads run that the loop waits for.
        time.sleep(0)


def _config(pcpus: int) -> dict[str, int]:
    """Return a machine's configuration with the least memory: no VM ever runs."""
    return machine_fields(
        pcpus=pcpus, housekeeping=1, vms=1, vcpus=1, root_frames=8, table_frames=8, guest_frames=16
    )


def _since(started: int) -> float:
    return (time.perf_counter_ns() - started) / 1000


@contextmanager
def _switch_interval(seconds: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
