"""One part of an exhaustive search: what lies behind one choice, as far as a budget goes.

A part is self-contained, so that any process can do it: it names shared objects, and does not number them.
What its races ask of nodes above it, and what it leaves undone, goes back to tree.py.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

from emulator.explore.engine.objects import Objects
from emulator.explore.engine.scheduler import Divergence, Task
from emulator.explore.strategies.dpor import Exhaustive, Node
from emulator.explore.strategies.search import Found, Limits, Program, search

# Runs of a part, those given up half way included, as a multiple of its executions: it must have an end.
RUNS: Final = 4

Access = tuple[tuple[Hashable, ...], tuple[Hashable, ...]]  # objects read, objects written
Sleep = dict[int, Access]


@dataclass(frozen=True, slots=True)
class Part:
    """prefix: the tasks' order up to here; its last step is new, and `sleep` are those that need not come
    instead of it.  executions, steps: as in search.Limits."""

    prefix: tuple[int, ...]
    sleep: Sleep
    bound: int | None
    executions: int
    steps: int


@dataclass(frozen=True, slots=True)
class Rest:
    """A node along the last execution, with choices that were not tried; see dpor.Node.  access: of the step
    that was taken; None: it has yet to be."""

    enabled: int
    last: int
    preemptions: int
    backtrack: int
    done: int
    chosen: int
    sleep: Sleep
    access: Access | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """found: what was seen.  first: the access of the prefix's last step.

    asked: (depth, tasks that begin the turned-round execution, the racing task) for nodes of the prefix;
    wanted: (depth, tasks), all of which must be tried there.
    """

    found: Found
    first: Access
    asked: tuple[tuple[int, int, int], ...]
    wanted: tuple[tuple[int, int], ...]
    rest: tuple[Rest, ...]


class Subtree(Exhaustive):
    """The strategy of a part."""

    def __init__(self, objects: Objects, part: Part) -> None:
        super().__init__(objects, bound=part.bound)
        self.part = part
        self.floor = len(part.prefix)
        # In the order in which they came up.
        self.asked: dict[tuple[int, int, int], None] = {}
        self.wanted: dict[tuple[int, int], None] = {}
        self.first: Access = ((), ())

    def choose(self, enabled: int, last: int) -> int:
        depth = self.depth
        if depth >= self.floor or depth < len(self.stack):
            return super().choose(enabled, last)
        node = self._new_node(enabled, last)
        node.chosen = self.part.prefix[depth]
        if not enabled >> node.chosen & 1:
            raise Divergence(f"step {depth}: the task of this step cannot go on, but it could elsewhere")
        if depth == self.floor - 1:
            for index, access in self.part.sleep.items():
                reads, writes = (self.objects.mask(names) for names in access)
                node.sleep[index] = (reads, writes)
                node.sleeping |= 1 << index
        self.stack.append(node)
        return node.chosen

    def stepped(self, task: Task) -> None:
        super().stepped(task)
        if self.depth == self.floor:
            self.first = _names(self.objects, task.reads, task.writes)

    # Races among the steps before the last one of the prefix were seen when these were new.

    def _add(self, i: int, begins: int, index: int) -> None:
        if i >= self.floor:
            super()._add(i, begins, index)
        elif self.depth >= self.floor:
            self.asked[i, begins, index] = None

    def _add_any(self, i: int, tasks: int) -> None:
        if i >= self.floor:
            super()._add_any(i, tasks)
        elif self.depth >= self.floor:
            self.wanted[i, tasks] = None


def rest_of(strategy: Exhaustive) -> tuple[Rest, ...]:
    """What is left to do, after a search that had to stop; the last node's choice is new."""
    nodes = strategy.stack[strategy.floor :]
    return tuple(_rest(strategy.objects, node, node is nodes[-1]) for node in nodes)


def _rest(objects: Objects, node: Node, new: bool) -> Rest:
    return Rest(
        node.enabled,
        node.last,
        node.preemptions,
        node.backtrack,
        node.done,
        node.chosen,
        {index: _names(objects, *access) for index, access in node.sleep.items()},
        None if new else _names(objects, node.reads, node.writes),
    )


def _names(objects: Objects, reads: int, writes: int) -> Access:
    return tuple(objects.of(reads)), tuple(objects.of(writes))


def search_part(
    program: Program,
    objects: Objects,
    part: Part,
    bad: Callable[[str], bool],
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    strategy = Subtree(objects, part)
    limits = Limits(executions=part.executions, steps=part.steps, runs=RUNS * part.executions)
    found = search(program, objects, strategy, limits, bad, stop)
    begun = found.executions + found.pruned > 0
    return Outcome(
        found,
        strategy.first,
        tuple(strategy.asked),
        tuple(strategy.wanted),
        rest_of(strategy) if begun and found.more and found.schedule is None else (),
    )
