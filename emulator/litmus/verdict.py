"""What came of running one litmus test under one policy, and whether that was expected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from emulator.litmus.model import INCONCLUSIVE, SAFE, Expected, LitmusTest
from emulator.report.result import Report

VIOLATIONS = "violations"
# A proof that did not come to its end: all interleavings with so few preemptions, or only some.
BOUNDED = "safe up to a bound"
SEARCHED = "nothing found"
FAILED = "failed"


@dataclass(slots=True)
class Outcome:
    """Many executions.

    kinds: violations by kind, each counted under its most specific one; violating: executions with any;
    evidence: how often the dangers that `expect.needs` may name were there; first: the seed of the first
    execution with a violation.
    """

    test: str
    policy: str
    executions: int = 0
    violating: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    evidence: dict[str, int] = field(default_factory=dict)
    first: int | None = None
    failure: str = ""
    # With --explore: how far the proof came, SAFE, BOUNDED or SEARCHED, or INCONCLUSIVE if no execution met
    # the precondition; "" on real threads.
    proof: str = ""
    # ... and the most preemptions that it covers, if it covers all with so many and no more.
    bound: int | None = None
    # ... and what a user's policy depends on that a proof cannot see.
    unwatched: tuple[str, ...] = ()
    # On real threads: the test's delays (by number) at whose points their threads lingered or could have.
    delays_passed: set[int] = field(default_factory=set)
    # Of the first execution with a violation, one of each kind: what `flushlab explain` draws.
    reports: tuple[Report, ...] = ()

    def add(self, other: Outcome) -> None:
        """More executions of the same."""
        self.executions += other.executions
        self.violating += other.violating
        for mine, theirs in ((self.kinds, other.kinds), (self.evidence, other.evidence)):
            for name, n in theirs.items():
                mine[name] = mine.get(name, 0) + n
        self.delays_passed |= other.delays_passed
        if self.first is None:
            self.first, self.reports = other.first, other.reports
        self.failure = self.failure or other.failure

    def verdict(self, test: LitmusTest) -> str:
        if self.failure:
            return FAILED
        if self.kinds:
            return VIOLATIONS
        if self.proof:
            return self.proof
        return SAFE if self.executions and proven(test, self.evidence) else INCONCLUSIVE

    def document(self, test: LitmusTest, expected: tuple[Expected, ...]) -> dict[str, Any]:
        """For --json; holds no times, but for those of a violation's events."""
        return {
            "test": self.test,
            "policy": self.policy,
            "verdict": self.verdict(test),
            "expected": [one if isinstance(one, str) else list(one) for one in expected],
            "differs": differs(self, test, expected),
            "preemption_bound": self.bound,
            "executions": self.executions,
            "violating": self.violating,
            "violations": dict(sorted(self.kinds.items())),
            "evidence": {name: n for name, n in sorted(self.evidence.items()) if n},
            "first_seed": self.first,
            "failure": self.failure or None,
            **({"unwatched": list(self.unwatched)} if self.unwatched else {}),
            "reports": [
                {"kind": r.kind, "kinds": list(r.kinds), "text": r.text, **r.details} for r in self.reports
            ],
        }


def proven(test: LitmusTest, evidence: Mapping[str, int]) -> bool:
    """One of the dangers that the test needs was there."""
    return any(need == "nothing" or evidence.get(need, 0) for need in test.expect.needs)


def proofs(verdicts: Iterable[tuple[str, str, str]]) -> str:
    """Return one line about searches, each a verdict, a test and a policy: how many are proofs, and which
    ones tested nothing."""
    proved, vacuous = 0, dict[str, list[str]]()
    for verdict, test, policy in verdicts:
        proved += verdict == SAFE
        if verdict == INCONCLUSIVE:
            vacuous.setdefault(test, []).append(policy)
    names = [
        f"{test} under {policies[0] if len(policies) == 1 else f'{len(policies)} policies'}"
        for test, policies in vacuous.items()
    ]
    n = sum(map(len, vacuous.values()))
    text = f"{proved:,} proved with their precondition met, {n:,} inconclusive"
    return f"{text}: {', '.join(names)}" if names else text


def differs(outcome: Outcome, test: LitmusTest, expected: tuple[Expected, ...]) -> str | None:
    """How the outcome is none of those expected, in a few words; None: it is, or nothing was expected."""
    verdict = outcome.verdict(test)
    if verdict == FAILED:
        return outcome.failure
    if not expected:
        return None
    said = [_differs(outcome, verdict, one) for one in expected]
    return None if None in said else said[0]


def _differs(outcome: Outcome, verdict: str, expected: Expected) -> str | None:
    if isinstance(expected, str):
        # A search that was cut short is as safe as it could be.
        found = SAFE if verdict in (BOUNDED, SEARCHED) else verdict
        return None if found == expected else f"{verdict} instead of {expected}"
    if verdict != VIOLATIONS:
        return f"{verdict} instead of {', '.join(expected)}"
    others = sorted(set(outcome.kinds) - set(expected))
    return f"also {', '.join(others)}" if others else None
