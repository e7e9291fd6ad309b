"""The rounds of a search: the strategies that run one after the other, each with its budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from emulator.explore.engine.scheduler import Divergence
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.machine.states import MachineStates
from emulator.explore.results.keeper import Keeper
from emulator.explore.results.minimize import minimized
from emulator.explore.results.record import record
from emulator.explore.results.workers import Team
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.forecast import Stage, stage_of
from emulator.explore.strategies.sampling import Pct, Pos, RandomWalk, Sampler, Surw
from emulator.explore.strategies.search import Found, Limits, search
from emulator.explore.strategies.stateful import Stateful
from emulator.explore.strategies.subtree import RUNS
from emulator.explore.strategies.tree import Tree, wide_search
from emulator.litmus.model import SAFE
from emulator.litmus.verdict import BOUNDED, VIOLATIONS

if TYPE_CHECKING:
    from emulator.explore.results.verdict import Verdict

Stop = Callable[[], bool]

WALKS: Final[Mapping[str, Callable[[int, int], Sampler]]] = {"pos": Pos, "surw": Surw, "random": RandomWalk}
# Sampled executions of each kind that the exhaustive strategy begins with.
PROBES: Final = 200
# A program with at most this number of executions is searched at once.
SMALL: Final = 60


class Told(Protocol):
    """Receives the number of runs since the call before, and a function that returns the present stage."""

    def __call__(self, runs: int, stage: Callable[[], Stage] | None = None) -> None: ...


def silent(runs: int, stage: Callable[[], Stage] | None = None) -> None:
    """Receive runs, and do nothing."""


class Runs:
    """The runs of a search, each told before it begins.  stop: whether the search is to end."""

    def __init__(self, stop: Stop, told: Told) -> None:
        self._stop = stop
        self._told = told
        self._stage: Callable[[], Stage] | None = None

    def stop(self) -> bool:
        self._told(1, self._stage)
        return self._stop()

    def watch(self, bound: int | None, search: Exhaustive | Tree, found: Found) -> None:
        """Take the search of a round for the present stage."""
        self._stage = partial(stage_of, bound, search, found)


class Rounds:
    """The rounds of one search.  keeper: keeps its state between them, and in them."""

    def __init__(
        self, program: LitmusProgram, verdict: Verdict, team: Team, runs: Runs, keeper: Keeper
    ) -> None:
        self.program = program
        self.verdict = verdict
        self.team = team
        self.runs = runs
        self.stop = runs.stop
        self.keeper = keeper
        keeper.begin(program, verdict)

    def run(self) -> None:
        violation = self.keeper.violation()
        if violation is not None:
            self._violated(violation)
        elif self.keeper.ended:
            return
        elif self.verdict.plan.strategy == "exhaustive":
            self._exhaustively()
        else:
            self._sampled()

    def _exhaustively(self) -> None:
        verdict, plan = self.verdict, self.verdict.plan
        bounds: list[int | None] = [*range(plan.rounds), None]
        if plan.bound is not None:
            bounds = list(range(plan.bound + 1))
        begun = self.keeper.number
        if plan.bound is None and not begun and self._probed():
            return
        if plan.stateful and not verdict.stateless:
            self._statefully()
            return
        for number, bound in enumerate(bounds, start=1):
            if number < begun:
                continue
            left = plan.executions - verdict.executions
            if left <= 0:
                return
            self.keeper.keep_round(number)
            # Leave some for the bounds to come, in case this one is out of reach.
            budget = left if number == len(bounds) else max(1, left // 4)
            found = self._widely(number, bound, Limits(executions=budget))
            _add(verdict, found, bound, "exhaustive")
            if found.schedule is not None:
                self._violated(found)
                return
            if found.complete and (bound is None or not found.bounded_away):
                verdict.verdict, verdict.complete, verdict.bound = SAFE, True, None
                return
            if found.complete:
                verdict.verdict, verdict.bound = BOUNDED, bound
            elif plan.bound is not None:
                return  # the next bound would be out of reach as well

    def _widely(self, number: int, bound: int | None, limits: Limits) -> Found:
        program, keeper = self.program, self.keeper
        left, keep = keeper.left(number), partial(keeper.keep_left, number)
        return wide_search(
            program,
            program.objects,
            bound,
            limits,
            bool,
            self.team,
            self.stop,
            left=left,
            keep=keep,
            watch=partial(self.runs.watch, bound),
        )

    def _statefully(self) -> None:
        """Search all interleavings, but the continuations of each state only once."""
        program, verdict = self.program, self.verdict
        budget = verdict.plan.executions - verdict.executions
        if budget <= 0:
            return
        self.keeper.keep_round(1)
        strategy = Stateful(program.objects, MachineStates(program), has_met=verdict.met > 0)
        limits, found = Limits(executions=budget, runs=RUNS * budget), Found()
        self.runs.watch(None, strategy, found)
        search(program, program.objects, strategy, limits, bool, self.stop, found=found)
        _add(verdict, found, None, "stateful")
        verdict.states = strategy.size
        if found.schedule is not None:
            self._violated(found)
        elif found.complete:
            verdict.verdict, verdict.complete, verdict.bound = SAFE, True, None

    def _probed(self) -> bool:
        """Search all executions if they are few, else sample some.  Return whether that decided the
        verdict."""
        program, verdict, plan = self.program, self.verdict, self.verdict.plan
        n = min(PROBES, plan.executions // 10)
        probes: list[tuple[str, Exhaustive | Sampler]] = [
            ("exhaustive", Exhaustive(program.objects, bound=0)),
            ("exhaustive", Exhaustive(program.objects)),
        ]
        if n:
            probes += [
                ("pct", Pct(n, plan.seed, plan.depth)),
                ("random", RandomWalk(n // 2 + 1, plan.seed)),
            ]
        for name, strategy in probes:
            budget = min(n, SMALL) + 1 if isinstance(strategy, Exhaustive) else n
            budget = min(budget, plan.executions - verdict.executions)
            if not budget:
                return False
            limits = Limits(executions=budget)
            found = search(program, program.objects, strategy, limits, bool, self.stop)
            _add(verdict, found, strategy.bound, name)
            if found.schedule is not None:
                self._violated(found)
                return True
            if found.complete and isinstance(strategy, Exhaustive) and not strategy.bounded_away:
                verdict.verdict, verdict.complete, verdict.bound = SAFE, True, None
                return True
        return False

    def _sampled(self) -> None:
        program, verdict, plan = self.program, self.verdict, self.verdict.plan
        strategy: Sampler
        if plan.strategy == "pct":
            strategy = Pct(plan.executions, plan.seed, plan.depth)
        else:
            strategy = WALKS[plan.strategy](plan.executions, plan.seed)
        before, keep = self.keeper.sampled(strategy), partial(self.keeper.keep_sampled, strategy)
        objects = program.objects
        found = search(program, objects, strategy, Limits(), bool, self.stop, found=before, keep=keep)
        _add(verdict, found, None, plan.strategy)
        if isinstance(strategy, Pct) and found.executions and not found.too_long:
            verdict.guarantee = strategy.guarantee()
        if found.schedule is not None:
            self._violated(found)

    def _violated(self, found: Found) -> None:
        assert found.schedule is not None
        program, verdict, schedule = self.program, self.verdict, found.schedule
        self.keeper.found(found)
        if program.reads is not None:
            program.reads.frozen = True
        if verdict.plan.minimize:
            schedule = minimized(program, schedule, found.outcome)
        recording = record(program, schedule)
        if recording.violation is None:
            raise Divergence(f"{found.outcome} did not come again")
        verdict.verdict = VIOLATIONS
        verdict.kinds = (found.outcome,)
        verdict.counterexample = recording
        if verdict.counterexample.kinds:
            verdict.kinds = verdict.counterexample.kinds


def _add(verdict: Verdict, found: Found, bound: int | None, strategy: str) -> None:
    verdict.executions += found.executions
    verdict.pruned += found.pruned
    verdict.steps += found.steps
    verdict.depth = max(verdict.depth, found.depth)
    verdict.met += found.met
    verdict.cut_off += found.too_long
    verdict.evidence.update(found.evidence)
    verdict.rounds.append(
        {
            "strategy": strategy,
            "preemption_bound": bound,
            "executions": found.executions,
            "pruned": found.pruned,
            "depth": found.depth,
            "complete": found.complete,
        }
    )
