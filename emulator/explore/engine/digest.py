"""Compute the state of Python objects as a hashable value: their differences from a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from enum import Enum
from functools import partial
from itertools import chain
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final, cast

from emulator.explore.engine.snapshot import Snapshot
from native import ffi

_PLAIN: Final = (type(None), bool, int, float, str, bytes, Enum, range)
_NAMED: Final = (type, BuiltinFunctionType, ModuleType)
_MISSING: Final = object()
_Items = list[tuple[object, tuple[object, ...]]]


class CannotDigest(TypeError):
    """An object is of a type of which the digest cannot read the state."""


class Digest:
    """Computes equal values for equal states, whichever execution has led to them.

    A value has the differences from the snapshot.  It names objects of the snapshot by their places there,
    and new objects by the order in which it meets them.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._places = {number: place for place, number in enumerate(snapshot._seen)}
        self._instances = [(key, items, _comparison(key[1])) for key, items in snapshot._instances.items()]
        self._met: dict[int, int] = {}
        self._kept: list[object] = []  # keeps new objects alive, so that no other one gets their address

    def now(self) -> Hashable:
        """Return the present state.  Raises CannotDigest."""
        if self._snapshot._namespaces:
            raise CannotDigest("the names of a module")
        self._met.clear()
        self._kept.clear()
        parts = self._slices(), self._mappings(), self._elements(), self._attributes(), self._others()
        return tuple(chain(*parts))

    def _slices(self) -> Iterator[Hashable]:
        for place, (container, contents) in enumerate(self._snapshot._slices):
            if not isinstance(container, list):
                memory = bytes(container)
                if memory != contents:
                    yield "bytes", place, memory
            elif _differ(contents, container):
                yield "list", place, self._each(container)

    def _mappings(self) -> Iterator[Hashable]:
        for place, (mapping, contents) in enumerate(self._snapshot._dicts):
            if _differ(tuple(chain(*contents.items())), tuple(chain(*mapping.items()))):
                yield "dict", place, self._each(chain(*mapping.items()))

    def _elements(self) -> Iterator[Hashable]:
        for place, (elements, contents) in enumerate((*self._snapshot._sets, *self._snapshot._deques)):
            if _differ(contents, tuple(elements)):
                yield "elements", place, self._each(elements)

    def _attributes(self) -> Iterator[Hashable]:
        for (kind, names), items, changed in self._instances:
            for place in changed(items):
                obj, values = items[place]
                for name, value in zip(names, values, strict=True):
                    present = getattr(obj, name, _MISSING)
                    if _differs(value, present):
                        yield kind, names, place, name, self._value(present)
        for place, (obj, name) in enumerate(self._snapshot._unset):
            if hasattr(obj, name):
                yield "set", place, name, self._value(getattr(obj, name))

    def _others(self) -> Iterator[Hashable]:
        for place, (obj, to, others) in enumerate(self._snapshot._referring):
            present = tuple(to(obj))
            if _differ(others, present):
                yield "refers", place, self._each(present)

    def _each(self, values: Iterable[object]) -> Hashable:
        return tuple(map(self._value, values))

    def _value(self, value: Any) -> Hashable:
        if isinstance(value, _PLAIN):
            return type(value).__name__, value
        if value is _MISSING:
            return "missing"
        if isinstance(value, _NAMED):
            return "named", value
        place = self._places.get(id(value))
        if place is not None:
            return "known", place
        met = self._met.get(id(value))
        if met is not None:
            return "met", met
        self._met[id(value)] = len(self._met)
        self._kept.append(value)
        return self._new(value)

    def _new(self, value: Any) -> Hashable:
        """Return the state of an object that the snapshot does not know."""
        kind = type(value)
        if isinstance(value, ffi.CData):
            return "memory", bytes(ffi.buffer(value)) if " owning " in repr(value) else address(value)
        if kind in (list, tuple):
            return kind.__name__, self._each(value)
        if kind is dict:
            return "dict", self._each(chain(*value.items()))
        if kind is bytearray:
            return "bytearray", bytes(value)
        if kind is MethodType:
            return "method", value.__func__, self._value(value.__self__)
        if kind is partial:
            return "partial", value.func, self._value(value.args), self._value(value.keywords)
        if kind is FunctionType:
            cells = self._each(cell.cell_contents for cell in value.__closure__ or ())
            return "function", value.__code__, cells
        if not kind.__module__.startswith("emulator."):
            raise CannotDigest(f"{kind.__module__}.{kind.__qualname__}")
        return kind, self._each(getattr(value, name, _MISSING) for name in _names(kind, value))


def _names(kind: type, value: object) -> list[str]:
    names = [name for cls in kind.__mro__ for name in getattr(cls, "__slots__", ())]
    return [*names, *getattr(value, "__dict__", {})]


def address(pointer: Any) -> int:
    return int(cast("int", ffi.cast("uintptr_t", pointer)))


def _differs(one: object, other: object) -> bool:
    """Return whether an object has been replaced: by another value, or by another object if it can change."""
    return one is not other and not (isinstance(one, _PLAIN) and type(one) is type(other) and one == other)


def _differ(some: Sequence[object], others: Sequence[object]) -> bool:
    if len(some) != len(others):
        return True
    return not all(map(is_, some, others)) and any(map(_differs, some, others))


def _comparison(names: tuple[str, ...]) -> Callable[[_Items], Sequence[int]]:
    """Return generated code that finds the objects of which an attribute is another object than before.

    It runs for each state, and almost no attribute changes.
    """
    values = [f"v{number}" for number in range(len(names))]
    same = " and ".join(f"obj.{name} is {value}" for name, value in zip(names, values, strict=True))
    code = f"""
def changed(items):
    try:
        return [place for place, (obj, ({", ".join(values)},)) in enumerate(items) if not ({same})]
    except AttributeError:
        return range(len(items))
"""
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    found: Callable[[_Items], Sequence[int]] = namespace["changed"]
    return found
