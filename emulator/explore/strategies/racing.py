"""The races of random executions, by operation: they tell the size of a search that does not end.

Each race that can be reversed may double the number of interleavings, and source-DPOR adds a choice for it.
A search that was stopped has mostly met races near the ends of executions, because it goes depth first.
Random executions show all alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from emulator.explore.engine.objects import Objects, members
from emulator.explore.engine.scheduler import Task, Wait
from emulator.explore.strategies.dpor import Exhaustive, Node
from emulator.explore.strategies.sampling import Random

Operation = tuple[str, int]  # a task's name, and the number of its operation from 1 on; 0 if it has none
Ends = tuple[Operation, Operation]


class Racing(Exhaustive):
    """A random walk that counts the races which an exhaustive search would reverse.

    operation: returns the operation that the task of this index is in.  races: how often two operations have
    raced; objects_of: the objects about which they did.
    """

    exhaustive = False

    def __init__(
        self, objects: Objects, executions: int, seed: int, operation: Callable[[int], Operation]
    ) -> None:
        super().__init__(objects)
        self.left = executions
        self.operation = operation
        self.races: Counter[Ends] = Counter()
        self.objects_of: dict[Ends, Counter[int]] = {}
        self._random = Random(seed)
        self._operations: list[Operation] = []  # by step

    def begin(self, tasks: int) -> None:
        super().begin(tasks)
        self.left -= 1
        self._operations.clear()

    def choose(self, enabled: int, last: int) -> int:
        node = Node(enabled, last, 0)
        able = members(enabled)
        node.chosen = able[self._random.below(len(able))] if len(able) > 1 else able[0]
        self.stack.append(node)
        self._operations.append(self.operation(node.chosen))
        return node.chosen

    def end(self, tasks: list[Task], deadlock: tuple[Wait, ...]) -> bool:
        self.stack.clear()
        self._forget_from(0)
        return self.left > 0

    def _reverse_race(self, i: int, depth: int, index: int, before: int) -> None:
        if depth == len(self.stack):
            return  # with a step that a deadlock has prevented
        one, other = self.stack[i], self.stack[depth]
        first, second = sorted((self._operations[i], self._operations[depth]))
        ends = first, second
        self.races[ends] += 1
        touched = one.writes & (other.reads | other.writes) | one.reads & other.writes
        self.objects_of.setdefault(ends, Counter()).update(members(touched))
