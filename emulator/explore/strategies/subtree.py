"""One part of an exhaustive search: the subtree behind one choice, up to a budget.

A part is self-contained, so that any process can search it: it names shared objects, and does not number
them.  It returns to tree.py the choices that its races add to nodes above it, and those that it leaves
untried.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

from emulator.explore.engine.objects import Objects
from emulator.explore.engine.scheduler import Divergence, Task
from emulator.explore.strategies.dpor import Exhaustive, Node
from emulator.explore.strategies.search import Found, Limits, Program, search

# Limit on the runs of a part, including those given up half way, as a multiple of its executions.
RUNS: Final = 4

Access = tuple[tuple[Hashable, ...], tuple[Hashable, ...]]  # objects read, objects written
Sleep = dict[int, Access]


@dataclass(frozen=True, slots=True)
class Part:
    """The input of a part.

    prefix: the task of each step up to the part; its last step is new.  sleep: the tasks that need not be
    tried in place of that step.  executions, steps: as in search.Limits.
    """

    prefix: tuple[int, ...]
    sleep: Sleep
    bound: int | None
    executions: int
    steps: int


@dataclass(frozen=True, slots=True)
class Rest:
    """A node along the last execution, with choices that were not tried; see dpor.Node.

    access: the chosen step's; None: that step has not been executed yet.
    """

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
    """The result of a part.  found: its search's.  first: the access of the prefix's last step.

    asked: for nodes of the prefix, (depth, tasks of which one must be tried there, preferably the racing
    task). wanted: (depth, tasks that must all be tried there).
    """

    found: Found
    first: Access
    asked: tuple[tuple[int, int, int], ...]
    wanted: tuple[tuple[int, int], ...]
    rest: tuple[Rest, ...]


class Subtree(Exhaustive):
    """The strategy that searches a part."""

    def __init__(self, objects: Objects, part: Part) -> None:
        super().__init__(objects, bound=part.bound)
        self.part = part
        self.floor = len(part.prefix)
        # Dicts, for their order: that of the races.
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

    # Races among the steps before the prefix's last one were recorded when those steps were new.

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
    """Return the path that is left of a search that had to stop; its last node's choice is new."""
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
