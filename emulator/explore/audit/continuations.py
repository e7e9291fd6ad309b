"""Check that executions which reach states with equal keys can go on alike, as a stateful search assumes.

The audit records pairs of ways to one state: the way after which the search has tried all continuations, and
a way on which the search ended there.  It then continues both with the same tasks, chosen at random, to the
end, and compares each step, the results of its calls, the tasks that can go on, and the final state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from emulator.explore.engine.objects import Objects, bits
from emulator.explore.engine.scheduler import Divergence, Label, Task
from emulator.explore.strategies.dpor import Node
from emulator.explore.strategies.sampling import Random, Sampler
from emulator.explore.strategies.search import Limits, Program, run_once, search
from emulator.explore.strategies.stateful import Stateful, StatefulNode, States
from emulator.explore.strategies.subtree import RUNS

Way = tuple[int, ...]  # the steps of an execution from its start, by their tasks
Step = tuple[str, Label, tuple[Hashable, ...]]  # behind a way: its task's name, and the results of its calls


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
        self.steps: list[Step] = []
        self.able: list[int] = []  # behind the way: before each step, the tasks that can go on

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
        if at >= len(self.way):
            self.able.append(enabled)
        if not enabled >> index & 1:
            raise Divergence(f"step {at}: the task of this step cannot go on")
        return index

    def stepped(self, task: Task) -> None:
        if len(self._schedule) > len(self.way):
            self.steps.append((task.name, task.label, tuple(task.heard)))


class StateCheck:
    """Pairs of ways to one state, continued alike.

    pairs: their number.  findings: sentences about continuations that differ, and the number of each.
    """

    def __init__(self, program: Program, strategy: Ways, seed: int) -> None:
        self.program = program
        self.strategy = strategy
        self.pairs = 0
        self.findings: Counter[str] = Counter()
        self._random = Random(seed)

    def run(self, executions: int, pairs: int) -> None:
        """Search up to `executions` executions, and continue `pairs` of the ways that they have met.

        Raises the exceptions of tasks.
        """
        strategy = self.strategy
        limits = Limits(executions=executions, runs=RUNS * executions, first_only=False)
        search(self.program, strategy.objects, strategy, limits, lambda outcome: False)
        for _ in range(pairs if strategy.pairs else 0):
            one, other = strategy.pairs[self._random.below(len(strategy.pairs))]
            self.pairs += 1
            found = self._difference(one, other)
            if found:
                self.findings[found] += 1

    def _difference(self, one: Way, other: Way) -> str:
        """Return how the continuations behind two ways differ; "" if they do not."""
        first = _Way(one, self._random)
        outcome = self._outcome(first)
        again = _Way(other, None, first.then)
        other_outcome = self._outcome(again)
        for (name, label, heard), step in zip(first.steps, again.steps, strict=False):
            if (name, label) != step[:2]:
                return f"behind equal states, {name}'s {label[0]} is another step"
            if heard != step[2]:
                return f"behind equal states, {name}'s {label[0]} has other results"
        if first.able != again.able:
            return "behind equal states, other tasks can go on"
        return "" if outcome == other_outcome else "behind equal states, something else is left behind"

    def _outcome(self, way: _Way) -> str:
        program = self.program
        execution = run_once(program, self.strategy.objects, way, Limits())
        if execution.failure is None and not execution.too_long:
            return program.finish(execution)
        program.abandon(execution)
        if execution.failure is not None and not isinstance(execution.failure, Divergence):
            raise execution.failure
        return "diverged"
