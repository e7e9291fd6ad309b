"""The vCPUs that stay in guest mode while the host changes their VM's memory: a flush interrupts them.

A trace tells them in two ways: an IPI of kvm_make_all_cpus_request() has the CPUs of those that were in guest
mode; in a trace without such events a vCPU is in guest mode from kvm_entry to kvm_exit.  The flush comes some
time after the first SPTE that it is for, so the vCPUs are those at the flush: they stay in guest mode from
before the event on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from emulator.hosttrace.workload import Step


@dataclass(slots=True)
class _Change:
    """An event of a VM, and the tasks that stayed in guest mode before it, or had been interrupted."""

    step: Step
    staying: frozenset[int]
    kicked: frozenset[int]


class Residency:
    """Puts `stay` and `leave` into the list of a workload's steps."""

    def __init__(self, steps: list[Step]) -> None:
        self._steps = steps
        self._inside: dict[int, int] = {}  # the CPU of each task that is in guest mode
        self._was_on: dict[int, int] = {}  # the CPU of each task's last entry
        self._exiting: set[int] = set()  # tasks of which exits have been seen
        self._staying: set[int] = set()
        self._kicked: set[int] = set()  # of those, the tasks that a flush has interrupted
        self._shows_interrupts = False
        self._changes: dict[int, _Change] = {}  # by the task that makes the change, the last one

    def entry(self, task: int, cpu: int) -> None:
        self._inside[task] = self._was_on[task] = cpu

    def exit(self, task: int) -> None:
        self._exiting.add(task)
        self._inside.pop(task, None)

    def own(self, task: int, verb: str, cpu: int) -> None:
        """Note an event of the vCPU itself: only an entry on the same CPU lets it stay."""
        if verb != "enter" or self._inside.get(task) != cpu:
            self._staying.discard(task)

    def change(self, task: int, step: Step, tasks: dict[int, int]) -> None:
        """Note an event of a VM, which is appended to the steps after this call; `tasks` are by vCPU."""
        mine = frozenset(tasks.values())
        self._changes[task] = _Change(step, mine & self._staying, mine & self._kicked)
        self._put(len(self._steps), step, tasks, self._now)

    def moved(self, task: int, tasks: dict[int, int]) -> None:
        """Note that the task's last change was one of the VM that has these tasks."""
        mine = frozenset(tasks.values())
        step = self._changes[task].step
        self._changes[task] = _Change(step, mine & self._staying, mine & self._kicked)

    def flush(self, task: int, vm: int, tasks: dict[int, int]) -> None:
        """Let those stay that are in guest mode at the flush of the task's last event.

        In a trace that shows the interrupts of kicks, none stays until one is seen.
        """
        self._correct(task, vm, tasks, (lambda _: False) if self._shows_interrupts else self._now)

    def interrupt(self, task: int, vm: int, tasks: dict[int, int], cpus: list[int]) -> None:
        """Let those stay that a kick interrupts."""
        self._shows_interrupts = True
        self._correct(task, vm, tasks, lambda one: self._was_on.get(one) in cpus)

    def _now(self, task: int) -> bool:
        return task in self._inside and task in self._exiting

    def _correct(self, task: int, vm: int, tasks: dict[int, int], wanted: Callable[[int], bool]) -> None:
        change = self._changes.get(task)
        if change is None or change.step.vm != vm:
            return
        place = len(self._steps) - 1
        after: set[int] = set()
        while self._steps[place] is not change.step:
            if self._steps[place].vm == vm:
                after.add(self._steps[place].vcpu)
            place -= 1
        while place and self._steps[place - 1].verb in ("stay", "leave") and self._steps[place - 1].vm == vm:
            place -= 1
            del self._steps[place]
        mine = set(tasks.values())
        later = {one for number, one in tasks.items() if number in after}
        kept = later & self._staying
        self._staying = self._staying - mine | change.staying
        self._kicked = self._kicked - mine | change.kicked
        self._put(place, change.step, tasks, wanted)
        self._kicked |= mine & self._staying
        self._staying = self._staying - later | kept

    def _put(self, place: int, step: Step, tasks: dict[int, int], wanted: Callable[[int], bool]) -> None:
        for number, task in tasks.items():
            if wanted(task) and (task not in self._staying or task in self._kicked):
                self._staying.add(task)
                self._kicked.discard(task)
                found = Step(step.microseconds, "stay", step.vm, number, self._was_on[task])
            elif not wanted(task) and task in self._staying:
                self._staying.discard(task)
                self._kicked.discard(task)
                found = Step(step.microseconds, "leave", step.vm, number)
            else:
                continue
            self._steps.insert(place, found)
            place += 1
