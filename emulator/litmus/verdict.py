"""The outcome of one litmus test under one policy, compared with the expected one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emulator.litmus.evidence import add
from emulator.litmus.model import INCONCLUSIVE, SAFE, Expected, LitmusTest
from emulator.report.result import Report

VIOLATIONS = "violations"
# Incomplete proofs: of all interleavings up to a bound on preemptions, or of some only.
BOUNDED = "safe up to a bound"
SEARCHED = "nothing found"
FAILED = "failed"


@dataclass(slots=True)
class Outcome:
    """The outcome of many executions of one test under one policy.

    kinds: violations by kind, each counted under its most specific one; violating: executions with any;
    evidence: how often each danger that `expect.needs` may name occurred; first: the seed of the first
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
    # With --explore: the extent of the proof, SAFE, BOUNDED or SEARCHED, or INCONCLUSIVE if no execution met
    # the precondition; "" on real threads.
    proof: str = ""
    # With --explore: the bound on preemptions up to which all interleavings are covered, if there is one.
    bound: int | None = None
    # With --explore: the uses of a user's policy that a proof cannot watch, a sentence each.
    unwatched: tuple[str, ...] = ()
    # With --explore: state of patched code that threads share without an ordering point, a sentence each.
    unordered: tuple[str, ...] = ()
    # With --explore: a signal ended the search before its limits did.
    cut: bool = False
    # On real threads: the test's delays (by number) with points that their threads have reached.
    delays_passed: set[int] = field(default_factory=set)
    # The reports of the first execution with a violation, one of each kind, which `flushlab explain` draws.
    reports: tuple[Report, ...] = ()

    def add(self, other: Outcome) -> None:
        """Add further executions of the test under the policy."""
        self.executions += other.executions
        self.violating += other.violating
        add(self.kinds, other.kinds)
        add(self.evidence, other.evidence)
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
        """Return the document for --json, which holds no times, apart from those of a violation's events."""
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
            **({"unordered": list(self.unordered)} if self.unordered else {}),
            "reports": [
                {"kind": r.kind, "kinds": list(r.kinds), "text": r.text, **r.details} for r in self.reports
            ],
        }


def proven(test: LitmusTest, evidence: Mapping[str, int]) -> bool:
    """Return whether one of the dangers that the test needs occurred."""
    return any(need == "nothing" or evidence.get(need, 0) for need in test.expect.needs)


def proofs(verdicts: Iterable[tuple[str, str, str]]) -> str:
    """Return a line about searches, each a verdict, a test and a policy: how many proved their test, how many
    did not come to their end, and which tested nothing.  A policy that is the only one is not named."""
    counts, vacuous, policies = Counter[str](), dict[str, list[str]](), set[str]()
    for verdict, test, policy in verdicts:
        counts[verdict] += 1
        policies.add(policy)
        if verdict == INCONCLUSIVE:
            vacuous.setdefault(test, []).append(policy)
    parts = [f"{counts[SAFE]:,} proved with their precondition met"]
    if counts[BOUNDED] + counts[SEARCHED]:
        parts.append(f"{counts[BOUNDED] + counts[SEARCHED]:,} not searched to the end")
    text = f"{', '.join(parts)}, {counts[INCONCLUSIVE]:,} inconclusive"
    names = [test + (under(found) if len(policies) > 1 else "") for test, found in vacuous.items()]
    return f"{text}: {', '.join(names)}" if names else text


def under(policies: Sequence[str]) -> str:
    """Return the words behind a test's name for one policy, or for several."""
    return f" under {policies[0] if len(policies) == 1 else f'{len(policies)} policies'}"


def differs(outcome: Outcome, test: LitmusTest, expected: tuple[Expected, ...]) -> str | None:
    """Return how the outcome differs from all expected ones; None: it does not, or none was expected."""
    verdict = outcome.verdict(test)
    if verdict == FAILED:
        return outcome.failure
    if not expected:
        return None
    said = [_differs(outcome, verdict, one) for one in expected]
    return None if None in said else said[0]


def _differs(outcome: Outcome, verdict: str, expected: Expected) -> str | None:
    if isinstance(expected, str):
        # A search that was cut short without a violation counts as safe.
        found = SAFE if verdict in (BOUNDED, SEARCHED) else verdict
        return None if found == expected else f"{verdict} instead of {expected}"
    if verdict != VIOLATIONS:
        return f"{verdict} instead of {', '.join(expected)}"
    others = sorted(set(outcome.kinds) - set(expected))
    return f"also {', '.join(others)}" if others else None
