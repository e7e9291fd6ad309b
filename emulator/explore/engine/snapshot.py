"""The state of Python objects, recorded once and restored in place many times.

A snapshot walks everything that is reachable from some objects: instances of classes that are written in
Python, containers, and memory that cffi owns.  It records the contents of each, one level deep, and
`restore()` writes them back into the same objects, so that references to them stay valid.  There is no list
of the state that may change: all mutable state is restored, and an object of a kind that cannot be restored
is refused (`CannotRestore`).
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import cached_property, partial
from operator import is_
from pathlib import PurePath
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    EllipsisType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    NotImplementedType,
)
from typing import Any, Final

from emulator.explore.engine.slots import StandIn
from native import ffi

# Immutable, or left as they are.
_ATOMS: Final = (
    type(None), bool, int, float, complex, str, bytes, range, type,
    BuiltinFunctionType, CodeType, EllipsisType, Enum, ModuleType, NotImplementedType, PurePath, re.Pattern,
)  # fmt: skip
_DICTS: Final = (dict, defaultdict, OrderedDict, Counter)
_SEQUENCES: Final = (list, bytearray)
_DESCRIPTORS: Final = (GetSetDescriptorType, MemberDescriptorType)
_HEAP_TYPE: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE: not one of the interpreter's static types
_WORD: Final = tuple.__itemsize__
_MISSING: Final = object()
_BUFFER: Final = type(ffi.buffer(ffi.new("char[]", 1)))


class CannotRestore(TypeError):
    """An object of a kind that a snapshot cannot restore."""


class Snapshot:
    """The present state of all objects that are reachable from `roots`.  Raises CannotRestore.

    constant: true of objects that are left alone, together with all that is reachable through them only.
    aside: by type, attributes that are left alone; the caller restores them itself.
    module: a module of which names, classes (also imported ones) and the attributes of functions are
    recorded.  Names, classes and functions of all other modules count as constant.
    """

    def __init__(
        self,
        roots: Iterable[object],
        constant: Callable[[object], bool] = lambda obj: False,
        aside: Mapping[type, frozenset[str]] = MappingProxyType({}),
        module: ModuleType | None = None,
    ) -> None:
        self._constant = constant
        self._aside = aside
        self._module = "" if module is None else module.__name__
        self._seen: dict[int, object] = {}
        self._instances: dict[tuple[type, tuple[str, ...]], list[tuple[object, tuple[object, ...]]]] = {}
        self._unset: list[tuple[object, str]] = []
        # (container, contents): restored by slice assignment, or emptied and filled again
        self._slices: list[tuple[Any, Any]] = []
        self._dicts: list[tuple[Any, Any]] = []
        self._sets: list[tuple[Any, Any]] = []
        self._deques: list[tuple[Any, Any]] = []
        self._namespaces: list[tuple[Any, dict[str, object]]] = []
        # (object, how to list what it refers to, that): not restored, and yet a change is one of the state
        self._referring: list[tuple[Any, Callable[[Any], Iterable[object]], tuple[object, ...]]] = []
        pending: list[object] = list(roots)
        if module is not None:
            pending.extend(self._keep_names(module))
        while pending:
            obj = pending.pop()
            if id(obj) not in self._seen and (self._is_own(obj) or not isinstance(obj, _ATOMS)):
                self._seen[id(obj)] = obj
                pending.extend(self._keep(obj))

    def __len__(self) -> int:
        """Return the number of objects that were visited."""
        return len(self._seen)

    def restore(self) -> None:
        """Restore the recorded state.  A set's order may change in the first restore, and only then."""
        for assign, items in self._restorers:
            assign(items)
        for container, contents in self._slices:
            container[:] = contents
        for mapping, contents in self._dicts:
            mapping.clear()
            mapping.update(contents)
        for elements, contents in self._sets:
            elements.clear()
            elements.update(contents)
        for queue, contents in self._deques:
            queue.clear()
            queue.extend(contents)
        for namespace, names in self._namespaces:
            _put_names_back(namespace, names)
        for obj, name in self._unset:
            if hasattr(obj, name):
                delattr(obj, name)

    @cached_property
    def _restorers(self) -> list[tuple[Callable[[Any], None], Any]]:
        return [(_restorer(names), items) for (_, names), items in self._instances.items()]

    def same(self, other: Snapshot) -> bool:
        """Return whether nothing has changed between the two snapshots."""
        return self._kept() == other._kept()

    def holds(self) -> bool:
        """Return whether all that was recorded is still there, object by object, so that nothing can differ.

        What is reachable can only change by a change of something recorded, each of which is looked at one
        level deep.  Far cheaper than another snapshot to compare with.
        """
        return (
            all(_is_each(contents, _contents(container)) for container, contents in self._slices)
            and all(_is_each_item(contents, mapping) for mapping, contents in self._dicts)
            and all(_is_each(contents, tuple(elements)) for elements, contents in self._sets)
            and all(_is_each(contents, tuple(queue)) for queue, contents in self._deques)
            and all(_is_each_item(names, _names(namespace)) for namespace, names in self._namespaces)
            and all(
                _is_each(values, [getattr(obj, name, _MISSING) for name in names])
                for (_, names), items in self._instances.items()
                for obj, values in items
            )
            and all(_is_each(others, tuple(to(obj))) for obj, to, others in self._referring)
            and not any(hasattr(obj, name) for obj, name in self._unset)
        )

    def _kept(self) -> tuple[object, ...]:
        kept = (self._slices, self._dicts, self._sets, self._deques, self._namespaces)
        return (self._seen.keys(), self._instances, self._unset, *kept)

    # --- one object -----------------------------------------------------------------------------------------

    def _keep(self, obj: Any) -> Iterable[object]:
        """Record the contents of an object, and return the objects that they refer to."""
        kind = type(obj)
        if self._constant(obj):
            return ()
        if isinstance(obj, type):
            return (*self._keep_names(obj), *obj.__bases__)
        if isinstance(obj, tuple | frozenset):
            return obj
        if kind is FunctionType and obj.__module__ == self._module:
            return (*self._refers(obj, _functions_own), vars(obj))
        if kind in _UNCHANGING:
            return self._refers(obj, _UNCHANGING[kind])
        if isinstance(obj, ffi.CData):
            return self._keep_memory(obj)
        if kind is CellType:
            return self._keep_instance(obj, kind, ["cell_contents"])
        if kind in _SEQUENCES:
            contents = kind(obj)
            self._slices.append((obj, contents))
            return contents if kind is list else ()
        if kind in _DICTS:
            mapping = dict(obj)
            self._dicts.append((obj, mapping))
            return [*mapping, *mapping.values()]
        if kind in (set, deque):
            elements = tuple(obj)
            (self._sets if kind is set else self._deques).append((obj, elements))
            return elements
        _check_python_class(kind)
        return self._keep_instance(obj, kind, _slots(kind))

    def _refers(self, obj: Any, to: Callable[[Any], Iterable[object]]) -> tuple[object, ...]:
        others = tuple(to(obj))
        self._referring.append((obj, to, others))
        return others

    def _keep_names(self, namespace: ModuleType | type) -> Iterable[object]:
        names = _names(namespace)
        self._namespaces.append((namespace, names))
        return names.values()

    def _is_own(self, obj: object) -> bool:
        """Return whether this is one of the module's classes, or a member of one of its enumerations."""
        cls = obj if isinstance(obj, type) else type(obj) if isinstance(obj, Enum) else None
        return cls is not None and bool(self._module) and self._module in {c.__module__ for c in cls.__mro__}

    def _keep_memory(self, obj: Any) -> Iterable[object]:
        """Record memory that cffi owns; the C core restores its own."""
        if " owning " in repr(obj):
            memory = ffi.buffer(obj)
            self._slices.append((memory, bytes(memory)))
        return ()

    def _keep_instance(self, obj: object, kind: type, names: list[str]) -> Iterable[object]:
        aside = self._aside.get(kind, frozenset())
        names = [name for name in names if name not in aside]
        there = tuple(name for name in names if hasattr(obj, name))
        self._unset += [(obj, name) for name in names if name not in there]
        values = tuple(getattr(obj, name) for name in there)
        if _is_frozen(kind):
            if there:
                self._refers(obj, lambda one: [getattr(one, name, _MISSING) for name in there])
            return (kind, *values, *getattr(obj, "__dict__", {}).values())
        if there:
            self._instances.setdefault((kind, there), []).append((obj, values))
        return (kind, *values, vars(obj)) if hasattr(obj, "__dict__") else (kind, *values)


