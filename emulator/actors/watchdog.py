"""Detection of actors that wait for ever.

Wall time alone proves nothing: machines pause, and a thread may wait long for a core.  A stall is

* a CPU that *burns* seconds of CPU time without taking the calls that wait for it, or without leaving the RCU
  read section that a grace period waits for; or
* a CPU that *sleeps one sleep*, its context switches counted by the kernel, over many rounds in which this
  watchdog itself ran on time, while calls, a grace period or waiters for its mmu_lock depend on it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from native import VIOLATION_KINDS, ffi, lib
from native.types import CpuId, VmId

if TYPE_CHECKING:
    from emulator.actors.base import MachineActor
    from emulator.actors.crew import Crew
    from emulator.machine.runtime import Machine

Kind = Literal["ipi-stall", "rcu-stall", "deadlock"]

# Enough for any honest Python between two native calls, GIL and loaded machine included.
BURN_SECONDS = 3.0
# Rounds asleep; counted in rounds of this thread, not in seconds.
SLEEP_ROUNDS = 50
ROUND_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Stall:
    kind: Kind
    who: str
    cpu: CpuId
    waits_for: str
    doing: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.waits_for} waits for {self.who} (CPU {self.cpu}), which {self.doing}"


@dataclass(slots=True)
class Suspicion:
    """The state of a CPU without progress when another actor was first seen to depend on it."""

    progress: object
    cpu_time: float
    switches: int
    rounds: int = 0


@dataclass(slots=True)
class Watchdog:
    crew: Crew
    suspicions: dict[tuple[str, CpuId, int], Suspicion] = field(default_factory=dict)
    reported: set[tuple[str, CpuId, int]] = field(default_factory=set)

    @property
    def machine(self) -> Machine:
        return self.crew.machine

    def check(self) -> list[Stall]:
        """Do one round, about every ROUND_SECONDS; return the stalls found in it, each reported once."""
        stalls = []
        depended_on: set[tuple[str, CpuId, int]] = set()
        actors = {actor.cpu.id: actor for actor in self.crew.actors}
        for kind, cpu, detail, waits_for, progress in self._dependencies():
            key = (kind, cpu, detail)
            depended_on.add(key)
            doing = self._suspect(key, actors.get(cpu), progress)
            if doing and key not in self.reported:
                self.reported.add(key)
                who = actors[cpu].name if cpu in actors else "no thread"
                stalls.append(Stall(_stall_kind(kind), who, cpu, waits_for, doing))
        for key in self.suspicions.keys() - depended_on:
            del self.suspicions[key]
        return stalls

    def _dependencies(self) -> Iterator[tuple[str, CpuId, int, str, object]]:
        """Yield (kind, CPU depended on, VM or 0, waiter, a value that changes when that CPU progresses)."""
        m = self.machine.m
        values = ffi.new("uint64_t[]", lib.COUNTERS)
        for cpu in map(CpuId, range(self.machine.pcpus)):
            if lib.ipi_pending(m, cpu):
                lib.counters_read(m, cpu, values)
                yield "ipi", cpu, 0, "a sender of calls", values[lib.COUNT_CALLS_RUN]
        holdout = lib.rcu_holdout(m)
        if holdout >= 0:
            lib.counters_sum(m, values)
            yield "rcu", CpuId(holdout), 0, "a grace period", values[lib.COUNT_GRACE_PERIODS]
        for vm in map(VmId, range(self.machine.config["vms"])):
            holder = lib.mmu_lock_holder(m, vm) if lib.mmu_lock_contended(m, vm) else -1
            if holder >= 0:
                yield "mmu_lock", CpuId(holder), vm, f"a CPU that wants mmu_lock of VM {vm}", None

    def _suspect(self, key: tuple[str, CpuId, int], actor: MachineActor | None, progress: object) -> str:
        """Return in words how the CPU has made no progress for too long, or an empty string."""
        state = _thread_state(actor)
        if state is None:
            return ""
        cpu_time, switches = state
        suspicion = self.suspicions.get(key)
        if suspicion is None or suspicion.progress != progress:
            self.suspicions[key] = Suspicion(progress, cpu_time, switches)
            return ""
        if switches != suspicion.switches:
            suspicion.switches, suspicion.rounds = switches, 0
        suspicion.rounds += 1
        burned = cpu_time - suspicion.cpu_time
        # A lock may be held busily for long; a holder is stuck only if it sleeps.
        if burned >= BURN_SECONDS and key[0] != "mmu_lock":
            return f"used {burned:.1f}s of CPU time without coming to it"
        if suspicion.rounds >= SLEEP_ROUNDS and burned < ROUND_SECONDS:
            return "sleeps and is not woken"
        return ""

    def report(self, stall: Stall) -> None:
        """Record the stall with the oracle, as one more violation."""
        report = ffi.new("struct violation_report *")
        report.kinds = 1 << VIOLATION_KINDS.index(stall.kind)
        # The core records the reporting CPU as the CPU of the report; the stalled CPU goes here.
        report.promise_cpu = stall.cpu
        report.time = time.monotonic_ns()
        lib.oracle_report(self.machine.m, self.crew.main.id, report)


def _stall_kind(what: str) -> Kind:
    kinds: dict[str, Kind] = {"ipi": "ipi-stall", "rcu": "rcu-stall"}
    return kinds.get(what, "deadlock")


def _thread_state(actor: MachineActor | None) -> tuple[float, int] | None:
    """Return CPU seconds and context switches of an actor's thread; None if it has none (any more)."""
    thread: Any = actor.thread if actor is not None else None
    if thread is None or thread.native_id is None or not thread.is_alive():
        return None
    with contextlib.suppress(OSError, ValueError):
        cpu_time = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        switches = int(fields["voluntary_ctxt_switches"]) + int(fields["nonvoluntary_ctxt_switches"])
        return cpu_time, switches
    return None
