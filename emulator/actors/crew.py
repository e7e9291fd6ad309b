"""The crew of one machine: its actors, their deaths, and stopping and joining them."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from emulator.errors import BadInput
from native import lib
from native.types import VmId

if TYPE_CHECKING:
    from emulator.actors.base import Death, MachineActor
    from emulator.machine.runtime import Cpu, Machine

# Time for all actors to end.  Each beyond STOP_ACTORS adds STOP_SECONDS_EACH, because all need the GIL.
STOP_SECONDS = 2.0
STOP_ACTORS = 256
STOP_SECONDS_EACH = 0.01
# A thread that waits for the GIL wakes once per interval to request it.  When a machine stops, all threads
# wait for the GIL, and each needs it for a moment only.
STOP_SWITCH_INTERVAL = 1.0


def stop_seconds(actors: int) -> float:
    """Return the time that this number of actors may take to end once their machine stops."""
    return STOP_SECONDS + STOP_SECONDS_EACH * max(0, actors - STOP_ACTORS)


class Crew:
    """The actors of a machine.

    Any thread may note `events` without waiting; one reporter prints them.
    """

    def __init__(self, machine: Machine, main: Cpu) -> None:
        self.machine = machine
        # The CPU of the thread that boots and supervises the machine.
        self.main = main
        self.actors: list[MachineActor] = []
        self.deaths: deque[Death] = deque()
        self.events: deque[tuple[str, dict[str, Any]]] = deque(maxlen=10_000)
        # vCPUs that ended in a triple fault.
        self.shut_down: deque[int] = deque()
        self.stopped = threading.Event()
        self._interval: float | None = None  # as it was before `stop`, until `join`

    def enlist(self, actor: MachineActor) -> None:
        self.actors.append(actor)

    def note(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def what_holds(self, cpu: Cpu) -> tuple[str, ...]:
        """Return in words the locks and sections that a CPU holds and that other CPUs may wait for."""
        held = []
        if lib.irqs_disabled(cpu.m, cpu.id):
            held.append("interrupts off")
        depth = lib.rcu_read_depth(cpu.m, cpu.id)
        if depth:
            held.append("an RCU read section" if depth == 1 else f"{depth} nested RCU read sections")
        for vm in map(VmId, range(self.machine.config["vms"])):
            kind = lib.mmu_lock_held(cpu.m, cpu.id, vm)
            if kind:
                held.append(f"mmu_lock of VM {vm} for {'write' if kind == 2 else 'read'}")
        return tuple(held)

    def let_go(self, cpu: Cpu) -> None:
        """Drop the locks of `cpu`, acknowledge its calls, leave RCU, because its thread ends."""
        lib.mmu_locks_abandon(cpu.m, cpu.id)
        lib.cpu_offline(cpu.m, cpu.id)

    def report_death(self, death: Death) -> None:
        self.deaths.append(death)
        if not isinstance(death.error, BadInput):
            self.note("actor died", who=death.who, cpu=death.cpu, cause=death.cause)
        self.stop()

    def bad_input(self) -> BadInput | None:
        """Return the user's error that ended an actor, such as a policy that failed, or None."""
        return next((d.error for d in self.deaths if isinstance(d.error, BadInput)), None)

    def stop(self) -> None:
        """Stop the machine: every wait returns, every guest leaves guest mode, every actor's loop ends."""
        if len(self.actors) > STOP_ACTORS and self._interval is None:
            self._interval = sys.getswitchinterval()
            sys.setswitchinterval(STOP_SWITCH_INTERVAL)
        lib.machine_stop(self.machine.m)
        self.stopped.set()

    def join(self, seconds: float | None = None) -> list[str]:
        """Wait for the threads; return the names of those that did not end."""
        deadline = time.monotonic() + (stop_seconds(len(self.actors)) if seconds is None else seconds)
        late = []
        for actor in self.actors:
            thread = actor.thread
            if thread is None or thread is threading.current_thread():
                continue
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                late.append(actor.name)
        if self._interval is not None:
            sys.setswitchinterval(self._interval)
            self._interval = None
        return late
