"""The verdict on a litmus test under a policy, explored: a proof, or how far the search came without one.

The exhaustive strategy goes from few preemptions to many (iterative context bounding: Musuvathi and Qadeer,
PLDI 2007), because most races need one or two and the shortest counterexample is the best one; then it goes
on without a bound, to the end if the budget allows.  A program that is not small is sampled first: sampled
executions find early a violation that an exhaustive search of a large program would find late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from emulator.explore.engine.scheduler import Divergence
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.options import NONE, ExploreOptions
from emulator.explore.machine.patched_code import kept_in_proposals, unwatched_state
from emulator.explore.machine.policy_code import unwatched
from emulator.explore.machine.policy_reads import Grown, Known
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.machine.states import hear, stateless
from emulator.explore.results.keeper import Keeper
from emulator.explore.results.record import Recording, record
from emulator.explore.results.rounds import WALKS, Rounds, Runs, Told, silent
from emulator.explore.results.search_file import SearchFile
from emulator.explore.results.size import Size
from emulator.explore.results.workers import Team
from emulator.explore.strategies.search import Limits
from emulator.litmus.failure import LitmusFailure
from emulator.litmus.model import INCONCLUSIVE, SAFE, LitmusTest
from emulator.litmus.verdict import BOUNDED, FAILED, SEARCHED, VIOLATIONS
from emulator.policy import Policy, PolicyError
from emulator.policy.user import source_of
from emulator.processes import ending
from emulator.report.cases import Case, Ending

# The `limit` of a search that a signal has ended.
INTERRUPTED = "interrupted"
STRATEGIES = ("exhaustive", "pct", *WALKS)
# How often the first execution is repeated with a user's policy: with new programs, and within each.
_BEGINNINGS, _REPETITIONS = 2, 4


@dataclass(frozen=True, slots=True)
class Plan:
    """How to explore.

    executions: the limit for all rounds together.  bound: the exhaustive strategy's last bound on
    preemptions; None: it tries 0 to `rounds` - 1 preemptions and then all.  depth: PCT's d.  stateful: the
    exhaustive strategy has no bound, and searches each state once, if states can be compared.
    """

    strategy: str = "exhaustive"
    executions: int = 2000
    bound: int | None = None
    rounds: int = 3
    seed: int = 0
    depth: int = 3
    minimize: bool = True
    options: ExploreOptions = NONE
    stateful: bool = False


@dataclass(slots=True)
class Verdict:
    """The result of exploring one test under one policy.

    bound: the most preemptions that are covered completely; None with `complete`: all interleavings.
    limit: the reason why an incomplete search ended: "seconds", "executions", "steps", "interrupted"; "" for
    the bound that was asked for.  cut_off: executions that had more steps than one may have.
    needs: dangers, any of which is the test's precondition; met: executions that met it; evidence: how often
    each danger occurred in all executions together.
    failure: the reason why an execution could not go on, as in litmus.verdict.Outcome.
    unwatched: uses of a user's policy or patch that the search cannot watch, a sentence each: nothing is
    proved.  unordered: state of patched code that several threads share without an ordering point, likewise.
    states: the number of states in a stateful search's table.  stateless: the reason why a search that was to
    be stateful could not compare states.
    size: the reason for the size of a search that did not end, if it is to be explained.
    before: runs of this search in earlier processes, which have kept it.  unkept: the error with which its
    state could not be written.
    """

    test: str
    policy: str
    plan: Plan
    needs: tuple[str, ...]
    verdict: str = SEARCHED
    kinds: tuple[str, ...] = ()
    executions: int = 0
    pruned: int = 0
    steps: int = 0
    depth: int = 0
    complete: bool = False
    limit: str = ""
    bound: int | None = None
    guarantee: float | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    met: int = 0
    evidence: Counter[str] = field(default_factory=Counter)
    counterexample: Recording | None = None
    failure: str = ""
    unwatched: tuple[str, ...] = ()
    unordered: tuple[str, ...] = ()
    cut_off: int = 0
    states: int = 0
    stateless: str = ""
    before: int = 0
    unkept: str = ""
    size: Size | None = None

    def document(self) -> dict[str, Any]:
        """Return the document for --json, which holds no times."""
        found = self.counterexample
        return {
            "test": self.test,
            "policy": self.policy,
            "verdict": self.verdict,
            "violations": list(self.kinds),
            "needs": list(self.needs),
            "met": self.met,
            "evidence": {name: n for name, n in sorted(self.evidence.items()) if n},
            "memory": self.plan.options.memory,
            **self.plan.options.document(),
            "strategy": self.plan.strategy,
            "seed": self.plan.seed,
            "complete": self.complete,
            "limit": self.limit or None,
            "preemption_bound": self.bound,
            "executions": self.executions,
            "pruned": self.pruned,
            "steps": self.steps,
            "depth": self.depth,
            "pct_guarantee": self.guarantee,
            "rounds": self.rounds,
            **({"states": self.states, "stateless": self.stateless or None} if self.plan.stateful else {}),
            "failure": self.failure or None,
            **({"size": self.size.document()} if self.size is not None else {}),
            **({"unwatched": list(self.unwatched)} if self.unwatched else {}),
            **({"unordered": list(self.unordered)} if self.unordered else {}),
            "counterexample": found.document() if found is not None else None,
        }

    def summary(self) -> str:
        """Return the verdict in one line, with the claim that the search supports."""
        if self.failure:
            return f"{FAILED}: {self.failure}"
        return f"{self._found()}{self._odds()}{self._states()}, {self.plan.options.describe()}"

    def case(self) -> Case:
        """Return the verdict as a case of a report for CI systems."""
        found = self.counterexample
        text = "" if found is None or found.violation is None else str(found.violation["text"])
        failed = self.failure or found is not None
        ending: Ending = "failed" if failed else "skipped" if self.verdict == INCONCLUSIVE else "passed"
        return Case(self.test, self.policy, ending, self.summary(), text)

    def _found(self) -> str:
        n = _several(self.executions, "interleaving")
        if self.verdict == VIOLATIONS:
            return f"{', '.join(self.kinds)} after {n}"
        if self.verdict == INCONCLUSIVE:
            return f"{INCONCLUSIVE}: {self._untested()}"
        return f"no violation {self.searched()}"

    def _untested(self) -> str:
        """Name the precondition that never held, and how much was searched for it."""
        if not self.executions:
            return f"no interleaving was executed{self._why()}"
        return f"the precondition ({' or '.join(self.needs)}) never held {self.searched()}"

    def searched(self) -> str:
        """Return how far the search came without a violation, beginning with "in" or "with"."""
        n = _several(self.executions, "interleaving")
        if self.complete:
            last = self.rounds[-1]["executions"]
            if self.states:
                return f"in any interleaving: {last:,} executions, behind each of {self.states:,} states once"
            every = f"all {last:,} interleavings" if last != 1 else "the only interleaving"
            return f"in {every}, up to the order of independent steps"
        if self.bound is not None:
            most = _several(self.bound, "preemption")
            return f"with up to {most}; nor in {n} altogether (not all{self._why()})"
        return f"in {n}; not all{self._why()}"

    def _states(self) -> str:
        return f", searched without states ({self.stateless})" if self.stateless else ""

    def _odds(self) -> str:
        if self.guarantee is None:
            return ""
        depth, odds = self.plan.depth, round(1 / self.guarantee)
        return f"; PCT's odds for a bug of depth {depth}: at least 1 in {odds:,} an execution"

    def _why(self) -> str:
        """Return the reason why nothing more is claimed."""
        if self.unwatched:
            return f", {self.unwatched[0]}, which explore cannot watch"
        if self.unordered:
            return f", no ordering point orders {self.unordered[0]}"
        return {
            "seconds": ", the time was up",
            "executions": ", --executions were done",
            "steps": f", {self.cut_off:,} were cut off after {Limits().steps:,} steps",
            INTERRUPTED: ", interrupted",
        }.get(self.limit, "")


def _several(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


Stop = Callable[[], bool]


def explore_verdict(
    test: LitmusTest,
    policy: Policy,
    plan: Plan | None = None,
    stop: Stop = lambda: False,
    jobs: int = 1,
    *,
    build: Callable[..., LitmusProgram] = LitmusProgram,
    told: Told = silent,
    file: SearchFile | None = None,
) -> Verdict:
    """Explore one test under one policy.

    stop: asked between executions.  With it, results depend on time; they never depend on the number of
    processes (`jobs`).  build: makes the program of this process.  told: called with the number of runs since
    the call before; runs that were given up half-way count.  file: go on with the search that is kept there,
    and keep this one there.
    """
    plan = plan or Plan()
    with policy.confined():
        if policy.overrides() or policy.is_patched_by_user():
            _check_that_it_repeats(test, policy, plan.options, build)
        keeper = Keeper(file, stop)
        known: Known | None = keeper.known
        while known is not None:
            verdict = Verdict(test.name, policy.name, plan, test.expect.needs)
            verdict.unwatched = unwatched_state(policy)
            program = build(test, policy, plan.options, known=known)
            known = _explored(program, verdict, Runs(stop, told), jobs, told, keeper)
            if known is not None:
                keeper.forget()
    if verdict.unwatched or verdict.unordered:
        _take_back(verdict)
    elif not verdict.complete and verdict.verdict not in (VIOLATIONS, FAILED):
        as_asked = plan.bound is not None and verdict.bound == plan.bound
        cut = "" if keeper.ended else INTERRUPTED if ending() else "seconds" if stop() else ""
        verdict.limit = cut or ("steps" if verdict.cut_off else "" if as_asked else "executions")
    if not verdict.met and verdict.verdict not in (VIOLATIONS, FAILED):
        verdict.verdict = INCONCLUSIVE
    return verdict


def _explored(
    program: LitmusProgram, verdict: Verdict, runs: Runs, jobs: int, told: Told, keeper: Keeper
) -> Known | None:
    """Explore the program.  Return the accesses that a new search must know, or None if none is needed."""
    reads = program.reads
    if verdict.plan.stateful:
        verdict.stateless = stateless(program)
        if not verdict.stateless:
            hear(program)
    try:
        with instrument(program.control), Team(program, jobs, runs.stop, told) as team:
            Rounds(program, verdict, team, runs, keeper).run()
        if reads is not None:
            reads.check()
        keeper.end()
    except Grown:
        assert reads is not None
        return reads.next()
    except LitmusFailure as error:
        verdict.verdict, verdict.failure = FAILED, str(error)
    except Divergence as error:
        raise _unsteady(program.policy, error) from error
    finally:
        program.close()
    verdict.unwatched = (*verdict.unwatched, *kept_in_proposals(program.policy))
    source = source_of(program.policy)
    if source is not None:
        verdict.unwatched = (*unwatched(source), *(() if reads is None else reads.seen.unwatched))
    if program.races is not None:
        verdict.unordered = tuple(sorted(program.races.findings))
    return None


def _take_back(verdict: Verdict) -> None:
    """Withdraw proofs: the search cannot watch some state, or does not know the order of its accesses.
    Violations remain."""
    if verdict.verdict in (SAFE, BOUNDED):
        verdict.verdict = SEARCHED
    verdict.complete, verdict.bound = False, None


def _check_that_it_repeats(
    test: LitmusTest, policy: Policy, options: ExploreOptions, build: Callable[..., LitmusProgram]
) -> None:
    """Check that one order of steps always yields one execution, because proofs rest on that.

    A user's policy can break it.  Raises PolicyError.
    """
    first = None
    for _ in range(_BEGINNINGS):
        program = build(test, policy, options, frozen=True)
        try:
            with instrument(program.control):
                for _ in range(_REPETITIONS):
                    found = record(program, ()).document()
                    first = first or found
                    if found != first:
                        raise Divergence("the first execution came out in another way")
        except LitmusFailure:
            return  # the search will report it
        except Divergence as error:
            raise _unsteady(policy, error) from error
        finally:
            program.close()


def _unsteady(policy: Policy, error: Divergence) -> Exception:
    """Return the error for equal steps with different results: a user's policy, if any, is at fault."""
    if not policy.overrides() and not policy.is_patched_by_user():
        return error
    found = f"the same steps went on in another way when they were repeated ({error})"
    return PolicyError(policy.spelled(), found, "answers that depend only on the events before them")
