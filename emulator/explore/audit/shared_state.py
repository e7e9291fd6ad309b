"""Audits that footprints cover the accesses of explored code to Python's own objects.

The search reverses only the conflicts that its steps' footprints name.  If one task writes an attribute and
another one accesses it, a footprint must therefore order the two steps: one of them happens before the other,
by a chain of steps that depend on each other (Lamport 1978; the relation also defines data races, e.g. in
Flanagan and Freund's FastTrack, PLDI 2009).  Locks need no rule of their own, because to take and to release
a lock are accesses to it.  A finding is a point or a footprint that is missing.

`watching` makes the classes of KVM's objects report each access while an execution runs; containers among the
values are handed out behind a `Watched` that reports accesses to their elements.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from emulator.actors.user_memory import UserMemory
from emulator.explore.engine.objects import members
from emulator.explore.engine.scheduler import Task
from emulator.explore.machine.control import Control
from emulator.explore.strategies.sampling import RandomWalk
from emulator.kvm import structs
from emulator.kvm.vmx.vmcs import LoadedVmcs
from emulator.machine.locks import Refcount
from emulator.machine.runtime import Cpu, Machine

CLASSES: Final[tuple[type, ...]] = (
    structs.Kvm,
    structs.Vcpu,
    structs.VcpuArch,
    structs.KvmMmu,
    structs.KvmMmuPage,
    structs.RootTracking,
    LoadedVmcs,
    structs.KvmMemslots,
    structs.KvmMemorySlot,
    Refcount,
    UserMemory,
    Cpu,
    Machine,
)
_CONTAINERS: Final = (list, dict, set, deque, bytearray)
# Methods that change their container.
_CHANGES: Final = frozenset((
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft",
    "remove", "reverse", "rotate", "setdefault", "sort", "update",
))  # fmt: skip


# Accesses that need no order, by attribute and function, and the reasons.
MEANT: Final[dict[tuple[str, str], str]] = {
    ("KvmMmuPage.role", "tdp_entry"): "the level of a root stays the same when it becomes invalid",
    ("KvmMmuPage.role", "construct_eptp"): "likewise",
}


class SharedState(RandomWalk):
    """Random walks that record the accesses of each task, and the dependencies of its steps.

    findings: sentences, and how often each was found.
    """

    def __init__(self, control: Control, executions: int, seed: int) -> None:
        super().__init__(executions, seed)
        self.findings: Counter[str] = Counter()
        self._control = control
        self._forget(0)

    def _forget(self, tasks: int) -> None:
        self._between = False  # the scheduler runs, not a task
        self._objects: list[object] = []  # kept alive, so that no other object gets its id
        self._numbers: dict[int, int] = {}
        # By task, for its current step: (object, name, index or None: all, write) -> place
        self._accesses: dict[int, dict[tuple[int, str, object, bool], str]] = defaultdict(dict)
        # The last accesses: (object, name) -> (task, index, write) -> (step, place)
        self._known: dict[tuple[int, str], dict[tuple[int, object, bool], tuple[int, str]]] = {}
        # By step: the steps that happen before it.  A task's code before its first announcement is a step of
        # its own, which comes before all others and depends on none.
        self._before = [0] * tasks
        self._last = {task: task for task in range(tasks)}
        self._touched: dict[int, int] = {}
        self._wrote: dict[int, int] = {}

    # --- as a strategy --------------------------------------------------------------------------------------

    def begin(self, tasks: int) -> None:
        super().begin(tasks)
        self._forget(tasks)

    def choose(self, enabled: int, last: int) -> int:
        if last < 0:
            for task in list(self._accesses):
                self._note(task)
        index = super().choose(enabled, last)
        self._between = False
        return index

    def stepped(self, task: Task) -> None:
        super().stepped(task)
        self._between = True
        before = self._happens_before(task)
        self._last[task.index] = len(self._before)
        self._before.append(before)
        self._note(task.index)

    def _note(self, task: int) -> None:
        """Check and record the accesses of the task's last step."""
        step = self._last[task]
        for (number, name, index, write), place in self._accesses[task].items():
            known = self._known.setdefault((number, name), {})
            self._check(known, self._before[step], task, (name, index, write, place))
            known[task, index, write] = (step, place)
        self._accesses[task].clear()

    def _happens_before(self, task: Task) -> int:
        """Return the steps that happen before a completed step, and record its accesses for later ones."""
        mark = 1 << len(self._before)
        found = 0
        for bit in members(task.writes):
            found |= self._touched.get(bit, 0)
        for bit in members(task.reads):
            found |= self._wrote.get(bit, 0)
        found |= 1 << self._last[task.index]
        before = found
        for i in members(found):
            before |= self._before[i]
        for bit in members(task.reads | task.writes):
            self._touched[bit] = self._touched.get(bit, 0) | mark
        for bit in members(task.writes):
            self._wrote[bit] = self._wrote.get(bit, 0) | mark
        return before

    def _check(
        self,
        known: dict[tuple[int, object, bool], tuple[int, str]],
        before: int,
        task: int,
        access: tuple[str, object, bool, str],
    ) -> None:
        name, index, write, place = access
        for (other, other_index, other_write), (step, other_place) in known.items():
            if other == task or not (write or other_write) or before >> step & 1:
                continue
            if index is None or other_index is None or index == other_index:
                ends = sorted((f"{_verb(write)} in {place}", f"{_verb(other_write)} in {other_place}"))
                self.findings[f"{name}: {', '.join(ends)}"] += 1

    # --- accesses -------------------------------------------------------------------------------------------

    @property
    def awake(self) -> bool:
        execution = self._control.execution
        return not (execution is None or self._between or execution.aborting or execution.current.index < 0)

    def access(self, obj: object, name: str, index: object, write: bool, depth: int) -> None:
        """Record an access of the running task.  `depth`: frames from here to the code that makes it."""
        execution = self._control.execution
        assert execution is not None
        task = execution.current.index
        number = self._numbers.get(id(obj))
        if number is None:
            number = self._numbers[id(obj)] = len(self._objects)
            self._objects.append(obj)
        place = sys._getframe(depth).f_code.co_qualname
        if (name, place) not in MEANT:
            self._accesses[task].setdefault((number, name, index, write), place)


