"""Check that executions which reach states with equal keys can go on alike, as a stateful search assumes.

The audit records pairs of ways to one state: the way after which the search has tried all continuations, and
a way on which the search ended there.  It then continues both with the same tasks, chosen at random, to the
end, and compares each step, the results of its calls, and the final state.
"""

from __future__ import annotations

from collections.abc import Hashable

from emulator.explore.engine.objects import Objects, bits
from emulator.explore.engine.scheduler import Divergence, Task
from emulator.explore.strategies.dpor import Node
from emulator.explore.strategies.sampling import Random, Sampler
from emulator.explore.strategies.search import Limits, Program, run_once
from emulator.explore.strategies.stateful import Stateful, StatefulNode, States

Way = tuple[int, ...]  # the steps of an execution from its start, by their tasks


class Ways(Stateful):
    """A stateful search that keeps pairs of ways to one state: the first, and one that ended there."""

    def __init__(self, objects: Objects, states: States) -> None:
        super().__init__(objects, states)
        self._first: dict[Hashable, Way] = {}
        self.pairs: list[tuple[Way, Way]] = []

    def _complete(self, node: Node) -> None:
        assert isinstance(node, StatefulNode)
        if node.key is not None:
            self._first.setdefault(node.key, tuple(above.chosen for above in self.stack))
        super()._complete(node)

    def _matched(self, key: Hashable) -> None:
        self.pairs.append((self._first[key], tuple(above.chosen for above in self.stack)))


class _Way(Sampler):
    """Follows a way, and then `then`; without `then` chooses tasks at random, and records them there."""

    def __init__(self, way: Way, random: Random | None, then: list[int] | None = None) -> None:
        super().__init__(1)
        self.way = way
        self.random = random
        self.then = [] if then is None else then
        self.steps: list[Hashable] = []

    def pick(self, enabled: int, last: int) -> int:
        at = len(self._schedule)
        if at < len(self.way):
            index = self.way[at]
        elif self.random is not None:
            able = list(bits(enabled))
            index = able[self.random.below(len(able))]
            self.then.append(index)
        elif at - len(self.way) < len(self.then):
            index = self.then[at - len(self.way)]
        else:
            raise Divergence(f"step {at}: the other execution has ended")
        if not enabled >> index & 1:
            raise Divergence(f"step {at}: the task of this step cannot go on")
        return index

    def stepped(self, task: Task) -> None:
        if len(self._schedule) > len(self.way):
            self.steps.append((task.index, task.label, tuple(task.heard)))


def go_on_alike(program: Program, strategy: Ways, pairs: int, seed: int = 0) -> tuple[int, int]:
    """Continue `pairs` pairs of ways, chosen at random; return how many there were, and how many differed."""
    random = Random(seed)
    chosen = (
        [strategy.pairs[random.below(len(strategy.pairs))] for _ in range(pairs)] if strategy.pairs else []
    )
    differ = 0
    for one, other in chosen:
        first = _Way(one, random)
        outcome = _outcome(program, strategy, first)
        again = _Way(other, None, first.then)
        differ += (outcome, first.steps) != (_outcome(program, strategy, again), again.steps)
    return len(chosen), differ


def _outcome(program: Program, strategy: Ways, way: _Way) -> str:
    execution = run_once(program, strategy.objects, way, Limits())
    if execution.failure is not None or execution.too_long:
        program.abandon(execution)
        if execution.failure is not None and not isinstance(execution.failure, Divergence):
            raise execution.failure
        return "diverged"
    return program.finish(execution)
