"""Runs a program under a strategy: one execution after the other, until the search ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from emulator.explore.engine.objects import Objects
from emulator.explore.engine.scheduler import Execution
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.sampling import Sampler


class Met(NamedTuple):
    """The dangers of one execution.  precondition: whether it was met; a search that never meets it proves
    nothing.  evidence: how often each danger occurred."""

    precondition: bool
    evidence: Mapping[str, int]


class Program(Protocol):
    """The explored program.  Every execution starts from one state and depends on the schedule alone."""

    def start(self, execution: Execution) -> None:
        """Restore the initial state, and spawn the tasks."""

    def finish(self, execution: Execution) -> str:
        """Return the outcome of this execution: a short text, "" if there is nothing to report."""

    def met(self) -> Met:
        """Return the dangers of the execution that was finished last."""

    def abandon(self, execution: Execution) -> None:
        """Drop an execution without an outcome: it was pruned, or a task has failed."""


@dataclass(slots=True)
class Limits:
    """Limits of a search.

    executions: the most that may come to their ends.  runs: the most that may begin, including those that are
    given up half way; 0: no limit.  steps: the most of one execution.
    """

    executions: int = 0
    steps: int = 5000
    first_only: bool = True  # stop at the first bad outcome
    runs: int = 0

    def reached(self, found: Found) -> bool:
        runs = found.executions + found.pruned
        return 0 < self.executions <= found.executions or 0 < self.runs <= runs


@dataclass(slots=True)
class Found:
    """The results of a search.

    `complete`: every interleaving (within `bound` preemptions, if not None) was covered.  `met`: the number
    of executions that came to their ends and met the precondition; `evidence`: each danger's sum over all
    that came to their ends.
    """

    executions: int = 0
    pruned: int = 0
    depth: int = 0
    steps: int = 0
    too_long: int = 0
    met: int = 0
    evidence: Counter[str] = field(default_factory=Counter)
    complete: bool = False
    bounded_away: bool = False  # a choice was left out because of the bound
    more: bool = True  # the strategy has executions left
    outcomes: dict[str, int] = field(default_factory=dict)
    # The first execution with a bad outcome: the task of each step.
    schedule: tuple[int, ...] | None = None
    outcome: str = ""


def run_once(program: Program, objects: Objects, strategy: Exhaustive | Sampler, limits: Limits) -> Execution:
    execution = Execution(objects, strategy, limits.steps)
    program.start(execution)
    strategy.begin(len(execution.tasks))
    if isinstance(strategy, Sampler):
        strategy.watch(execution.tasks)
    execution.run()
    return execution


def search(
    program: Program,
    objects: Objects,
    strategy: Exhaustive | Sampler,
    limits: Limits,
    bad: Callable[[str], bool],
    stop: Callable[[], bool] = lambda: False,
    *,
    found: Found | None = None,
    keep: Callable[[Found], None] = lambda found: None,
) -> Found:
    """Run executions until the strategy has none left, a limit is reached, or an outcome is bad.

    found: the results of the strategy's earlier executions.  keep: called between executions.
    """
    found = Found() if found is None else found
    while found.more:
        keep(found)
        if stop() or limits.reached(found):
            break
        execution = run_once(program, objects, strategy, limits)
        if execution.failure is not None:
            program.abandon(execution)
            raise execution.failure
        _count(found, execution, program)
        if found.schedule is None and bad(found.outcome):
            found.schedule = strategy.schedule()
            if limits.first_only:
                break
        if isinstance(strategy, Exhaustive):
            strategy.met = found.met
        found.more = strategy.end(execution.tasks, execution.deadlock)
    found.complete = strategy.exhaustive and not found.more and not found.too_long
    found.bounded_away = strategy.bounded_away
    return found


def _count(found: Found, execution: Execution, program: Program) -> None:
    found.steps += execution.length
    found.depth = max(found.depth, execution.length)
    if execution.pruned:
        found.pruned += 1
        found.outcome = ""
        program.abandon(execution)
        return
    found.executions += 1
    found.too_long += execution.too_long
    found.outcome = program.finish(execution)
    found.outcomes[found.outcome] = found.outcomes.get(found.outcome, 0) + 1
    if not execution.too_long:
        met = program.met()
        found.met += met.precondition
        found.evidence.update(met.evidence)
