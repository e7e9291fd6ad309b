"""Reads and writes of a user's policy, in the state of KVM and of the machine, as accesses of its steps.

KVM asks a policy's method in a step that names the policy only.  Any other thread may write the state that
the method reads, at any moment, and the answer may depend on it.  A read of an attribute that some thread
changes is therefore a step of the method's own, and so is the write: real threads can come in between any two
of them.  Elements of containers and the core's memory are treated likewise.  KVM's access to them begins when
it reads the attribute that holds the container, and is a write if the contents differ at the end of the step.

Which attributes are both read by the policy and changed is not known beforehand.  An execution that
shows a new one ends with `Grown`: the search has not reversed the races on that attribute so far, and begins
again with the attribute among the `Known`.  In a search that comes to its end, every attribute that was both
read and changed was known from the first step on, in all processes.

Some state cannot be watched: other modules' state, files, the time, the core's counts.  A policy that reads
such state is reported (`unwatched`), and nothing is proved.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, Final

from emulator.explore.engine.slots import Slot, slots_of, standing
from emulator.explore.machine.handed import CONTAINERS, Handed, plain
from emulator.explore.machine.watchable import WATCHED, copied, is_mutable, is_watchable
from emulator.machine.runtime import Machine
from emulator.policy import Policy
from native import ffi, lib

if TYPE_CHECKING:
    from emulator.explore.engine.scheduler import Execution, Task
    from emulator.explore.machine.control import Control

_OURS: Final = frozenset({"emulator", "native"})
_EXPLORE: Final = "emulator.explore."
_WATCHING: Final = _EXPLORE + "machine.watching"
# The "task" of queries at the beginning of an execution, before threads run.
_INIT: Final = -1

Name = tuple[str, Hashable]  # an attribute or its contents, and the object that has it


class Grown(Exception):
    """The policy reads an attribute that changes and was not known: the search must begin again."""


@dataclass(frozen=True, slots=True)
class Known:
    """The accesses of a policy that a search watches.

    shared: attributes and contents that the policy reads and some thread changes.  contents: all contents
    that the policy reads.  written: attributes and contents that the policy writes.
    """

    shared: frozenset[str] = frozenset()
    contents: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.shared or self.contents or self.written)

    def document(self) -> dict[str, list[str]]:
        return {one.name: sorted(getattr(self, one.name)) for one in fields(self)}

    @classmethod
    def of(cls, document: Mapping[str, list[str]]) -> Known:
        return cls(*(frozenset(document.get(one.name, ())) for one in fields(cls)))


NOTHING: Final = Known()


@dataclass(slots=True)
class Seen:
    """Accesses in some executions.

    read: by a policy; changed: by any thread.  contents, written: as in Known.  unwatched: sentences, in the
    order of the uses that they report.
    """

    read: set[Name] = field(default_factory=set)
    changed: set[Name] = field(default_factory=set)
    contents: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    unwatched: dict[str, None] = field(default_factory=dict)

    def add(self, other: Seen) -> None:
        for one in fields(self):
            getattr(self, one.name).update(getattr(other, one.name))

    def known(self) -> Known:
        shared = frozenset(key for key, _ in self.read & self.changed)
        return Known(shared | self.written, frozenset(self.contents), frozenset(self.written))


class PolicyReads:
    """Watches one program's policy, which is in the file `path`.

    frozen: `known` does not grow, as when a recorded execution is run again.
    """

    def __init__(self, control: Control, path: str, known: Known = NOTHING, *, frozen: bool = False) -> None:
        self.control = control
        self.path = path
        self.known = known
        self.frozen = frozen
        self.grown = False
        self.seen = Seen()
        self.asking: dict[int, int] = {}  # tasks in methods of the policy, and their depth
        self._policy = control.bit("policy", path)
        self._slots = slots_of(WATCHED, self)
        for slot in self._slots.values():
            slot.watched = slot.key in known.written or slot.contents in known.contents
        self.forget()

    # --- executions -----------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        with standing(self._slots):
            yield

    def adopt(self, policy: Policy) -> None:
        """Make the module of a file that was just executed call the library of explored code."""
        module = policy.module()
        for name, value in list(vars(module).items()) if module is not None else ():
            if value is lib:
                setattr(module, name, self.control.lib)
            elif isinstance(value, ModuleType) and getattr(value, "lib", None) is lib:
                self._unwatched(f"{Path(self.path).name}: calls the core through {value.__name__}")

    def forget(self) -> None:
        """Forget all objects: those of a new harness have no names yet."""
        self.asking.clear()
        self._names: dict[int, tuple[object, Hashable]] = {}
        self._held: set[Name] = set()
        self._contents: dict[int, tuple[Any, object, Name]] = {}

    def keep(self) -> None:
        """Record the state that each execution begins with, after `forget` or `put_back`."""
        self._initial = dict(self._names), set(self._held)

    def put_back(self) -> None:
        self.forget()
        names, held = self._initial
        self._names, self._held = dict(names), set(held)

    def check(self) -> None:
        """Raise Grown if the execution has shown an access that was not known."""
        if self.grown and not self.frozen:
            raise Grown

    @contextmanager
    def apart(self) -> Iterator[Seen]:
        """Record the accesses of the block in a Seen of their own."""
        before, self.seen = self.seen, Seen()
        grown, self.grown = self.grown, False
        try:
            yield self.seen
        finally:
            self.seen, self.grown = before, grown

    def merge(self, seen: Seen) -> None:
        """Add the accesses that were recorded apart; raises Grown."""
        self.seen.add(seen)
        now = self.seen.known()
        self.grown |= not (
            now.shared <= self.known.shared
            and now.contents <= self.known.contents
            and now.written <= self.known.written
        )
        self.check()

    def next(self) -> Known:
        """Return the accesses that the next search knows: more than this one's, so there is a last search."""
        now, then = self.seen.known(), self.known
        known = Known(now.shared | then.shared, now.contents | then.contents, now.written | then.written)
        if known == then:
            raise AssertionError("a search begins again with the reads that it knew")
        return known

    def _grow(self) -> None:
        if self.frozen:
            return
        self.grown = True
        if self.control.execution is not None:
            self.control.execution.stop()

    # --- queries of the policy ------------------------------------------------------------------------------

    def _task(self) -> int:
        execution = self.control.execution
        return _INIT if execution is None else execution.current.index

    def begin(self) -> None:
        task = self._task()
        self.asking[task] = self.asking.get(task, 0) + 1

    def end(self) -> None:
        task, execution = self._task(), self.control.execution
        if execution is not None:
            execution.touch(self._held_now(), self._policy)
        self.asking[task] -= 1
        if not self.asking[task]:
            del self.asking[task]

    def asks(self) -> bool:
        """Return whether the running code is the policy's, or code of KVM that the policy has called."""
        return bool(self.asking) and self._task() in self.asking

    def _held_now(self) -> int:
        return self.control.objects.mask(self._held)

    def step_ends(self, task: Task) -> None:
        """Add the accesses that show at the step's end."""
        if task.index in self.asking:
            # The method depends on the policy's memory, and on the containers that it was given.
            task.reads |= self._held_now()
            task.writes |= self._policy
        for number, (container, before, name) in self._contents.items():
            now = copied(container)
            if now != before:
                self._contents[number] = container, now, name
                self._changed(name)
                task.writes |= self.control.bit(*name)

    def _changed(self, name: Name) -> None:
        self.seen.changed.add(name)
        if name in self.seen.read and name[0] not in self.known.shared:
            self._grow()

    def _read(self, name: Name) -> None:
        self.seen.read.add(name)
        if name in self.seen.changed and name[0] not in self.known.shared:
            self._grow()

    # --- attributes -----------------------------------------------------------------------------------------

    def got(self, slot: Slot, obj: object) -> Any:
        value = slot.plain_get(obj)
        module = _module(_accessing(sys._getframe(2)))
        execution = self.control.execution
        if module.startswith(_EXPLORE) or (execution is not None and execution.aborting):
            return value
        if not self.asks():
            return value if execution is None else self._kvm_reads(execution, slot, obj, value)
        which = self._which(slot, obj)
        self._access(slot.key, which, False)
        value = slot.plain_get(obj)
        ours = module.partition(".")[0] in _OURS
        if not is_mutable(value):
            if not ours and not is_watchable(value, slot.attr):
                self.cannot_watch(f"reads {slot.key}")
        elif type(value) in CONTAINERS and not ours:
            self._check_elements(value, slot.contents)
            return Handed(value, slot.contents, which, self)
        else:
            self._check_elements(value, slot.contents)
            self.element(slot.contents, which, value, False)
            self._held.add((slot.contents, which))
        return value

    def _kvm_reads(self, execution: Execution, slot: Slot, obj: object, value: Any) -> Any:
        """Return the value for KVM's code, with a step if the policy writes it or reads its contents."""
        if slot.key in self.known.written:
            self._step(execution, slot.key, self._which(slot, obj), False)
            value = slot.plain_get(obj)
        if slot.contents in self.known.contents and is_mutable(value):
            which = self._which(slot, obj)
            if slot.contents in self.known.shared:
                self._step(execution, slot.contents, which, False)
                value = slot.plain_get(obj)
            self._look_into((slot.contents, which), value)
        return value

    def put(self, slot: Slot, obj: object, value: object) -> None:
        value = plain(value)
        frame = _accessing(sys._getframe(2))
        execution = self.control.execution
        if (
            execution is not None
            and frame.f_code is not slot.constructor
            and not execution.aborting
            and execution.current.index >= 0
            and not _module(frame).startswith(_EXPLORE)
        ):
            which = self._which(slot, obj)
            if self.asks():
                if not is_watchable(value, slot.attr):
                    # A function would run outside of the method, and a container of the
                    # policy's own can change unseen.
                    self.cannot_watch(f"writes {slot.key}")
                self._access(slot.key, which, True)
            else:
                self._changed((slot.key, which))
                if slot.key in self.known.shared:
                    self._step(execution, slot.key, which, True)
        slot.plain_set(obj, value)
        if WATCHED.get(type(value)) == "" and type(value) is not Machine:
            self._names.setdefault(id(value), (value, (slot.attr, self._which(slot, obj))))

    def _which(self, slot: Slot, obj: object) -> Hashable:
        """Return the object's number, or else the attribute that it was first stored to and the number of
        that attribute's object.  All other objects of a class count as one."""
        if slot.identity is not None:
            try:
                return slot.identity(obj)  # type: ignore[no-any-return]
            except AttributeError:
                return None  # a copy that is not complete yet
        return self._names.get(id(obj), (obj, None))[1]

    # --- contents -------------------------------------------------------------------------------------------

    def element(self, key: str, which: Hashable, container: Any, write: bool) -> None:
        """Record that the policy accesses the contents of a container, or of memory."""
        if key not in self.known.contents:
            self.seen.contents.add(key)
            self._grow()
        self._check_elements(container, key)
        self._look_into((key, which), container)
        self._access(key, which, write)

    def _look_into(self, name: Name, container: Any) -> None:
        if self.control.execution is not None and id(container) not in self._contents:
            self._contents[id(container)] = container, copied(container), name

    def _check_elements(self, container: Any, key: str) -> None:
        if isinstance(container, bytearray | ffi.CData):
            return
        values = container.values() if isinstance(container, dict) else container
        if not all(is_watchable(value) for value in values):
            self.cannot_watch(f"reads {key}")

    # --- steps ----------------------------------------------------------------------------------------------

    def _access(self, key: str, which: Hashable, write: bool) -> None:
        """Record an access of the policy, as a step if it is shared."""
        name = key, which
        self._read(name)
        if write:
            if key not in self.known.written:
                self.seen.written.add(key)
                self._grow()
            self._changed(name)
        execution = self.control.execution
        if execution is not None and not execution.aborting and key in self.known.shared:
            self._step(execution, key, which, write, self._policy)

    def _step(self, execution: Execution, key: str, which: Hashable, write: bool, policy: int = 0) -> None:
        mask = self.control.bit(key, which)
        reads, writes = (0, mask) if write else (mask, 0)
        execution.step((key, which, "write" if write else "read"), reads, writes | policy)

    # --- accesses that cannot be watched --------------------------------------------------------------------

    def cannot_watch(self, what: str) -> None:
        """Report a use of the policy that cannot be watched; `what` begins with a verb."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != self.path:
            frame = frame.f_back
        line = "" if frame is None else f":{frame.f_lineno}"
        self._unwatched(f"{Path(self.path).name}{line}: {what}")

    def _unwatched(self, sentence: str) -> None:
        self.seen.unwatched[sentence] = None


def _accessing(frame: FrameType) -> FrameType:
    """Return the frame of the code that accesses an attribute: the audit may stand in between."""
    while _module(frame) == _WATCHING and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
