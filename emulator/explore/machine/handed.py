"""A stand-in for one of KVM's containers that a policy was given: it reports each access to the elements.

It acts as the container itself, `isinstance` included.  Iteration over a list is one access per element,
because another thread can change the list in between.  Iteration over another container is one access: the
interpreter refuses changes in between, and `list(...)` or `sorted(...)` let none happen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Final, Protocol

CONTAINERS: Final = (list, dict, set, deque, bytearray)
# Methods that change their container.
CHANGES: Final = frozenset((
    "add", "append", "appendleft", "clear", "difference_update", "discard", "extend", "insert",
    "intersection_update", "pop", "popitem", "popleft", "remove", "reverse", "rotate", "setdefault", "sort",
    "symmetric_difference_update", "update", "__delitem__", "__iadd__", "__iand__", "__imul__", "__ior__",
    "__isub__", "__ixor__", "__setitem__",
))  # fmt: skip
_LOOKS: Final = (
    "__add__", "__and__", "__contains__", "__eq__", "__ge__", "__getitem__", "__gt__", "__le__", "__len__",
    "__lt__", "__mul__", "__ne__", "__or__", "__rand__", "__repr__", "__reversed__", "__rmul__", "__ror__",
    "__rsub__", "__rxor__", "__str__", "__sub__", "__xor__",
)  # fmt: skip


class Listener(Protocol):
    def element(self, key: str, which: Hashable, container: Any, write: bool) -> None: ...


class Handed:
    """A stand-in for `container`, the value of an attribute (`key`) of one object (`which`)."""

    __slots__ = ("_container", "_key", "_listener", "_which")

    def __init__(self, container: Any, key: str, which: Hashable, listener: Listener) -> None:
        self._container, self._key, self._which, self._listener = container, key, which, listener

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._container)

    def _note(self, write: bool = False) -> None:
        self._listener.element(self._key, self._which, self._container, write)

    def _do(self, method: str, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        self._note(method in CHANGES)
        found = getattr(self._container, method)(
            *map(plain, args), **{name: plain(value) for name, value in given.items()}
        )
        if found is self._container:
            return self
        if method in ("items", "keys", "values"):
            return list(found)
        return iter(list(found)) if method == "__reversed__" else found

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if not callable(getattr(self._container, method)):
            raise AttributeError(method)
        return lambda *args, **given: self._do(method, args, given)

    def __iter__(self) -> Iterator[Any]:
        if not isinstance(self._container, list | bytearray):
            self._note()
            yield from tuple(self._container)
            return
        at = 0
        while True:
            self._note()
            if at >= len(self._container):
                return
            yield self._container[at]
            at += 1

    def __radd__(self, other: Any) -> Any:
        self._note()
        return plain(other) + self._container

    def __bytes__(self) -> bytes:
        self._note()
        return bytes(self._container)

    __hash__ = None  # type: ignore[assignment]


def _does(method: str) -> Callable[..., Any]:
    def do(self: Handed, *args: Any) -> Any:
        if not hasattr(self._container, method):
            return NotImplemented
        return self._do(method, args, {})

    return do


for _name in (*_LOOKS, *(name for name in CHANGES if name.startswith("__"))):
    setattr(Handed, _name, _does(_name))


def plain(value: Any) -> Any:
    """Return the container behind a stand-in, and any other value as it is."""
    return value._container if type(value) is Handed else value
