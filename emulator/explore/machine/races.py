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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import getattr_static
from types import CodeType, MemberDescriptorType
from typing import TYPE_CHECKING, Any, Final

from emulator.explore.engine.objects import members
from emulator.explore.engine.scheduler import Task
from emulator.explore.engine.slots import Slot, StandIn
from emulator.host.memory import UserMemory
from emulator.kvm import structs
from emulator.kvm.mmu import structs as mmu_structs
from emulator.kvm.vmx.vmcs import LoadedVmcs
from emulator.machine.locks import Refcount
from emulator.machine.runtime import Cpu, Machine
from emulator.policy.imports import is_patchable
from native import ffi

if TYPE_CHECKING:
    from emulator.explore.machine.control import Control

CLASSES: Final[tuple[type, ...]] = (
    structs.Kvm,
    structs.Vcpu,
    structs.VcpuArch,
    mmu_structs.KvmMmu,
    mmu_structs.KvmMmuPage,
    LoadedVmcs,
    structs.KvmMemslots,
    structs.KvmMemorySlot,
    Refcount,
    UserMemory,
    Cpu,
    Machine,
)
_CONTAINERS: Final = (list, dict, set, deque, bytearray)
# Memory that cffi owns.
_MEMORY: Final = (type(ffi.new("int *")),)
# Methods that change their container.
_CHANGES: Final = frozenset((
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft",
    "remove", "reverse", "rotate", "setdefault", "sort", "update",
))  # fmt: skip


_LOOKS: Final = (
    "__add__", "__and__", "__bytes__", "__eq__", "__ge__", "__gt__", "__le__", "__lt__", "__mul__", "__ne__",
    "__or__", "__radd__", "__rand__", "__repr__", "__reversed__", "__rmul__", "__ror__", "__rsub__",
    "__rxor__", "__sub__", "__xor__",
)  # fmt: skip
_CHANGING_OPERATORS: Final = ("__iadd__", "__iand__", "__imul__", "__ior__", "__isub__", "__ixor__")


# Accesses that need no order, by attribute and function, and the reasons.
MEANT: Final[dict[tuple[str, str], str]] = {
    ("KvmMmuPage.role", "tdp_entry"): "the level of a root stays the same when it becomes invalid",
    ("KvmMmuPage.role", "construct_eptp"): "likewise",
}


# (object, name, index or None: all, write) -> the function
Accesses = dict[tuple[int, str, object, bool], CodeType]


class Races:
    """Records the accesses of each task and the dependencies of its steps, while `watching`.

    findings: sentences, and how often each was found.
    """

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
        # The last accesses: (object, name) -> (task, index, write) -> (step, function)
        self._known: dict[tuple[int, str], dict[tuple[int, object, bool], tuple[int, CodeType]]] = {}
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
        found = 0
        for bit in members(task.writes):
            found |= self._touched.get(bit, 0)
        for bit in members(task.reads):
            found |= self._wrote.get(bit, 0)
        found |= 1 << self._last[task.index]
        before = found
        for i in members(found):
            before |= self._before[i]
        for bit in members(task.reads & ~task.writes):
            self._touched[bit] = self._touched.get(bit, 0) | mark
        for bit in members(task.writes):
            # All that touched the object before happens before this step, and with it before later ones.
            self._touched[bit] = self._wrote[bit] = mark
        return before

    def _check(
        self,
        known: dict[tuple[int, object, bool], tuple[int, CodeType]],
        before: int,
        task: int,
        access: tuple[str, object, bool, CodeType],
    ) -> None:
        name, index, write, place = access
        for (other, other_index, other_write), (step, other_place) in known.items():
            if other == task or not (write or other_write) or before >> step & 1:
                continue
            if index is None or other_index is None or index == other_index:
                self._found(name, (write, place.co_qualname), (other_write, other_place.co_qualname))

    def _found(self, name: str, *ends: tuple[bool, str]) -> None:
        if not any((name, place) in MEANT for _, place in ends):
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


class Watched:
    """A container with watched accesses: operators are methods here, and other methods go by __getattr__."""

    __slots__ = ("container", "name", "state")

    def __init__(self, container: Any, name: str, state: Races) -> None:
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
        self.container[index] = _plain(value)

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

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.container)

    __hash__ = None  # type: ignore[assignment]


def _operator(name: str, write: bool) -> Any:
    def operate(self: Watched, *others: Any) -> Any:
        if not hasattr(self.container, name):
            return NotImplemented
        self._note(None, write)
        found = getattr(self.container, name)(*map(_plain, others))
        return self if found is self.container else found

    return operate


for _name in _LOOKS:
    setattr(Watched, _name, _operator(_name, False))
for _name in _CHANGING_OPERATORS:
    setattr(Watched, _name, _operator(_name, True))


def _plain(value: Any) -> Any:
    return value.container if type(value) is Watched else value


class Names(dict[type, tuple[str, str]]):
    """The names of one attribute and of its contents, by the class of the object that has it."""

    def __init__(self, attr: str) -> None:
        super().__init__()
        self.attr = attr

    def __missing__(self, cls: type) -> tuple[str, str]:
        found = self[cls] = f"{cls.__name__}.{self.attr}", f"{cls.__name__}.{self.attr}[]"
        return found


