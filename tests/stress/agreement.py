"""Verdicts by luck and verdicts by proof, side by side: where they contradict each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from emulator.explore.machine.options import NONE, ExploreOptions
from emulator.explore.results.suite import Work, explore_suite
from emulator.explore.results.verdict import Plan, Verdict
from emulator.litmus.loader import load_test, shipped_texts
from emulator.litmus.model import SAFE, Expected, LitmusTest
from emulator.litmus.policies import expected_of, policies_for
from emulator.litmus.suite import PIECE, Task, run_task
from emulator.litmus.verdict import Outcome
from emulator.processes import ProcessPool
from native import VIOLATION_KINDS

Pair = tuple[str, str]  # test, policy
# Executions on real threads that are worth the start of a machine.
_LEAST = 20
# By the names that tests and the command line have for them.
_CHOICES = {
    "evict": ExploreOptions(evict=1),
    "speculate": ExploreOptions(speculate=1),
    "store-buffers": ExploreOptions(store_buffers=True),
}

_OPTIONS = {
    "evict": " --adversary evict",
    "speculate": " --adversary speculate",
    "store-buffers": " --store-buffers",
}


@dataclass(frozen=True, slots=True)
class Scale:
    """stress: executions on real threads, all together.  seed: of these, and of the pairs that are chosen
    where there are too few executions for all.  explored: most executions of each search, and seconds."""

    stress: int
    seed: int
    explored: int
    seconds: float

    @classmethod
    def of(cls, stress: int, seed: int) -> Scale:
        """A small one asks little of the searches, too."""
        return cls(stress, seed, 200, 1.0) if stress < 100_000 else cls(stress, seed, 5000, 10.0)

    def pairs(self) -> list[Pair]:
        """Return all tests under presets, their own policies and mutants that only cost, or some."""
        tests = [load_test(name) for name in shipped_texts()]
        pairs = [(test.name, policy) for test in tests for policy in policies_for(test, (), False)]
        few = self.stress // _LEAST
        return pairs if few >= len(pairs) else sorted(Random(self.seed).sample(pairs, few))


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Return it with the command that repeats it."""

    outcome: Outcome
    verdict: Verdict
    scale: Scale
    sentence: str

    def __str__(self) -> str:
        test, policy, n = self.outcome.test, self.outcome.policy, self.outcome.executions
        choice = next((_OPTIONS[n] for n, c in _CHOICES.items() if c == self.verdict.plan.options), "")
        seed = self.scale.seed if self.outcome.first is None else self.outcome.first
        return (
            f"{test} under {policy}, seed {self.scale.seed}: {self.sentence}\n"
            f"    flushlab litmus {test} --policy {policy} --iterations {n} --seed {seed}\n"
            f"    flushlab explore {test} --policy {policy} --executions {self.scale.explored} "
            f"--seed {self.scale.seed}{choice}"
        )


def contradictions(outcome: Outcome, verdict: Verdict, expected: Sequence[Expected]) -> list[str]:
    """Return the contradictions about a test under a policy: violations of real threads, proofs, and
    the test says."""
    found = []
    stressed, explored = set(outcome.kinds), set(_most_specific(verdict))
    if outcome.failure:
        found.append(f"real threads fail: {outcome.failure}")
    if verdict.complete and not explored and stressed:
        found.append(f"explore proves it safe, and real threads met {_list(stressed)}")
    allowed = {kind for one in expected if not isinstance(one, str) for kind in one}
    for who, kinds in (("explore", explored), ("real threads", stressed)):
        if expected and kinds - allowed:
            found.append(f"{who} met {_list(kinds - allowed)}, the test says {_list(allowed) or SAFE}")
    return found


def _most_specific(verdict: Verdict) -> list[str]:
    """As violations on real threads are counted; a deadlock is none of the oracle's kinds."""
    return [kind for kind in VIOLATION_KINDS if kind in verdict.kinds][:1] or list(verdict.kinds)


def _list(kinds: set[str]) -> str:
    return ", ".join(sorted(kinds))


def searched(test: LitmusTest, policy: str) -> tuple[ExploreOptions, tuple[Expected, ...]]:
    """Return the liberties that the scheduler needs, if the test says that the policy is unsafe
    only with them; and the expected verdict."""
    for choice, policies in test.expect.apart().items():
        if policy in policies and policy not in test.expect.policies:
            return _CHOICES[choice], (policies[policy],)
    return NONE, expected_of(test, policy)


def compare(scale: Scale) -> Iterator[tuple[Outcome, Verdict, list[Contradiction]]]:
    """Every pair, on real threads and explored."""
    pairs = scale.pairs()
    jobs = len(os.sched_getaffinity(0))
    outcomes = _stressed(pairs, scale, jobs)
    tests = {name: load_test(name) for name, _ in pairs}
    asked = [(tests[name], policy, *searched(tests[name], policy)) for name, policy in pairs]
    plan = Plan(executions=scale.explored, seed=scale.seed, minimize=False)
    work = [
        Work(test, policy, replace(plan, options=options), scale.seconds)
        for test, policy, options, _ in asked
    ]
    for (test, policy, _, expected), verdict in zip(asked, explore_suite(work, jobs), strict=True):
        outcome = outcomes[test.name, policy]
        found = contradictions(outcome, verdict, expected)
        yield outcome, verdict, [Contradiction(outcome, verdict, scale, sentence) for sentence in found]


def _stressed(pairs: Sequence[Pair], scale: Scale, jobs: int) -> dict[Pair, Outcome]:
    outcomes: dict[Pair, Outcome] = {}
    with ProcessPool(jobs) as pool:
        for found in pool.map(run_task, _tasks(pairs, scale)):
            for outcome in found:
                known = outcomes.setdefault((outcome.test, outcome.policy), outcome)
                if known is not outcome:
                    known.add(outcome)
    return outcomes


def _tasks(pairs: Sequence[Pair], scale: Scale) -> list[Task]:
    """Each pair as often as the others; one machine for the policies of a test."""
    each = -(-scale.stress // len(pairs))
    policies: dict[str, list[str]] = {}
    for test, policy in pairs:
        policies.setdefault(test, []).append(policy)
    return [
        Task(test, tuple(names), min(PIECE, each - done), scale.seed + done)
        for done in range(0, each, PIECE)
        for test, names in policies.items()
    ]
