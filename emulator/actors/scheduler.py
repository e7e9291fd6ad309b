"""The host's scheduler: which vCPU runs on which pCPU.

It only tells: the source pCPU hands the vCPU on to its destination as soon as it is preemptible there, and
the scheduler learns of the arrival from the task itself.  So many migrations are under way at once and none
costs a round trip.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from emulator.actors.base import MachineActor
from emulator.actors.inbox import NativeFuture
from emulator.actors.pcpu import Arrive, Depart, Park, Unpark
from emulator.workload import MIGRATIONS, Pacer, Workload
from native import lib

if TYPE_CHECKING:
    from pykka import ActorRef, Future

    from emulator.actors.crew import Crew
    from emulator.actors.task import VcpuTask
    from emulator.runtime import Cpu

_BALANCE_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Place:
    """Let these tasks run, the first on pCPU 0 and so on around."""

    tasks: tuple[VcpuTask, ...]


@dataclass(frozen=True, slots=True)
class Pause:
    """Let no vCPU of the VM run. Answer: futures, one per vCPU, set when it stands still."""

    vm: int


@dataclass(frozen=True, slots=True)
class Resume:
    vm: int


class Scheduler(MachineActor):
    def __init__(
        self,
        crew: Crew,
        cpu: Cpu,
        pcpus: Sequence[ActorRef[Any]],
        workload: Workload,
        mode: str,
        rng: Random,
    ) -> None:
        super().__init__(crew, cpu, "scheduler")
        self.pcpus = pcpus
        self.rng = rng
        self.mode = mode
        self.pacer = Pacer(workload, (MIGRATIONS,), 1.0, rng)
        # Where each task was last sent; it is there when task.pcpu says so.
        self.placement: dict[VcpuTask, int] = {}
        self.paused: set[int] = set()
        self.sent = 0

    def on_receive(self, message: Place | Pause | Resume) -> list[Future[None]] | None:
        if isinstance(message, Place):
            for i, task in enumerate(message.tasks):
                self.placement[task] = i % len(self.pcpus)
                self.pcpus[i % len(self.pcpus)].tell(Arrive(task))
        elif isinstance(message, Pause):
            return self._pause(message.vm)
        elif isinstance(message, Resume):
            self.paused.discard(message.vm)
            for task in self._tasks_of(message.vm):
                self._pcpu_of(task).tell(Unpark(task))
        return None

    def _pause(self, vm: int) -> list[Future[None]]:
        self.paused.add(vm)
        parked: list[Future[None]] = []
        for task in self._tasks_of(vm):
            future: NativeFuture[None] = NativeFuture()
            self._pcpu_of(task).tell(Park(task, future))
            parked.append(future)
        return parked

    def _tasks_of(self, vm: int) -> list[VcpuTask]:
        return [task for task in self.placement if task.vm == vm]

    def _pcpu_of(self, task: VcpuTask) -> ActorRef[Any]:
        return self.pcpus[self.placement[task]]

    def idle(self) -> None:
        microseconds = 0
        if self.mode == "storm":
            microseconds = self._storm()
        elif self.mode == "balance":
            self._balance()
            microseconds = int(_BALANCE_SECONDS * 1e6)
        self.cpu.check(lib.cpu_halt(self.cpu.m, self.cpu.id, microseconds))

    def _storm(self) -> int:
        """All migrations that are due; returns microseconds until the next."""
        while True:
            activity, wait = self.pacer.next(time.monotonic())
            if activity is None:
                return max(200, int(wait * 1e6))
            movable = [task for task in self.placement if self._may_move(task)]
            if not movable:
                # All are on their way already: as fast as it goes.
                return 200
            task = self.rng.choice(movable)
            others = [i for i in range(len(self.pcpus)) if i != self.placement[task]]
            self._move(task, self.rng.choice(others))

    def _balance(self) -> None:
        """Move one task from the pCPU with the most to the one with the least."""
        load = [0] * len(self.pcpus)
        for pcpu in self.placement.values():
            load[pcpu] += 1
        most, least = load.index(max(load)), load.index(min(load))
        if load[most] - load[least] < 2:
            return
        for task, pcpu in self.placement.items():
            if pcpu == most and self._may_move(task):
                self._move(task, least)
                return

    def _may_move(self, task: VcpuTask) -> bool:
        return task.pcpu == self.placement[task] and task.vm not in self.paused

    def _move(self, task: VcpuTask, to: int) -> None:
        source = self._pcpu_of(task)
        self.placement[task] = to
        self.sent += 1
        source.tell(Depart(task, self.pcpus[to]))