def _verb(write: bool) -> str:
    return "written" if write else "read"


class Watched:
    """A container with watched accesses: operators are methods here, and other methods go by __getattr__."""

    __slots__ = ("container", "name", "state")

    def __init__(self, container: Any, name: str, state: SharedState) -> None:
        self.container, self.name, self.state = container, name, state

    def _note(self, index: object, write: bool) -> None:
        if self.state.awake:
            self.state.access(self.container, self.name, index, write, 3)

    def __getattr__(self, method: str) -> Any:
        self._note(None, method in _CHANGES)
        return getattr(self.container, method)

    def __getitem__(self, index: Any) -> Any:
        self._note(None if isinstance(index, slice) else index, False)
        return self.container[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._note(None if isinstance(index, slice) else index, True)
        self.container[index] = value

    def __delitem__(self, index: Any) -> None:
        self._note(None, True)
        del self.container[index]

    def __iter__(self) -> Iterator[Any]:
        self._note(None, False)
        return iter(self.container)

    def __len__(self) -> int:
        # Lists and bytearrays keep their length.
        if not isinstance(self.container, list | bytearray):
            self._note(None, False)
        return len(self.container)

    def __contains__(self, value: object) -> bool:
        self._note(None, False)
        return value in self.container

    def __eq__(self, other: object) -> bool:
        self._note(None, False)
        return bool(self.container == (other.container if isinstance(other, Watched) else other))

    __hash__ = None  # type: ignore[assignment]


def _reader(cls: type, state: SharedState) -> Any:
    plain = object.__getattribute__
    # Methods and properties are code; the attributes that they read are reported, too.
    code = frozenset(dir(cls)) - frozenset(getattr(cls, "__slots__", ()))

    def read(self: object, name: str) -> Any:
        value = plain(self, name)
        if name in code or not state.awake:
            return value
        sentence = f"{cls.__name__}.{name}"
        state.access(self, sentence, None, False, 2)
        return Watched(value, f"{sentence}[]", state) if type(value) in _CONTAINERS else value

    return read


def _writer(cls: type, state: SharedState) -> Any:
    plain = object.__setattr__

    def write(self: object, name: str, value: Any) -> None:
        # The store may be a step of its own.
        plain(self, name, value.container if isinstance(value, Watched) else value)
        if state.awake:
            state.access(self, f"{cls.__name__}.{name}", None, True, 2)

    return write


@contextmanager
def watching(state: SharedState) -> Iterator[None]:
    """Make the classes report their accesses to `state`."""
    for cls in CLASSES:
        cls.__getattribute__ = _reader(cls, state)  # type: ignore[method-assign]
        cls.__setattr__ = _writer(cls, state)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for cls in CLASSES:
            del cls.__getattribute__, cls.__setattr__
