"""Verdicts by luck and verdicts by proof, side by side: where they contradict each other."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from random import Random

from emulator.explore.choices import NONE, Choices
from emulator.explore.suite import Work, explore_suite
from emulator.explore.verdict import Plan, Verdict
from emulator.litmus.loader import load_test, shipped_texts
from emulator.litmus.model import SAFE, Expected
from emulator.litmus.policies import expected_of, policies_for
from emulator.litmus.suite import PIECE, Task, run_task
from emulator.litmus.verdict import Outcome
from emulator.policy import MUTANTS
from native import VIOLATION_KINDS

Pair = tuple[str, str]  # test, policy
# Executions on real threads that are worth the start of a machine.
_LEAST = 20


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
        """All tests, each under every preset, what it names and what must only cost, or some of these."""
        tests = [load_test(name) for name in shipped_texts()]
        pairs = [(test.name, policy) for test in tests for policy in policies_for(test, (), False)]
        few = self.stress // _LEAST
        return pairs if few >= len(pairs) else sorted(Random(self.seed).sample(pairs, few))


@dataclass(frozen=True, slots=True)
class Contradiction:
    """With what makes it come back."""

    outcome: Outcome
    verdict: Verdict
    scale: Scale
    sentence: str

    def __str__(self) -> str:
        test, policy, n = self.outcome.test, self.outcome.policy, self.outcome.executions
        buffers = " --store-buffers" if self.verdict.plan.choices.store_buffers else ""
        seed = self.scale.seed if self.outcome.first is None else self.outcome.first
        return (
            f"{test} under {policy}, seed {self.scale.seed}: {self.sentence}\n"
            f"    flushlab litmus {test} --policy {policy} --iterations {n} --seed {seed}\n"
            f"    flushlab explore {test} --policy {policy} --executions {self.scale.explored} "
            f"--seed {self.scale.seed}{buffers}"
        )


def contradictions(outcome: Outcome, verdict: Verdict, expected: Sequence[Expected]) -> list[str]:
    """What cannot be true at once of a test under a policy: what real threads met, what was proved, and what
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


def choices_of(policy: str) -> Choices:
    """Without a barrier, a search needs store buffers to find anything."""
    mutant = MUTANTS.get(policy.removeprefix("mutant:"))
    return Choices(store_buffers=True) if mutant is not None and mutant.store_buffers else NONE


def compare(scale: Scale) -> Iterator[tuple[Outcome, Verdict, list[Contradiction]]]:
    """Every pair, on real threads and explored."""
    pairs = scale.pairs()
    jobs = len(os.sched_getaffinity(0))
    outcomes = _stressed(pairs, scale, jobs)
    work = [
        Work(
            load_test(test),
            policy,
            Plan(executions=scale.explored, seed=scale.seed, minimize=False, choices=choices_of(policy)),
            scale.seconds,
        )
        for test, policy in pairs
    ]
    for item, verdict in zip(work, explore_suite(work, jobs), strict=True):
        outcome = outcomes[item.test.name, item.policy]
        found = contradictions(outcome, verdict, expected_of(item.test, item.policy))
        yield outcome, verdict, [Contradiction(outcome, verdict, scale, sentence) for sentence in found]


def _stressed(pairs: Sequence[Pair], scale: Scale, jobs: int) -> dict[Pair, Outcome]:
    outcomes: dict[Pair, Outcome] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
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
