"""A search as plain values, with which another process goes on: its tree, its results, its parts.

Shared objects are named: their bits are those of one process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from emulator.explore.engine.objects import name_of
from emulator.explore.strategies.search import Found
from emulator.explore.strategies.subtree import Access, Part, Rest, Sleep
from emulator.explore.strategies.tree import Branch, Left, Tree

Plain = dict[str, Any]
_NODE = ("step", "enabled", "last", "preemptions", "backtrack", "gone", "under_way")


def plain_left(left: Left) -> Plain:
    tree, names = left.tree, Names()
    return {
        "bound": tree.bound,
        "bounded_away": tree.bounded_away,
        "nodes": [] if tree.root is None else list(_nodes(tree.root, names)),
        "parts": [[part.prefix, names.sleep(part.sleep), part.executions, part.steps] for part in left.parts],
        "found": plain_found(left.found),
        "names": names.names,
    }


def left_of(plain: Plain) -> Left:
    tree, names = Tree(plain["bound"]), [name_of(name) for name in plain["names"]]
    tree.bounded_away = plain["bounded_away"]
    branches: list[Branch] = []
    for parent, values, sleep in plain["nodes"]:
        branches.append(_branch(branches[parent] if branches else None, values, _sleep(sleep, names)))
    tree.root = branches[0] if branches else None
    parts = [
        Part(tuple(prefix), _sleep(sleep, names), tree.bound, executions, steps)
        for prefix, sleep, executions, steps in plain["parts"]
    ]
    return Left(tree, found_of(plain["found"]), parts)


@dataclass(slots=True)
class Names:
    """Numbers of the shared objects' names, in the order in which they were met."""

    names: list[Hashable] = field(default_factory=list)
    _numbers: dict[Hashable, int] = field(default_factory=dict)

    def sleep(self, sleep: Sleep) -> list[Any]:
        return [
            [index, self._numbered(reads), self._numbered(writes)] for index, (reads, writes) in sleep.items()
        ]

    def _numbered(self, names: Iterable[Hashable]) -> list[int]:
        for name in names:
            if name not in self._numbers:
                self._numbers[name] = len(self.names)
                self.names.append(name)
        return [self._numbers[name] for name in names]


def _sleep(plain: Iterable[Any], names: Sequence[Hashable]) -> Sleep:
    def access(reads: Sequence[int], writes: Sequence[int]) -> Access:
        return tuple(names[n] for n in reads), tuple(names[n] for n in writes)

    return {index: access(reads, writes) for index, reads, writes in plain}


def _nodes(root: Branch, names: Names) -> Iterable[Any]:
    """Yield each node with the number of its parent, which precedes it; siblings keep their order."""
    stack, number = [(0, root)], 0
    while stack:
        parent, node = stack.pop()
        yield [parent, [getattr(node, name) for name in _NODE], names.sleep(node.sleep)]
        stack += [(number, child) for child in reversed(node.children.values())]
        number += 1


def _branch(parent: Branch | None, values: Sequence[Any], sleep: Sleep) -> Branch:
    step, enabled, last, preemptions, backtrack, gone, under_way = values
    branch = Branch(parent, step, Rest(enabled, last, preemptions, backtrack, gone, -1, sleep, None))
    branch.under_way = under_way
    if parent is not None:
        parent.children[step] = branch
    return branch


def plain_found(found: Found) -> Plain:
    return {one.name: getattr(found, one.name) for one in fields(Found)}


def found_of(plain: Mapping[str, Any]) -> Found:
    found = Found(**plain)
    found.evidence = Counter(found.evidence)
    found.schedule = None if found.schedule is None else tuple(found.schedule)
    return found
