"""The functions.  Each checks its input first, runs in the calling process, and prints nothing."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loguru import logger

from emulator.api.results import CompareResult, ExploreResult, LitmusResult, RunResult
from emulator.compare.measure import measure
from emulator.compare.runner import Comparer
from emulator.compare.runner import Plan as ComparePlan
from emulator.defaults import DEFAULT_SCENARIO
from emulator.errors import BadInput, shown
from emulator.explore.machine.options import ExploreOptions
from emulator.explore.results.verdict import STRATEGIES, explore_verdict
from emulator.explore.results.verdict import Plan as ExplorePlan
from emulator.job.job import Job
from emulator.litmus.loader import load_tests
from emulator.litmus.model import LitmusTest
from emulator.litmus.policies import kind_of_host
from emulator.litmus.runner import running
from emulator.litmus.table import Results
from emulator.policy import DEFAULT, Policy, canonical, class_policy, spelled_policy
from emulator.policy.suitable import check_suits, unasked_answer
from emulator.policy.user import UserPolicy
from emulator.scenario import limits
from emulator.scenario.config import Scenario, load_scaled
from emulator.scenario.sections import parse_duration

Named = str | type[Policy] | Policy
"""A policy: a spelling as on the command line, a class, or a policy that was loaded before."""


def run(
    scenario: str | Scenario = DEFAULT_SCENARIO,
    *,
    policy: Named = DEFAULT,
    duration: float | str | None = None,
    seed: int | None = None,
    pcpus: int | None = None,
    ept: bool | None = None,
    chaos: int = 0,
    unbounded: bool = False,
) -> RunResult:
    """Run a scenario under a policy on real threads, judge every use of a translation, and count flushes.

    `duration` is in seconds or a text such as "5s"; the options are `flushlab run`'s.  Raises BadInput.
    """
    shape = _scenario(scenario, pcpus, ept)
    chosen = _policy(policy)
    seconds = _seconds(duration) or shape.duration
    job = Job(shape, chosen, seed=_seed(seed), duration=seconds, chaos=chaos, unbounded=unbounded)
    with _quiet():
        result = job.run(lambda snapshot: None, threading.Event())
    return RunResult(measure(result, shape))


def compare(
    scenario: str | Scenario = "migration-storm",
    *,
    policies: Sequence[Named],
    repeat: int = 1,
    duration: float | str | None = None,
    seed: int | None = None,
    pcpus: int | None = None,
    ept: bool | None = None,
    chaos: int = 0,
    unbounded: bool = False,
) -> CompareResult:
    """Run the same seeded workload under each policy, the baseline first.  Raises BadInput."""
    shape = _scenario(scenario, pcpus, ept)
    chosen = tuple(map(_policy, policies))
    _check_names([policy.name for policy in chosen])
    if repeat < 1:
        raise BadInput("repeat", f"found {repeat}", "1 or more")
    for policy in chosen:
        check_suits(policy, shape.name, **shape.kind_of_host)
    plan = ComparePlan(
        scenario=shape,
        policies=chosen,
        repeat=repeat,
        duration=_seconds(duration) or shape.duration,
        seed=_seed(seed),
        chaos=chaos,
        unbounded=unbounded,
    )
    with _quiet():
        return CompareResult(Comparer(plan).run(lambda snapshot: None, threading.Event()))


def litmus(
    tests: str | Path | Sequence[str | Path] = (),
    *,
    policies: Sequence[Named] = (DEFAULT,),
    executions: int = 40,
    seed: int | None = None,
) -> LitmusResult:
    """Run litmus tests (all shipped ones by default) on real threads under each policy.  Raises BadInput."""
    plan = _pairs(tests, policies)
    chosen = _seed(seed) >> 1
    results = Results([test for test, _ in plan], chosen)
    with _quiet():
        for test, suiting in plan:
            left = list(suiting)
            while left:
                with running(test, chosen) as runner:
                    while left and runner.usable:
                        policy = left.pop(0)
                        results.add(runner.run(policy, executions, chosen))
    return LitmusResult(results)


def explore(
    tests: str | Path | Sequence[str | Path],
    *,
    policies: Sequence[Named] = (DEFAULT,),
    strategy: str = "exhaustive",
    executions: int = 2000,
    bound: int | None = None,
    seconds: float = 0,
    seed: int = 0,
    store_buffers: bool = False,
    adversary: Sequence[str] = (),
    adversary_budget: int = 1,
) -> ExploreResult:
    """Explore litmus tests in every interleaving under each policy: proofs and counterexamples.

    `executions` and `seconds` (0: no limit) are for each test and policy.  Raises BadInput.
    """
    if strategy not in STRATEGIES:
        raise BadInput("strategy", f"found {shown(strategy)}", " or ".join(STRATEGIES))
    options = ExploreOptions.given(list(adversary), adversary_budget, store_buffers)
    plan = ExplorePlan(strategy, executions, bound, seed=seed, options=options)
    verdicts = []
    with _quiet():
        for test, suiting in _pairs(tests, policies):
            for policy in suiting:
                verdicts.append(explore_verdict(test, policy, plan, _after(seconds)))
    return ExploreResult(tuple(verdicts))


def _scenario(scenario: str | Scenario, pcpus: int | None, ept: bool | None) -> Scenario:
    if isinstance(scenario, str):
        scenario = load_scaled(scenario, pcpus, ept)
    elif pcpus is not None or ept is not None:
        raise BadInput("scenario", "found one that is loaded, with pcpus or ept", "its name, or neither")
    limits.check(scenario)
    return scenario


def _policy(policy: Named) -> Policy:
    if isinstance(policy, str):
        return spelled_policy(policy, canonical(policy))
    if isinstance(policy, type) and issubclass(policy, Policy):
        return class_policy(policy)
    if type(policy) is Policy or isinstance(policy, UserPolicy):
        return policy
    found = f"found {shown(type(policy).__name__)}, an object"
    raise BadInput("policy", found, "a name, or a class that derives from flushlab.Policy")


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise BadInput("policies", "found none", "the policies to compare, the baseline first")
    for name in names:
        if names.count(name) > 1:
            raise BadInput("policies", f"found {name} twice", "each policy once")


def _pairs(
    tests: str | Path | Sequence[str | Path], policies: Sequence[Named]
) -> list[tuple[LitmusTest, list[Policy]]]:
    """Return each test with its policies.  If tests are named, raise BadInput for a policy that does not suit
    one of them."""
    names = [tests] if isinstance(tests, str | Path) else list(tests)
    chosen = [_policy(policy) for policy in policies]
    _check_names([policy.name for policy in chosen])
    loaded = load_tests(map(str, names))
    if names:
        for test in loaded:
            for policy in chosen:
                check_suits(policy, test.name, **kind_of_host(test))
    return [
        (test, [policy for policy in chosen if unasked_answer(policy, **kind_of_host(test)) is None])
        for test in loaded
    ]


def _after(seconds: float) -> Callable[[], bool]:
    """Return a function that tells whether so many seconds have passed; with 0 it never does."""
    until = time.monotonic() + seconds
    return lambda: bool(seconds) and time.monotonic() > until


def _seconds(duration: float | str | None) -> float | None:
    if duration is None:
        return None
    try:
        seconds = parse_duration(duration)
    except ValueError as error:
        raise BadInput("duration", f"found {duration!r}", str(error)) from None
    if seconds <= 0:
        raise BadInput("duration", f"found {duration!r}", "more than 0")
    return seconds


def _seed(seed: int | None) -> int:
    return secrets.randbits(32) if seed is None else seed


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the emulator's log lines off the program's standard error: the result has the same findings."""
    logger.disable("emulator")
    try:
        yield
    finally:
        logger.enable("emulator")
