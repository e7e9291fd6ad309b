"""Many tests under many policies: each pair in a process of a pool, verdicts in the order of the work."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from emulator.explore.results.rounds import Told, silent
from emulator.explore.results.search_file import SearchFile
from emulator.explore.results.size import size_of
from emulator.explore.results.verdict import INTERRUPTED, Plan, Stop, Verdict, explore_verdict
from emulator.litmus.model import LitmusTest
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import SEARCHED, Outcome
from emulator.processes import ProcessPool, ending
from native import VIOLATION_KINDS


@dataclass(frozen=True, slots=True)
class Work:
    test: LitmusTest
    policy: str
    plan: Plan
    seconds: float  # 0: no limit
    state: Path | None = None  # the directory in which searches are kept
    explains: bool = False  # the size of a search that does not end

    def file(self) -> SearchFile | None:
        """Return the file of this search, with its state.  Raises BadInput."""
        if self.state is None:
            return None
        return SearchFile(self.state, self.test, self.policy, self.plan).load()


def stop_of(work: Work) -> Stop:
    """Return a function that tells whether the search should end: its time is up, or a signal came."""
    started = time.monotonic()
    return lambda: (bool(work.seconds) and time.monotonic() - started > work.seconds) or ending()


def explore_one(work: Work, jobs: int = 1, told: Told = silent) -> Verdict:
    """Explore one test under one policy.  told: called with the number of runs since the call before."""
    policy = named_policy(work.policy)
    verdict = explore_verdict(work.test, policy, work.plan, stop_of(work), jobs, told=told, file=work.file())
    verdict.policy = work.policy
    if work.explains and work.plan.strategy == "exhaustive" and verdict.limit:
        verdict.size = size_of(work.test, work.policy, work.plan.options, work.plan.seed)
    return verdict


def explore_suite(
    work: Sequence[Work],
    jobs: int,
    told: Told = silent,
    one: Callable[..., Verdict] = explore_one,
) -> Iterator[Verdict]:
    """Yield verdicts in the order of the work; after a signal, those that were reached.

    one: explores a pair.  A single pair is divided among the processes.  told: called from time to time, with
    the number of runs since the call before; it hears of the runs of a pair in another process when that pair
    has its verdict.
    """
    if jobs <= 1 or len(work) <= 1:
        for pair in work:
            if ending():
                return
            yield from _reached(one(pair, jobs, told))
        return
    with ProcessPool(min(jobs, len(work))) as pool:
        futures = [pool.submit(one, pair) for pair in work]
        done: set[Future[Verdict]] = set()
        waiting = deque(futures)
        for future in pool.completed(futures, lambda: told(0)):
            if future.exception() is None:
                told(_runs(future.result()))
            done.add(future)
            while waiting and (waiting[0] in done or waiting[0].cancelled()):
                yield from _said(waiting.popleft())
        for future in waiting:
            yield from _said(future)


def _said(future: Future[Verdict]) -> Iterator[Verdict]:
    if not future.cancelled():
        yield from _reached(future.result())


def _runs(verdict: Verdict) -> int:
    return verdict.executions + verdict.pruned


def _reached(verdict: Verdict) -> Iterator[Verdict]:
    """Yield the verdict, unless a signal came before its first execution."""
    if verdict.executions or verdict.failure or verdict.limit != INTERRUPTED:
        yield verdict


def explore_all(
    tests: Sequence[tuple[LitmusTest, tuple[str, ...]]],
    executions: int,
    seed: int,
    jobs: int,
    progress: Callable[[int], None],
    seconds: float,
    told: Told = silent,
    state: Path | None = None,
) -> Iterator[Outcome]:
    """Explore every interleaving of each pair, up to `executions` and `seconds` (0: no limit), and yield the
    outcomes.  told: as for explore_suite(); state: as in Work.  Raises BadInput before any search."""
    plan = Plan(executions=executions, seed=seed, minimize=False)
    work = [Work(test, policy, plan, seconds, state) for test, policies in tests for policy in policies]
    for one in work:
        one.file()
    for verdict in explore_suite(work, jobs, told):
        progress(executions)
        proof = SEARCHED if verdict.counterexample is not None or verdict.failure else verdict.verdict
        # A violation counts under its most specific kind, as on real threads.
        kinds = [kind for kind in VIOLATION_KINDS if kind in verdict.kinds] or list(verdict.kinds)
        yield Outcome(
            verdict.test,
            verdict.policy,
            executions=verdict.executions,
            violating=int(bool(kinds)),
            kinds=dict.fromkeys(kinds[:1], 1),
            evidence=verdict.evidence,
            proof=proof,
            bound=verdict.bound,
            failure=verdict.failure,
            unwatched=verdict.unwatched,
            unordered=verdict.unordered,
            cut=verdict.limit == INTERRUPTED,
        )
