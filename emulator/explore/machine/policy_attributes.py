"""Attributes of a user's class that several threads share, although no ordering point orders their accesses.

A method of a policy is a step, and the search tries each order of these steps.  On real threads, and in the
kernel, two methods that run at a time come in between each other's reads and writes of a plain attribute.
Nothing is proved of such a class: its attribute is named, as a patch's is.  State (emulator.policy.state) has
an ordering point for each operation, and KVM's locks order the methods that are asked under them.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, Final

from emulator.explore.machine.races import Races
from emulator.explore.machine.watching import CHANGES, watch_objects
from emulator.policy import Policy
from emulator.policy.source import Source

if TYPE_CHECKING:
    from emulator.explore.machine.control import Control

_STORES: Final = frozenset({
    "STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR", "STORE_GLOBAL", "DELETE_GLOBAL",
    "STORE_DEREF",
})  # fmt: skip
_BEHIND: Final = frozenset({"setattr", "delattr", "vars", "__dict__", "__setattr__", "__delattr__", "next"})


def remembers(source: Source) -> bool:
    """Return whether a method of the policy's file may change memory of its own, as far as names show."""
    return any(map(_changes, _codes(source.code)))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the functions within `code`, without constructors: those end before threads run."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_name != "__init__" and constant.co_flags & _IS_FUNCTION:
                yield constant
            yield from _codes(constant)


_IS_FUNCTION: Final = 0x02  # CO_NEWLOCALS: no body of a class


def _changes(code: CodeType) -> bool:
    return any(one.opname in _STORES for one in dis.get_instructions(code)) or any(
        name in CHANGES or name in _BEHIND for name in code.co_names
    )


class PolicyAttributes(Races):
    """Finds races on what a policy's object remembers.  The order of its methods orders nothing."""

    def __init__(self, control: Control, source: Source) -> None:
        super().__init__(control)
        self.ignored = control.bit("policy", source.path)
        self._name = f"{Path(source.path).name}: {source.loaded.called}"
        self._writes = 0

    def begin(self, tasks: int) -> None:
        super().begin(tasks)
        # By task: the writes before each of its open queries, the innermost last.
        self._asked: dict[int, list[int]] = {}
        self._hidden: set[int] = set()  # tasks with a query that changed memory behind the attributes

    def adopt(self, policy: Any) -> None:
        """Watch the object of a file that was just executed; its class goes when it is executed again."""
        watch_objects(type(policy._mine), self, frozenset(vars(Policy())))

    def access(self, obj: object, name: str, index: object, write: bool, depth: int) -> None:
        self._writes += write
        super().access(obj, name, index, write, depth + 1)

    def asking(self, task: int) -> None:
        self._asked.setdefault(task, []).append(self._writes)

    def answered(self, task: int, changed: bool) -> None:
        """Note that a query has ended.  changed: the policy's memory is another one now."""
        if self._asked[task].pop() == self._writes and changed:
            self._hidden.add(task)
        if self._hidden and len(self._asked) > 1:
            self.findings[f"{self._name}: memory that no attribute of its object holds"] += 1