def _contents(container: Any) -> Any:
    """Return the contents of a list, a bytearray or a piece of memory."""
    return container if isinstance(container, list) else bytes(container)


def _is_each(kept: Any, now: Any) -> bool:
    if isinstance(kept, bytes | bytearray):
        return bool(kept == now)
    return len(kept) == len(now) and all(map(is_, kept, now))


def _is_each_item(kept: Mapping[Any, object], now: Mapping[Any, object]) -> bool:
    return len(kept) == len(now) and all(now.get(name, _MISSING) is value for name, value in kept.items())


def _methods_own(method: Any) -> Iterable[object]:
    return (method.__self__, method.__func__)


def _functions_own(function: Any) -> Iterable[object]:
    """Return a function's closure variables and its parameters' defaults; the rest of it is code."""
    given = function.__kwdefaults__ or {}
    return (*(function.__closure__ or ()), *(function.__defaults__ or ()), *given.values())


def _partials_own(function: Any) -> Iterable[object]:
    return (function.func, function.args, *function.keywords.values())


# Types of immutable objects, and how to list the objects that they refer to.
_UNCHANGING: Final[Mapping[type, Callable[[Any], Iterable[object]]]] = {
    MethodType: _methods_own,
    FunctionType: _functions_own,
    partial: _partials_own,
    property: lambda one: (one.fget, one.fset, one.fdel),
    staticmethod: lambda one: (one.__func__,),
    classmethod: lambda one: (one.__func__,),
    MappingProxyType: lambda proxy: (*proxy.keys(), *proxy.values()),
    _BUFFER: lambda buffer: (),
}


