"""Audits that footprints cover the accesses of explored code to Python's own objects.

The search reverses only the conflicts that its steps' footprints name.  If one task writes an attribute and
another one accesses it, a footprint must therefore order the two steps: one of them happens before the other,
by a chain of steps that depend on each other (Lamport 1978; the relation also defines data races, e.g. in
Flanagan and Freund's FastTrack, PLDI 2009).  Locks need no rule of their own, because to take and to release
a lock are accesses to it.  A finding is a point or a footprint that is missing.

watching.py makes KVM's objects report their accesses.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from types import CodeType
from typing import TYPE_CHECKING, Final

from emulator.explore.engine.objects import members
from emulator.explore.engine.scheduler import Task

if TYPE_CHECKING:
    from emulator.explore.machine.control import Control

# Accesses that need no order, by attribute and function, and the reasons.
MEANT: Final[dict[tuple[str, str], str]] = {
    ("KvmMmuPage.role", "tdp_entry"): "the level of a root stays the same when it becomes invalid",
    ("KvmMmuPage.role", "construct_eptp"): "the level of a root stays the same when it becomes invalid",
}
# Stores that come to the same in either order, by attribute: the functions that make them.
COMMUTING: Final[dict[str, frozenset[str]]] = {
    "ShadowPage.write_flooding_count": frozenset(("clear_sp_write_flooding_count",)),
}


# (object, name, index or None: all, write) -> the function
Accesses = dict[tuple[int, str, object, bool], CodeType]
# One of them, without its object: name, index, write, function.
Access = tuple[str, object, bool, CodeType]
# The last accesses to one name of an object: (task, index, write) -> (step, function)
Known = dict[tuple[int, object, bool], tuple[int, CodeType]]


class Races:
    """Records the accesses of each task and the dependencies of its steps, while `watching`.

    findings: sentences, and how often each was found.  ignored: objects that order nothing.
    """

    ignored = 0

    def __init__(self, control: Control) -> None:
        self.findings: Counter[str] = Counter()
        self.control = control
        self.begin(0)

    def begin(self, tasks: int) -> None:
        """Forget the last execution; one of so many tasks begins."""
        self._objects: dict[int, object] = {}  # by id, and kept alive, so that no other object gets it
        # By task, for its current step.
        self._accesses: dict[int, Accesses] = defaultdict(dict)
        # Likewise, before its first announcement.
        self._first: dict[int, Accesses] = defaultdict(dict)
        self._known: dict[tuple[int, str], Known] = {}  # by object and name
        # By step: the steps that happen before it.  A task's code before its first announcement is a step of
        # its own, which comes before all others and depends on none.
        self._before = [0] * tasks
        self._last = {task: task for task in range(tasks)}
        self._touched: dict[int, int] = {}
        self._wrote: dict[int, int] = {}

    def step_ends(self, task: Task) -> None:
        """Check the accesses of a step; call it when the step's own accesses to objects are complete."""
        first, self._first = self._first, defaultdict(dict)
        for index, accesses in first.items():
            self._note(index, accesses)
        before = self._happens_before(task)
        self._last[task.index] = len(self._before)
        self._before.append(before)
        self._note(task.index, self._accesses.pop(task.index, {}))

    def _note(self, task: int, accesses: Accesses) -> None:
        """Check and record the accesses of the task's last step."""
        step = self._last[task]
        for (number, name, index, write), place in accesses.items():
            known = self._known.setdefault((number, name), {})
            self._check(known, self._before[step], task, (name, index, write, place))
            known[task, index, write] = (step, place)

    def _happens_before(self, task: Task) -> int:
        """Return the steps that happen before a completed step, and record its accesses for later ones."""
        mark = 1 << len(self._before)
        reads, writes = task.reads | task.awaited, task.writes & ~self.ignored
        found = 0
        for bit in members(writes):
            found |= self._touched.get(bit, 0)
        for bit in members(reads):
            found |= self._wrote.get(bit, 0)
        found |= 1 << self._last[task.index]
        before = found
        for i in members(found):
            before |= self._before[i]
        for bit in members(reads & ~writes):
            self._touched[bit] = self._touched.get(bit, 0) | mark
        for bit in members(writes):
            # All that touched the object before happens before this step, and with it before later ones.
            self._touched[bit] = self._wrote[bit] = mark
        return before

    def _check(self, known: Known, before: int, task: int, access: Access) -> None:
        name, index, write, place = access
        for (other, other_index, other_write), (step, other_place) in known.items():
            if other == task or not (write or other_write) or before >> step & 1:
                continue
            if index is None or other_index is None or index == other_index:
                self._found(name, (write, place.co_qualname), (other_write, other_place.co_qualname))

    def _found(self, name: str, *ends: tuple[bool, str]) -> None:
        alike = all(place in COMMUTING.get(name, ()) for _, place in ends)
        if not alike and not any((name, place) in MEANT for _, place in ends):
            told = sorted(f"{'written' if write else 'read'} in {place}" for write, place in ends)
            self.findings[f"{name}: {', '.join(told)}"] += 1

    # --- accesses -------------------------------------------------------------------------------------------

    @property
    def awake(self) -> bool:
        execution = self.control.execution
        return not (
            execution is None or execution.between or execution.aborting or execution.current.index < 0
        )

    def access(self, obj: object, name: str, index: object, write: bool, depth: int) -> None:
        """Record an access of the running task.  `depth`: frames from here to the code that makes it."""
        execution = self.control.execution
        assert execution is not None
        number = id(obj)
        self._objects[number] = obj
        accesses = (self._first if execution.starting else self._accesses)[execution.current.index]
        access = number, name, index, write
        if access not in accesses:
            accesses[access] = sys._getframe(depth).f_code
