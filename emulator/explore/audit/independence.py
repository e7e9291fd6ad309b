"""Audits that steps commute if their footprints call them independent.

Partial-order reduction rests on that: two adjacent steps of an execution that do not conflict can be swapped,
and the result is equal (Godefroid, "Partial-Order Methods for the Verification of Concurrent Systems", LNCS
1032, 1996, chapter 3).  The audit therefore swaps adjacent steps of random executions, replays all other
steps as before, and compares the final states.  A difference means that a footprint is incomplete.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from emulator.explore.engine.objects import Objects
from emulator.explore.engine.scheduler import Divergence, Execution, Label, Task
from emulator.explore.strategies.sampling import Random, RandomWalk, Replay, Sampler
from emulator.explore.strategies.search import Limits, Program, run_once


@dataclass(frozen=True, slots=True)
class Step:
    """A step of an execution.  reads, writes: sets of Objects.  able: the enabled tasks, as bits."""

    task: int
    name: str
    label: Label
    reads: int
    writes: int
    able: int

    def conflicts(self, other: Step) -> bool:
        return bool(self.writes & (other.reads | other.writes) or self.reads & other.writes)

    @property
    def what(self) -> tuple[int, Label]:
        """Return the task and label, without the accesses, which may depend on the values that it reads."""
        return self.task, self.label

    def __str__(self) -> str:
        return f"{self.name}'s {self.label[0]}"


class _Noted(Sampler):
    """A strategy that records the steps of its last execution."""

    steps: list[Step]
    _able = 0

    def begin(self, tasks: int) -> None:
        super().begin(tasks)
        self.steps = []

    def choose(self, enabled: int, last: int) -> int:
        self._able = enabled
        return super().choose(enabled, last)

    def stepped(self, task: Task) -> None:
        self.steps.append(Step(task.index, task.name, task.label, task.reads, task.writes, self._able))


class _Walk(_Noted, RandomWalk):
    pass


class _Again(_Noted, Replay):
    pass


class IndependenceCheck:
    """Random executions of a program with some adjacent steps swapped.

    swaps: their number so far.  findings: sentences, and the number of swaps that showed each.
    """

    def __init__(self, program: Program, objects: Objects, seed: int) -> None:
        self.program = program
        self.objects = objects
        self.swaps = 0
        self.findings: Counter[str] = Counter()
        self._random = Random(seed)
        self._swapped: Counter[tuple[str, str]] = Counter()

    def run(self, executions: int, swaps: int) -> None:
        """Run executions, with up to `swaps` swaps each, and without those that end early, as at a violation.

        Raises the exceptions of tasks.
        """
        walk = _Walk(executions, self._random.next())
        for _ in range(executions):
            execution, residue = self._run(walk)
            if execution.failure is not None:
                raise execution.failure
            if execution.stopped or execution.deadlock or not execution.clean:
                continue
            for at in self._rarest(walk.steps, swaps):
                self._swap(walk.steps, at, residue)

    def _run(self, strategy: Sampler) -> tuple[Execution, str]:
        program = self.program
        execution = run_once(program, self.objects, strategy, Limits())
        if execution.failure is not None or execution.too_long:
            program.abandon(execution)
            return execution, ""
        return execution, program.finish(execution)

    def _rarest(self, steps: list[Step], n: int) -> list[int]:
        """Return the positions of up to n independent pairs: those that were swapped least often so far."""
        places = [
            (self._swapped[str(one), str(other)], self._random.next(), i)
            for i, (one, other) in enumerate(pairwise(steps))
            if one.task != other.task and not one.conflicts(other)
        ]
        return [i for _, _, i in sorted(places)[:n]]

    def _swap(self, steps: list[Step], at: int, residue: str) -> None:
        first, second = steps[at], steps[at + 1]
        self.swaps += 1
        self._swapped[str(first), str(second)] += 1
        if not first.able >> second.task & 1:
            what = "the second cannot come first"
        else:
            what = self._difference([*steps[:at], second, first, *steps[at + 2 :]], residue)
        if what:
            self.findings[f"{first}, {second}: {what}"] += 1

    def _difference(self, wanted: list[Step], residue: str) -> str:
        again = _Again(tuple(step.task for step in wanted))
        execution, now = self._run(again)
        if isinstance(execution.failure, Divergence):
            return "then the next step cannot follow"
        if execution.failure is not None:
            raise execution.failure
        if now != residue:
            return "something else is left behind"
        same = [step.what for step in again.steps] == [step.what for step in wanted]
        return "" if same else "then the result is different"
