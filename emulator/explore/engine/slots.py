"""Descriptors that report each access to a class's slots.

While a user's policy is explored, a descriptor stands before each slot of the classes of objects that the
policy is given, or finds through them (watchable.py).  A class without `__dict__` keeps all its state in
slots, and every spelling of an access goes through the descriptor: `getattr`, `copy`, `operator.attrgetter`,
`object.__getattribute__`, or the descriptor itself, taken when the policy's file was executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, MemberDescriptorType
from typing import Any, Protocol


class Watcher(Protocol):
    """Receives each access, and performs it with `slot.plain_get` or `slot.plain_set`."""

    asking: dict[int, int]  # while not empty, all reads are reported

    def got(self, slot: Slot, obj: object) -> Any: ...

    def put(self, slot: Slot, obj: object, value: object) -> None: ...


class StandIn:
    """A descriptor that stands before a slot, and performs the accesses to it."""

    __slots__ = ()


class Slot(StandIn):
    """The descriptor of one slot.  `key` names the attribute, `contents` the elements of its value.

    watched: reads are always reported.  constructor: the code that fills the slot before the object is
    visible to another thread.  identity: reads the slot that distinguishes the class's objects.
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
        self.identity: Callable[[object], Any] | None = getattr(cls, identity).__get__ if identity else None
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
    """Return a descriptor for each slot of these classes, by its class and name; `classes` maps each
    class to the slot that distinguishes its objects, "" if there is none."""
    found: dict[tuple[type, str], Slot] = {}
    for cls, identity in classes.items():
        for base in cls.__mro__:
            for attr, member in vars(base).items():
                if isinstance(member, MemberDescriptorType) and (base, attr) not in found:
                    found[base, attr] = Slot(base, attr, member, identity, watcher)
    return found


@contextmanager
def standing(slots: Mapping[tuple[type, str], Slot]) -> Iterator[None]:
    """Put the descriptors in place of their slots, and the slots back at the end."""
    for (cls, attr), slot in slots.items():
        setattr(cls, attr, slot)
    try:
        yield
    finally:
        for (cls, attr), slot in slots.items():
            setattr(cls, attr, slot.member)
