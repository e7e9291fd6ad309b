"""Audits that the steps of explored code cover the plain accesses of a tree's code to memory.

Explored code switches tasks at marked accesses only (explored.py).  A plain access to shared memory belongs
to the step before it.  That is sound if the steps' footprints order it with every conflicting access of other
tasks.  The tree is compiled so that it logs its accesses (shim/plain.c).  For each two accesses to one place,
of which one writes and one is plain, `Races` tells whether one happens before the other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final, cast

from emulator.explore.engine.scheduler import Task
from emulator.explore.machine.control import Control
from emulator.explore.machine.races import Access, Known, Races
from emulator.kernel_tree.build import Built
from emulator.kernel_tree.on_machine.core import Tree
from emulator.kernel_tree.on_machine.places import kernel_places

# Accesses are told apart by words of so many bytes.
_WORD: Final = 4
_NAME: Final = "memory of the tree's code"


@dataclass(frozen=True, slots=True)
class _Place:
    """An access in the tree's code, in the place of the code object of an access in Python."""

    returns: int
    marked: bool

    @property
    def co_qualname(self) -> str:
        return f"{self.returns} {self.marked:d}"


class PlainAccesses(Races):
    """Records the accesses of Python's code and of the tree's.

    plain: conflicting accesses of the tree's code without an order, as pairs of (write, place), and how often
    each was found.
    """

    def __init__(self, control: Control, tree: Tree) -> None:
        super().__init__(control)
        self.tree = tree
        self.logged = 0
        self.plain: Counter[tuple[tuple[bool, _Place], ...]] = Counter()

    def begin(self, tasks: int) -> None:
        super().begin(tasks)
        if tasks:
            self._take()

    def step_ends(self, task: Task) -> None:
        accesses = self._accesses[task.index]
        for address, count, write, place in self._take():
            for word in range(address // _WORD, (address + count - 1) // _WORD + 1):
                # Negative numbers are no objects of Python's.
                accesses.setdefault((-word, _NAME, place.marked, write), cast(CodeType, place))
        super().step_ends(task)

    def _take(self) -> list[tuple[int, int, bool, _Place]]:
        """Return the accesses that the tree's code has logged since the last call."""
        found: Any = self.tree.ffi.new("const struct tree_access **")
        n = self.tree.lib.tree_accesses(found)
        self.logged += n
        every = (found[0][at] for at in range(n))
        return [(a.address, a.bytes, bool(a.write), _Place(a.returns, bool(a.marked))) for a in every]

    def _check(self, known: Known, before: int, task: int, access: Access) -> None:
        name, marked, write, place = access
        if name != _NAME:
            super()._check(known, before, task, access)
            return
        for (other, other_marked, other_write), (step, other_place) in known.items():
            apart = other != task and (write or other_write) and not (marked and other_marked)
            if apart and not before >> step & 1:
                ends = ((write, cast(_Place, place)), (other_write, cast(_Place, other_place)))
                self.plain[tuple(sorted(ends, key=str))] += 1

    def sentences(self, built: Built) -> Counter[str]:
        """Return the plain accesses that no step orders, as sentences with the kernel's functions."""
        found: Counter[str] = Counter()
        for ends, n in self.plain.items():
            told = [_told(built, write, place) for write, place in ends]
            # Accesses of the shim's own primitives belong to the points of these.
            if all(told):
                found["; ".join(sorted(told))] += n
        return found


def _told(built: Built, write: bool, place: _Place) -> str:
    """Return one of the accesses in words; "" if a plain one is not in the tree's code itself."""
    places = kernel_places(built, [place.returns], innermost=not place.marked)
    if not places:
        return "an atomic access" if place.marked else ""
    name, where = places[0]
    return f"{'' if place.marked else 'plain '}{'write' if write else 'read'} in {name}() {where}"
