"""A physical CPU: one real OS thread, a run queue of vCPUs, and `hlt` when there is nothing to run.

The pCPU's loop is its inbox: while no message waits it runs one turn of the vCPU at the head of its queue,
and without a vCPU it halts natively.  Messages and interrupts end both.  Nothing on this thread waits in
Python or writes to a log.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emulator.actors.base import MachineActor
from emulator.kvm.kvm_host import HALTED, PREEMPTIBLE, RESCHED, ExitToUser
from native import lib

if TYPE_CHECKING:
    from pykka import ActorRef, Future

    from emulator.actors.crew import Crew
    from emulator.actors.task import VcpuTask
    from emulator.kvm.kvm_host import RunYield
    from emulator.machine.runtime import Cpu

# Time until user space retries an access that the host refused.
_RETRY_SECONDS = 0.0001


@dataclass(frozen=True, slots=True)
class Arrive:
    """Take over the task, which runs here from now on."""

    task: VcpuTask


@dataclass(frozen=True, slots=True)
class Depart:
    """Send the task to another pCPU, from the preemptible point in its code where it stands."""

    task: VcpuTask
    to: ActorRef[Any]


@dataclass(frozen=True, slots=True)
class Park:
    """Do not run the task until Unpark; `parked` is set as soon as the task has stopped."""

    task: VcpuTask
    parked: Future[None]


@dataclass(frozen=True, slots=True)
class Unpark:
    task: VcpuTask


Command = Arrive | Depart | Park | Unpark


class PCpu(MachineActor):
    """One physical CPU."""

    def __init__(self, crew: Crew, cpu: Cpu) -> None:
        super().__init__(crew, cpu, f"pcpu{cpu.id}")
        self.run_queue: deque[VcpuTask] = deque()
        self.blocked: list[VcpuTask] = []
        self.parked: set[VcpuTask] = set()
        # Tasks to park as soon as they hold nothing.
        self.parking: dict[VcpuTask, Future[None]] = {}
        # The task of the vCPU that is loaded (kvm_running_vcpu).
        self.current: VcpuTask | None = None
        # Commands of the scheduler that overtook their task, which is on its way here from another pCPU.
        self.early: dict[VcpuTask, list[Command]] = {}

    def on_receive(self, message: Command) -> None:
        task = message.task
        if isinstance(message, Arrive):
            self._arrive(task)
        elif task.pcpu != self.cpu.id:
            self.early.setdefault(task, []).append(message)
        else:
            self._obey(message)

    def _arrive(self, task: VcpuTask) -> None:
        task.pcpu = self.cpu.id
        self._enqueue(task)
        # A Depart among them takes the task away again, and those after it wait for its return.
        for command in self.early.pop(task, []):
            self.on_receive(command)

    def _obey(self, command: Command) -> None:
        task = command.task
        if isinstance(command, Depart):
            self._dequeue(task)
            task.pcpu = -1
            command.to.tell(Arrive(task))
        elif isinstance(command, Park):
            self.parking[task] = command.parked
            if task.finished or task.state is not PREEMPTIBLE:
                self._park(task)
        elif isinstance(command, Unpark):
            self.parked.discard(task)
            self._enqueue(task)

    def _park(self, task: VcpuTask) -> None:
        """Park a task that holds nothing; parked inside a read section it would hold up memslot updates."""
        parked = self.parking.pop(task)
        self._dequeue(task)
        self.parked.add(task)
        parked.set(None)

    def _enqueue(self, task: VcpuTask) -> None:
        if not task.finished:
            self.run_queue.append(task)

    def _dequeue(self, task: VcpuTask) -> None:
        if task.finished:
            return
        if self.current is task:
            self._switch_to(None)
        if task in self.parked:
            self.parked.discard(task)
        elif task in self.blocked:
            self.blocked.remove(task)
        else:
            self.run_queue.remove(task)

    def _switch_to(self, task: VcpuTask | None) -> None:
        """__schedule(): call the preempt notifiers of the leaving and of the arriving task."""
        if self.current is task:
            return
        if self.current is not None:
            self.current.switch_out(self.cpu)
        self.current = task
        if task is not None:
            task.switch_in(self.cpu)

    def idle(self) -> None:
        if self.blocked:
            self._wake_blocked()
        if self.run_queue:
            self._run(self.run_queue[0])
        else:
            self._halt()

    def _run(self, task: VcpuTask) -> None:
        """Let the task run until a message waits, it is another task's turn, or it cannot go on."""
        self._switch_to(task)
        while self.inbox.empty():
            state = task.resume(self.cpu)
            if state is PREEMPTIBLE:
                continue
            if isinstance(state, ExitToUser) and state.reason == "shutdown":
                self._shut_down(task)
            if task in self.parking:
                self._park(task)
                return
            if state is RESCHED:
                if len(self.run_queue) > 1 or self.blocked:
                    self.run_queue.rotate(-1)
                    return
            elif not self._leave_guest(task, state):
                return

    def _leave_guest(self, task: VcpuTask, state: RunYield) -> bool:
        """Handle a task that halted or returned to user space; return whether it may go on at once."""
        if isinstance(state, ExitToUser) and state.reason in ("mmio", "io"):
            # User space has emulated the access or the instruction.
            return True
        if task.finished:
            return False
        self.run_queue.remove(task)
        task.wake_at = time.monotonic() + (task.halt_seconds if state is HALTED else _RETRY_SECONDS)
        self.blocked.append(task)
        return False

    def _shut_down(self, task: VcpuTask) -> None:
        self.run_queue.remove(task)
        self.current = None
        task.finished = True
        self.crew.note("vCPU shut down", vcpu=task.vcpu.id, vm=task.vm, pcpu=self.cpu.id)
        self.crew.shut_down.append(task.vcpu.id)

    def _wake_blocked(self) -> None:
        now = time.monotonic()
        for task in [task for task in self.blocked if task.wake_at <= now]:
            self.blocked.remove(task)
            self.run_queue.append(task)

    def _halt(self) -> None:
        # A blocked vCPU is scheduled out; its VMCS stays loaded.
        self._switch_to(None)
        microseconds = 0
        if self.blocked:
            soonest = min(task.wake_at for task in self.blocked)
            microseconds = max(1, int((soonest - time.monotonic()) * 1e6))
        self.cpu.check(lib.cpu_halt(self.cpu.m, self.cpu.id, microseconds))