class Attribute(StandIn):
    """The descriptor that stands before one slot of the watched classes, and reports its accesses.

    constant: the slot is written by constructors only, so that only the contents of its value can race.
    memory: memory of cffi's in it is watched, too.  constructors: of the classes that have the slot; an
    object that is being made is not shared, and the access that makes it visible is watched.
    """

    __slots__ = ("constant", "constructors", "control", "get", "memory", "names", "put", "remove", "state")

    def __init__(self, attr: str, member: Any, state: Races, *, constant: bool, memory: bool) -> None:
        self.get, self.put, self.remove = member.__get__, member.__set__, member.__delete__
        self.names = Names(attr)
        self.state = state
        self.control = state.control
        self.constant = constant
        self.memory = memory
        self.constructors: set[CodeType | None] = set()

    def __get__(self, obj: object, owner: type | None = None) -> Any:
        if obj is None:
            return self
        value = self.get(obj)
        contains = type(value) in _CONTAINERS
        if self.constant and not contains and not self.memory:
            return value
        execution = self.control.execution
        if execution is None or execution.between or execution.aborting or execution.current.index < 0:
            return value
        name, contents = self.names[type(obj)]
        if not self.constant:
            self.state.access(obj, name, None, False, 2)
        if contains:
            return Watched(value, contents, self.state)
        if self.memory and type(value) in _MEMORY:
            # Neither a native call nor an index shows what it does with it: suppose that it writes.
            self.state.access(value, contents, None, True, 2)
        return value

    def __set__(self, obj: object, value: object) -> None:
        # The store may be a step of its own.
        self.put(obj, _plain(value))
        if self.state.awake and sys._getframe(1).f_code not in self.constructors:
            self.state.access(obj, self.names[type(obj)][0], None, True, 2)

    def __delete__(self, obj: object) -> None:
        self.remove(obj)


def _reader(cls: type, state: Races, constant: frozenset[str]) -> Any:
    """Return the __getattribute__ of a class with objects that have a __dict__, as a patch may add one."""
    plain = object.__getattribute__
    # Methods and properties are code; the attributes that they read are reported, too.
    code = frozenset(name for name in dir(cls) if _is_code(getattr_static(cls, name)))
    sentences: dict[str, str] = {}
    watches_memory = _watches_memory(cls, constant)

    def read(self: object, name: str) -> Any:
        value = plain(self, name)
        if name in code:
            return value
        contains, memory = type(value) in _CONTAINERS, watches_memory and type(value) in _MEMORY
        if (name in constant and not contains and not memory) or not state.awake:
            return value
        sentence = sentences.get(name) or sentences.setdefault(name, f"{cls.__name__}.{name}")
        if name not in constant:
            state.access(self, sentence, None, False, 2)
        if memory:
            state.access(value, f"{sentence}[]", None, True, 2)
        return Watched(value, f"{sentence}[]", state) if contains else value

    return read


def _is_code(value: object) -> bool:
    return hasattr(type(value), "__get__") and not isinstance(value, MemberDescriptorType)


def _writer(cls: type, state: Races) -> Any:
    plain = object.__setattr__
    constructor = getattr(cls.__init__, "__code__", None)  # type: ignore[misc]

    def write(self: object, name: str, value: Any) -> None:
        plain(self, name, _plain(value))
        if state.awake and sys._getframe(1).f_code is not constructor:
            state.access(self, f"{cls.__name__}.{name}", None, True, 2)

    return write


def _watches_memory(cls: type, constant: frozenset[str]) -> bool:
    """Return whether to watch memory of cffi's: a CPU's own is no other's, and the audit knows KVM's."""
    return bool(constant) and is_patchable(cls.__module__)


def _attributes(
    classes: Iterable[type], state: Races, constant: frozenset[str]
) -> dict[tuple[type, str], tuple[Attribute, Any]]:
    """Return a descriptor for each slot of the classes that can show an access, and what it stands for."""
    found: dict[tuple[type, str], tuple[Attribute, Any]] = {}
    machine = state.control.machine
    for cls in classes:
        lasting = machine.cpus if cls is Cpu else [machine] if cls is Machine else []
        for base in cls.__mro__:
            for attr, member in list(vars(base).items()):
                if not isinstance(member, MemberDescriptorType | Slot):
                    continue
                if attr in constant and lasting and not any(_has_contents(one, attr) for one in lasting):
                    continue
                if (base, attr) not in found:
                    memory = _watches_memory(cls, constant)
                    one = Attribute(attr, member, state, constant=attr in constant, memory=memory)
                    found[base, attr] = one, member
                constructor = getattr(cls.__init__, "__code__", None)  # type: ignore[misc]
                found[base, attr][0].constructors.add(constructor)
    return found


def _has_contents(obj: object, attr: str) -> bool:
    """Return whether an attribute that no task writes has contents that can change.

    CPUs and the machine are made before all executions, so that the value is there already.
    """
    return type(getattr(obj, attr, None)) in _CONTAINERS


@contextmanager
def watching(
    state: Races, more: Iterable[type] = (), constant: frozenset[str] = frozenset()
) -> Iterator[None]:
    """Make the classes, these and `more`, report their accesses to `state`.

    constant: attributes that are written by constructors only; reads of them have no race.
    """
    classes = tuple(dict.fromkeys((*CLASSES, *more)))
    slotted = [cls for cls in classes if not cls.__dictoffset__]
    others = [cls for cls in classes if cls.__dictoffset__]
    attributes = _attributes(slotted, state, constant)
    for (cls, attr), (one, _) in attributes.items():
        setattr(cls, attr, one)
    for cls in others:
        cls.__getattribute__ = _reader(cls, state, constant)  # type: ignore[method-assign]
        cls.__setattr__ = _writer(cls, state)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for cls in others:
            del cls.__getattribute__, cls.__setattr__
        for (cls, attr), (_, member) in attributes.items():
            setattr(cls, attr, member)
