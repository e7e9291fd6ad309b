"""Audits that histories tell the Python objects that a task has read, as a stateful search assumes.

A task's history stands for its local variables (strategies/stateful.py).  It tells the results of the task's
calls, and for each object that a step touches the history of the object's last writer.  So if a task reads an
attribute that another task has written, the task's history must tell the writer's step, by such an object or
by a chain of them.  A finding is an object that MachineStates.is_read() leaves out, or one that is missing.
"""

from __future__ import annotations

from emulator.explore.engine.objects import members
from emulator.explore.engine.scheduler import Task
from emulator.explore.machine.races import MEANT, Access, Known, Races
from emulator.explore.machine.states import MachineStates


class Untold(Races):
    """Records the accesses of each task, and the steps that its history tells, while `watching`."""

    def __init__(self, states: MachineStates) -> None:
        self.states = states
        super().__init__(states.control)

    def begin(self, tasks: int) -> None:
        super().begin(tasks)
        # By task: the objects that it has written.  By object: what its readers since the last writer tell of
        # these, as in strategies/stateful.py, in steps.
        self._wrote_by = [0] * tasks
        self._under: dict[int, int] = {}

    def _happens_before(self, task: Task) -> int:
        """Return the steps that a completed step's history tells, and record its accesses for later ones."""
        mark, index = 1 << len(self._before), task.index
        reads, writes = task.reads | task.awaited, task.writes
        touched = [bit for bit in members(reads | writes) if self.states.is_read(bit)]
        told = 1 << self._last[index]
        for bit in touched:
            told |= self._wrote.get(bit, 0)
            if writes >> bit & 1:
                told |= self._under.pop(bit, 0)
        before = told
        for step in members(told):
            before |= self._before[step]
        if task.done or task.rests:
            before |= mark - 1  # from here on, its history is the whole state
        for bit in touched:
            if writes >> bit & 1:
                self._wrote[bit] = mark
                if self.states.is_read_under(bit):
                    self._wrote_by[index] |= 1 << bit
        under = 0
        for bit in members(self._wrote_by[index]):
            under |= self._wrote[bit]
        for bit in touched:
            if self.states.is_held(bit) and not writes >> bit & 1:
                self._under[bit] = self._under.get(bit, 0) | under
        return before

    def _check(self, known: Known, before: int, task: int, access: Access) -> None:
        name, index, write, place = access
        writers = [
            (step, other, code)
            for (other, its_index, written), (step, code) in known.items()
            if written and (index is None or its_index is None or index == its_index)
        ]
        if write or not writers or (name, place.co_qualname) in MEANT:
            return
        step, other, code = max(writers, key=lambda writer: writer[0])
        if other != task and not before >> step & 1:
            where = f"written in {code.co_qualname}, read in {place.co_qualname}"
            self.findings[f"{name}: {where}, and no history tells it"] += 1
