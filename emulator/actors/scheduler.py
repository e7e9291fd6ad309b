"""The host's scheduler: which vCPU runs on which pCPU.

It sends commands without waiting for answers: the source pCPU hands the vCPU on to its destination as soon as
the vCPU is preemptible, and the scheduler reads the arrival from the task itself.  So many migrations are
under way at once and none costs a round trip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from random import Random
from typing import TYPE_CHECKING, Any

from emulator.actors.base import MachineActor
from emulator.actors.inbox import NativeFuture
from emulator.actors.pcpu import Arrive, Depart, Park, Unpark
from emulator.scenario.workload import MIGRATIONS, Pacer, Workload
from native import lib

if TYPE_CHECKING:
    from pykka import ActorRef, Future

    from emulator.actors.crew import Crew
    from emulator.actors.task import VcpuTask
    from emulator.machine.runtime import Cpu

_BALANCE_SECONDS = 0.01
# Blind tries before looking at every task.
_PICKS = 4


@dataclass(frozen=True, slots=True)
class Place:
    """Let these tasks run, each on a pCPU of the range given with it; ranges are used in turn."""

    tasks: tuple[tuple[VcpuTask, range], ...]


@dataclass(frozen=True, slots=True)
class Pause:
    """Let no vCPU of the VM run.  The answer has a future per vCPU, which is set when that has stopped."""

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
        # The pCPU to which each task was last sent; the task has arrived when task.pcpu equals it.
        self.placement: dict[VcpuTask, int] = {}
        # Tasks with more than one possible pCPU, and the range of these.
        self.homes: dict[VcpuTask, range] = {}
        self.movable: list[VcpuTask] = []
        self.paused: set[int] = set()
        self.sent = 0

    def on_receive(self, message: Place | Pause | Resume) -> list[Future[None]] | None:
        if isinstance(message, Place):
            self._place(message.tasks)
        elif isinstance(message, Pause):
            return self._pause(message.vm)
        elif isinstance(message, Resume):
            self.paused.discard(message.vm)
            for task in self._tasks_of(message.vm):
                self._pcpu_of(task).tell(Unpark(task))
        return None

    def _place(self, tasks: Iterable[tuple[VcpuTask, range]]) -> None:
        turns: dict[range, Iterator[int]] = {}
        for task, home in tasks:
            pcpu = next(turns.setdefault(home, cycle(home)))
            self.placement[task] = pcpu
            self.homes[task] = home
            if len(home) > 1:
                self.movable.append(task)
            self.pcpus[pcpu].tell(Arrive(task))

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
        """Start all migrations that are due; return the microseconds until the next."""
        while True:
            activity, wait = self.pacer.next()
            if activity is None:
                return max(200, int(wait * 1e6))
            task = self._pick()
            if task is None:
                # All tasks are on their way already, so no more can be started now.
                return 200
            self._move(task, self._elsewhere(task))

    def _pick(self) -> VcpuTask | None:
        """Return a task that may move; try some at random first, to avoid checking many hundreds."""
        for _ in range(_PICKS):
            if self.movable and self._may_move(task := self.rng.choice(self.movable)):
                return task
        movable = [task for task in self.movable if self._may_move(task)]
        return self.rng.choice(movable) if movable else None

    def _elsewhere(self, task: VcpuTask) -> int:
        home = self.homes[task]
        pcpu = self.rng.randrange(home.start, home.stop - 1)
        return pcpu + (pcpu >= self.placement[task])

    def _balance(self) -> None:
        """Move one task from the pCPU with the most tasks to the least loaded one that it may use."""
        load = [0] * len(self.pcpus)
        for pcpu in self.placement.values():
            load[pcpu] += 1
        most = load.index(max(load))
        for task in self.movable:
            if self.placement[task] != most or not self._may_move(task):
                continue
            least = min(self.homes[task], key=load.__getitem__)
            if load[most] - load[least] >= 2:
                self._move(task, least)
                return

    def _may_move(self, task: VcpuTask) -> bool:
        return task.pcpu == self.placement[task] and task.vm not in self.paused

    def _move(self, task: VcpuTask, to: int) -> None:
        source = self._pcpu_of(task)
        self.placement[task] = to
        self.sent += 1
        source.tell(Depart(task, self.pcpus[to]))
