"""Slots of classes that tell of each access to them.

While a user's policy is explored, a descriptor stands before each slot of the classes whose objects it is
given or finds through them (watchable.py).  A class without `__dict__` has nothing but its slots, and an
attribute reaches its slot through the descriptor however it is spelled: `getattr`, `copy`,
`operator.attrgetter`, `object.__getattribute__`, or the descriptor itself, taken when the policy's file was
executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, MemberDescriptorType
from typing import Any, Protocol


class Watcher(Protocol):
    """Hears of accesses, and makes them: `slot.plain_get`, `slot.plain_set`."""

    asking: dict[int, int]  # not empty: all reads are of interest

    def got(self, slot: Slot, obj: object) -> Any: ...

    def put(self, slot: Slot, obj: object, value: object) -> None: ...


class Slot:
    """The descriptor.  `key` names the attribute, `contents` the elements of its value.

    watched: reads are always of interest.  constructor: code that fills the slot before any other thread can
    know the object.  identity: reads the slot that tells objects apart.
    """

    __slots__ = (
        "attr", "constructor", "contents", "identity", "key", "member", "plain_delete", "plain_get",
        "plain_set", "watched", "watcher",
    )  # fmt: skip

    def __init__(
        self, cls: type, attr: str, member: MemberDescriptorType, identity: str, watcher: Watcher
    ) -> None:
        self.attr = attr
        self.key = f"{cls.__name__}.{attr}"
        self.contents = f"{self.key}[]"
        self.member = member
        self.plain_get: Callable[[object], Any] = member.__get__
        self.plain_set: Callable[[object, object], None] = member.__set__
        self.plain_delete: Callable[[object], None] = member.__delete__
        self.identity: Callable[[object], Any] | None = vars(cls)[identity].__get__ if identity else None
        constructor: Any = cls.__init__  # type: ignore[misc]
        self.constructor: CodeType = constructor.__code__
        self.watched = False
        self.watcher = watcher

    def __get__(self, obj: object, owner: type | None = None) -> Any:
        if obj is None:
            return self
        watcher = self.watcher
        if self.watched or watcher.asking:
            return watcher.got(self, obj)
        return self.plain_get(obj)

    def __set__(self, obj: object, value: object) -> None:
        self.watcher.put(self, obj, value)

    def __delete__(self, obj: object) -> None:
        self.plain_delete(obj)


def slots_of(classes: Mapping[type, str], watcher: Watcher) -> dict[tuple[type, str], Slot]:
    """Return a descriptor for each slot of these classes, by the class that has it and its name; `classes`
    says which slot tells two objects of a class apart, "" if none does."""
    found: dict[tuple[type, str], Slot] = {}
    for cls, identity in classes.items():
        for base in cls.__mro__:
            for attr, member in vars(base).items():
                if isinstance(member, MemberDescriptorType) and (base, attr) not in found:
                    found[base, attr] = Slot(base, attr, member, identity, watcher)
    return found


@contextmanager
def standing(slots: Mapping[tuple[type, str], Slot]) -> Iterator[None]:
    """Have the descriptors stand before their slots."""
    for (cls, attr), slot in slots.items():
        setattr(cls, attr, slot)
    try:
        yield
    finally:
        for (cls, attr), slot in slots.items():
            setattr(cls, attr, slot.member)
