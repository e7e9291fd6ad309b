"""Makes the objects of explored code report each access to them, while an execution runs.

Attributes report through descriptors that stand before the slots of their classes, or through
__getattribute__ where objects have a __dict__.  A container among the values is handed out as a `Watched`,
which reports accesses to its elements.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import getattr_static
from types import CodeType, MemberDescriptorType
from typing import Any, Final

from emulator.explore.engine.slots import Slot, StandIn
from emulator.explore.machine.races import Races
from emulator.host.memory import UserMemory
from emulator.kvm import structs
from emulator.kvm.mmu import shadow_structs
from emulator.kvm.mmu import structs as mmu_structs
from emulator.kvm.vmx.vmcs import LoadedVmcs
from emulator.kvm.vmx.vmcs12 import NestedVmx, Vmcs12
from emulator.machine.locks import Refcount
from emulator.machine.runtime import Cpu, Machine
from emulator.policy.imports import is_patchable
from native import ffi

CLASSES: Final[tuple[type, ...]] = (
    structs.Kvm,
    structs.Vcpu,
    structs.VcpuArch,
    mmu_structs.KvmMmu,
    mmu_structs.KvmMmuPage,
    shadow_structs.ShadowPage,
    shadow_structs.KvmShadowArch,
    shadow_structs.SlotArch,
    LoadedVmcs,
    Vmcs12,
    NestedVmx,
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
CHANGES: Final = frozenset((
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft",
    "remove", "reverse", "rotate", "setdefault", "sort", "update",
))  # fmt: skip


_LOOKS: Final = (
    "__add__", "__and__", "__bytes__", "__eq__", "__ge__", "__gt__", "__le__", "__lt__", "__mul__", "__ne__",
    "__or__", "__radd__", "__rand__", "__repr__", "__reversed__", "__rmul__", "__ror__", "__rsub__",
    "__rxor__", "__sub__", "__xor__",
)  # fmt: skip
_CHANGING_OPERATORS: Final = ("__iadd__", "__iand__", "__imul__", "__ior__", "__isub__", "__ixor__")


class Watched:
    """A container with watched accesses: operators are methods here, and other methods go by __getattr__."""

    __slots__ = ("container", "name", "state")

    def __init__(self, container: Any, name: str, state: Races) -> None:
        self.container, self.name, self.state = container, name, state

    def _note(self, index: object, write: bool) -> None:
        if self.state.awake:
            self.state.access(self.container, self.name, index, write, 3)

    def __getattr__(self, method: str) -> Any:
        self._note(None, method in CHANGES)
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
        self._note(value if isinstance(self.container, dict | set) else None, False)
        return value in self.container

    def get(self, key: Any, default: Any = None) -> Any:
        """Return dict.get(): one element is read."""
        self._note(key, False)
        return self.container.get(key, default)

    def add(self, value: Any) -> None:
        """Do set.add(): one element is written."""
        self._note(value, True)
        self.container.add(_plain(value))

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
    memory: if the slot's value is memory of cffi's, accesses to that are reported, too.  constructors: the
    code of the __init__ methods of the classes that have the slot.  Their stores are not reported: nothing
    else can reach the object before the store that makes it visible, which is reported.
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


def _reader(cls: type, state: Races, constant: frozenset[str], aside: frozenset[str] = frozenset()) -> Any:
    """Return the __getattribute__ of a class with objects that have a __dict__, as a patch may add one.

    aside: attributes that are not watched.
    """
    # Methods and properties are code; the attributes that they read are reported, too.
    code = aside | {name for name in dir(cls) if _is_code(getattr_static(cls, name))}
    watches_memory = _watches_memory(cls, constant)

    def read(self: object, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name in code:
            return value
        contains, memory = type(value) in _CONTAINERS, watches_memory and type(value) in _MEMORY
        if (name in constant and not contains and not memory) or not state.awake:
            return value
        sentence = f"{cls.__name__}.{name}"
        if name not in constant:
            state.access(self, sentence, None, False, 2)
        if memory:
            state.access(value, f"{sentence}[]", None, True, 2)
        return Watched(value, f"{sentence}[]", state) if contains else value

    return read


def _is_code(value: object) -> bool:
    return hasattr(type(value), "__get__") and not isinstance(value, MemberDescriptorType)


def _writer(cls: type, state: Races) -> Any:
    constructor = getattr(cls.__init__, "__code__", None)  # type: ignore[misc]

    def write(self: object, name: str, value: Any) -> None:
        object.__setattr__(self, name, _plain(value))
        if state.awake and sys._getframe(1).f_code is not constructor:
            state.access(self, f"{cls.__name__}.{name}", None, True, 2)

    return write


def _watches_memory(cls: type, constant: frozenset[str]) -> bool:
    """Return whether to watch cffi's memory: that of a CPU is its own, and the audit knows that of KVM."""
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


def watch_objects(cls: type, state: Races, aside: frozenset[str]) -> None:
    """Make the objects of a class report accesses to their attributes but for `aside`, from now on."""
    cls.__getattribute__ = _reader(cls, state, frozenset(), aside)  # type: ignore[method-assign]
    cls.__setattr__ = _writer(cls, state)  # type: ignore[method-assign]


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
