"""Strategies that try some interleavings: random walks, PCT, POS, SURW, and a recorded schedule again.

PCT (Burckhardt, Kothari, Musuvathi, Nagarakatte, "A randomized scheduler with probabilistic guarantees of
finding bugs", ASPLOS 2010): tasks have random priorities, and the enabled task of the highest one takes the
next step; at d - 1 random steps the running task's priority drops below all others.  A bug of depth d in a
program of n tasks and k steps is found with a probability of at least 1 / (n * k^(d-1)) in each execution.

POS (Yuan, Yang, Gu, "Partial order aware concurrency sampling", CAV 2018): each step has a random priority.
The enabled task with the next step of the highest priority goes on, and then all next steps that conflict
with the step that was taken get new priorities.  So the orders of steps that do not conflict take no share of
the sample.

SURW (Zhao, Wolff, Mathur, Roychoudhury, "Selectively uniform concurrency testing", ASPLOS 2025): the orders
of some steps are sampled uniformly, here those that touch one shared object, another one in each execution.
The task that is to take the next of these steps is drawn with a probability in proportion to the number of
them that the task has left; until then the others' wait.  All other steps are a random walk.  The numbers are
those of the execution before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from emulator.explore.engine.objects import Objects, bits, members, name_of
from emulator.explore.engine.scheduler import Divergence, Known, Task, Wait

_U64 = (1 << 64) - 1


class Random:
    """splitmix64 (Steele, Lea, Flood 2014): one seed yields equal numbers on every machine."""

    __slots__ = ("state",)

    def __init__(self, seed: int) -> None:
        self.state = seed & _U64

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & _U64
        z = self.state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _U64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _U64
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        return (self.next() * n) >> 64


class Sampler:
    """The base of strategies without memory: a given number of executions, and no claim to completeness."""

    exhaustive = False
    bound: int | None = None
    bounded_away = False

    def __init__(self, executions: int) -> None:
        self.left = executions
        self._schedule: list[int] = []

    def begin(self, tasks: int) -> None:
        self._schedule = []
        self.left -= 1

    def watch(self, tasks: Sequence[Task]) -> None:
        """Receive the tasks of the execution, which announce their next steps: a hook for subclasses."""

    def known(self) -> Sequence[Known]:
        return ()

    def schedule(self) -> tuple[int, ...]:
        return tuple(self._schedule)

    def choose(self, enabled: int, last: int) -> int:
        index = self.pick(enabled, last)
        self._schedule.append(index)
        return index

    def pick(self, enabled: int, last: int) -> int:
        raise NotImplementedError

    def stepped(self, task: Task) -> None:
        pass

    def end(self, tasks: list[Task], deadlock: tuple[Wait, ...]) -> bool:
        return self.left > 0

    def plain(self, objects: Objects) -> dict[str, Any]:
        """Return the state between two executions as plain values, with which another process goes on."""
        return {"left": self.left}

    def go_on(self, plain: Mapping[str, Any], objects: Objects) -> None:
        """Take the state that `plain` has returned."""
        self.left = plain["left"]


class Seeded(Sampler):
    """The base of strategies with a seed."""

    def __init__(self, executions: int, seed: int) -> None:
        super().__init__(executions)
        self._random = Random(seed)

    def plain(self, objects: Objects) -> dict[str, Any]:
        return {**super().plain(objects), "random": self._random.state}

    def go_on(self, plain: Mapping[str, Any], objects: Objects) -> None:
        super().go_on(plain, objects)
        self._random.state = plain["random"]


class RandomWalk(Seeded):
    """Chooses each enabled task with equal probability."""

    def pick(self, enabled: int, last: int) -> int:
        able = list(bits(enabled))
        return able[self._random.below(len(able))] if len(able) > 1 else able[0]


class Pct(Seeded):
    """PCT for bugs of `depth` d; `steps` k is an estimate that grows to the longest execution seen."""

    def __init__(self, executions: int, seed: int, depth: int, steps: int = 1) -> None:
        super().__init__(executions, seed)
        self.depth = depth
        self.steps = steps
        self.tasks = 0
        self._at = 0
        self._priorities: list[int] = []
        self._changes: dict[int, int] = {}

    def begin(self, tasks: int) -> None:
        super().begin(tasks)
        self.steps = max(self.steps, self._at)
        self.tasks = tasks
        self._at = 0
        random = self._random
        # Priorities d .. d + n - 1 in random order (Fisher-Yates); change points give d - 1 .. 1.
        self._priorities = [self.depth + i for i in range(tasks)]
        for i in range(tasks - 1, 0, -1):
            j = random.below(i + 1)
            self._priorities[i], self._priorities[j] = self._priorities[j], self._priorities[i]
        self._changes = {random.below(self.steps) + 1: self.depth - i for i in range(1, self.depth)}

    def pick(self, enabled: int, last: int) -> int:
        return max(bits(enabled), key=self._priorities.__getitem__)

    def stepped(self, task: Task) -> None:
        self._at += 1
        lower = self._changes.get(self._at)
        if lower is not None:
            self._priorities[task.index] = lower

    def plain(self, objects: Objects) -> dict[str, Any]:
        return {**super().plain(objects), "steps": max(self.steps, self._at), "tasks": self.tasks}

    def go_on(self, plain: Mapping[str, Any], objects: Objects) -> None:
        super().go_on(plain, objects)
        self.steps, self.tasks = plain["steps"], plain["tasks"]

    def guarantee(self) -> float:
        """Return a lower bound of the probability that one more execution finds a bug of this depth."""
        steps = max(self.steps, self._at)
        return 1.0 / float(max(1, self.tasks) * steps ** (self.depth - 1))


class Pos(Seeded):
    """POS: priorities of steps."""

    def __init__(self, executions: int, seed: int) -> None:
        super().__init__(executions, seed)
        self._tasks: Sequence[Task] = ()
        self._priorities: list[int] = []

    def watch(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        self._priorities = [self._random.next() for _ in tasks]

    def pick(self, enabled: int, last: int) -> int:
        return max(bits(enabled), key=self._priorities.__getitem__)

    def stepped(self, task: Task) -> None:
        # The task's next step is a new one, and is announced after this call.
        touched = task.reads | task.writes
        for other in self._tasks:
            if other is task or task.writes & (other.reads | other.writes) or touched & other.writes:
                self._priorities[other.index] = self._random.next()


class Surw(Seeded):
    """SURW: the orders of the steps that touch one object, uniformly.

    chosen: the object of this execution; 0 in the first one, which only counts.
    """

    def __init__(self, executions: int, seed: int) -> None:
        super().__init__(executions, seed)
        self._tasks: Sequence[Task] = ()
        self.chosen = 0
        self._left: list[int] = []  # by task: its steps that touch the object and are still to come
        self._next = -1  # the task that is to take the next of them
        # Of the execution so far, by object: the steps of each task that touch it; the objects written.
        self._steps: dict[int, Counter[int]] = {}
        self._written = 0

    def watch(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        shared = [bit for bit, steps in self._steps.items() if len(steps) > 1 and self._written >> bit & 1]
        self.chosen, self._left = 0, [0] * len(tasks)
        if shared:
            bit = shared[self._random.below(len(shared))]
            self.chosen = 1 << bit
            for index, steps in self._steps[bit].items():
                self._left[index] = steps
        self._steps, self._written = {}, 0
        self._draw()

    def plain(self, objects: Objects) -> dict[str, Any]:
        steps = [[objects.names[bit], list(by_task.items())] for bit, by_task in self._steps.items()]
        return {**super().plain(objects), "steps": steps, "written": objects.of(self._written)}

    def go_on(self, plain: Mapping[str, Any], objects: Objects) -> None:
        super().go_on(plain, objects)
        self._steps = {
            objects.bit(name_of(name)).bit_length() - 1: Counter(dict(by_task))
            for name, by_task in plain["steps"]
        }
        self._written = objects.mask(map(name_of, plain["written"]))

    def _draw(self) -> None:
        """Draw the task that is to take the next step of those that touch the object; -1: none is left."""
        self._next, left = -1, sum(self._left)
        at = self._random.below(left) if left else 0
        for index, steps in enumerate(self._left):
            if at < steps:
                self._next = index
                return
            at -= steps

    def pick(self, enabled: int, last: int) -> int:
        able = list(bits(enabled))
        free = [index for index in able if index == self._next or not self._touches(index)]
        free = free or able  # the numbers were another execution's, or the drawn task cannot go on
        index = free[self._random.below(len(free))]
        self._count(index)
        return index

    def _touches(self, index: int) -> bool:
        task = self._tasks[index]
        return bool((task.reads | task.writes) & self.chosen)

    def _count(self, index: int) -> None:
        task = self._tasks[index]
        self._written |= task.writes
        for bit in members(task.reads | task.writes):
            self._steps.setdefault(bit, Counter())[index] += 1
        if self._touches(index):
            self._left[index] = max(0, self._left[index] - 1)
            self._draw()


class Replay(Sampler):
    """Replays a given schedule; `then_any`: and goes on after its end."""

    def __init__(self, schedule: tuple[int, ...], then_any: bool = False) -> None:
        super().__init__(1)
        self.given = schedule
        self.then_any = then_any

    def pick(self, enabled: int, last: int) -> int:
        at = len(self._schedule)
        if at < len(self.given):
            index = self.given[at]
            if not enabled >> index & 1:
                raise Divergence(f"step {at}: the task of this step cannot go on")
            return index
        if not self.then_any:
            raise Divergence(f"step {at}: the recorded execution ended before")
        return last if last >= 0 and enabled >> last & 1 else (enabled & -enabled).bit_length() - 1