def _names(namespace: ModuleType | type) -> dict[str, object]:
    """Return the names in the namespace, without the descriptors that Python itself puts into a class."""
    return {name: value for name, value in vars(namespace).items() if type(value) not in _DESCRIPTORS}


def _put_names_back(namespace: Any, names: Mapping[str, object]) -> None:
    now = _names(namespace)
    for name in now.keys() - names.keys():
        delattr(namespace, name)
    for name, value in names.items():
        if now.get(name, names) is not value:
            setattr(namespace, name, value)


def _is_frozen(kind: type) -> bool:
    """Return whether the class is a frozen dataclass: only objects that an instance refers to can change."""
    return bool(getattr(getattr(kind, "__dataclass_params__", None), "frozen", False))


def _members(cls: type) -> list[str]:
    return [name for name, value in vars(cls).items() if isinstance(value, MemberDescriptorType | StandIn)]


def _slots(kind: type) -> list[str]:
    """Return the attributes that lie in slots, by their names in the class (`__x` is mangled)."""
    return [name for cls in reversed(kind.__mro__) for name in _members(cls)]


def _check_python_class(kind: type) -> None:
    """Check that all state of an object lies in slots and __dict__, and none in fields of C code."""
    for cls in kind.__mro__[:-1]:
        base = cls.__base__
        room = cls.__basicsize__ - (base.__basicsize__ if base is not None else 0)
        # Some versions of Python keep the addresses of __dict__ and of weak references there.
        if not cls.__flags__ & _HEAP_TYPE or room > (len(_members(cls)) + 2) * _WORD or cls.__itemsize__:
            name = f"{kind.__module__}.{kind.__qualname__}"
            raise CannotRestore(f"{name}: objects of this type cannot be put back")


def _restorer(names: tuple[str, ...]) -> Callable[[list[tuple[object, tuple[object, ...]]]], None]:
    """Return generated code that assigns the attributes of many objects: it runs once per execution."""
    targets = ", ".join(f"obj.{name}" for name in names)
    namespace: dict[str, Any] = {}
    exec(f"def assign(items):\n    for obj, ({targets},) in items:\n        pass\n", namespace)
    found: Callable[[list[tuple[object, tuple[object, ...]]]], None] = namespace["assign"]
    return found
