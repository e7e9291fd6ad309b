"""Violations on real threads and proofs over all interleavings never contradict each other."""

from __future__ import annotations

import os
import time

import pytest

from emulator.explore.machine.options import NONE
from emulator.explore.results.verdict import Plan, Verdict
from emulator.litmus.loader import load_test
from emulator.litmus.model import SAFE, Expected
from emulator.litmus.policies import expected_of
from emulator.litmus.verdict import BOUNDED, VIOLATIONS, Outcome
from tests.stress.agreement import Scale, compare, contradictions, searched

# Executions on real threads; some tens of seconds with the searches.
FEW = 1600
DAY = 86400


@pytest.mark.stress
@pytest.mark.timeout(0 if "FLUSHLAB_AGREE" in os.environ else 300)
def test_over_the_whole_suite() -> None:
    """Some tests under some policies, others each day, or all of them, with as many executions on real
    threads as the environment says.  A million, with searches to match, takes an hour or two on two cores:

        FLUSHLAB_AGREE=1000000 python -m pytest -s -m stress -o faulthandler_timeout=0 \\
            tests/stress/test_explore_and_stress_agree.py

    FLUSHLAB_SEED: which executions, and which pairs where it is not all of them.
    """
    stress = int(os.environ.get("FLUSHLAB_AGREE", FEW))
    seed = int(os.environ.get("FLUSHLAB_SEED", time.time() // DAY))
    scale = Scale.of(stress, seed)
    pairs = executions = explored = complete = 0
    found = []
    for outcome, verdict, contradicting in compare(scale):
        pairs += 1
        executions += outcome.executions
        explored += verdict.executions
        complete += verdict.complete
        found += contradicting
        for contradiction in contradicting:
            print(contradiction, flush=True)
    print(
        f"{pairs:,} pairs of test and policy: {executions:,} executions on real threads, {explored:,} "
        f"explored, {complete:,} pairs in all interleavings, {len(found)} contradictions, seed {seed}"
    )
    assert executions >= 0.9 * stress
    assert not found, "\n".join(map(str, found))


def outcome(*kinds: str, failure: str = "") -> Outcome:
    return Outcome(
        "t", "p", executions=10, violating=len(kinds), kinds=dict.fromkeys(kinds, 1), failure=failure
    )


def verdict(said: str, *kinds: str) -> Verdict:
    return Verdict("t", "p", Plan(), needs=("averted",), verdict=said, kinds=kinds, complete=said == SAFE)


FREED, STALE = "use-after-free", "stale-after-revoke"


@pytest.mark.parametrize(
    ("stressed", "explored", "expected"),
    [
        (outcome(), verdict(SAFE), ("safe",)),
        (outcome(), verdict(VIOLATIONS, FREED), ((FREED,),)),
        (outcome(FREED), verdict(VIOLATIONS, STALE), ((FREED, STALE),)),
        (outcome(FREED), verdict(BOUNDED), ((FREED,),)),
        (outcome(FREED), verdict(VIOLATIONS, STALE), ()),
        (outcome(), verdict(BOUNDED), ("safe",)),
    ],
)
def test_what_can_be_true_at_once(
    stressed: Outcome, explored: Verdict, expected: tuple[Expected, ...]
) -> None:
    assert contradictions(stressed, explored, expected) == []


@pytest.mark.parametrize(
    ("stressed", "explored", "expected", "said"),
    [
        (outcome(FREED), verdict(SAFE), ((FREED,),), "explore proves it safe, and real threads met"),
        (outcome(FREED), verdict(SAFE), (), "explore proves it safe, and real threads met"),
        (outcome(), verdict(VIOLATIONS, FREED), ("safe",), "explore met use-after-free, the test says safe"),
        (outcome(), verdict(VIOLATIONS, FREED), ((STALE,),), "explore met use-after-free"),
        (outcome(), verdict(VIOLATIONS, "deadlock: v0"), ((STALE,),), "explore met deadlock"),
        (outcome(FREED), verdict(VIOLATIONS, STALE), ((STALE,),), "real threads met use-after-free"),
        (outcome(FREED), verdict(BOUNDED), ("safe",), "real threads met use-after-free"),
        (outcome(failure="v0: KVM_BUG_ON"), verdict(BOUNDED), (), "real threads fail: v0: KVM_BUG_ON"),
    ],
)
def test_what_cannot(stressed: Outcome, explored: Verdict, expected: tuple[Expected, ...], said: str) -> None:
    (sentence,) = contradictions(stressed, explored, expected)[:1]
    assert sentence.startswith(said)


def test_what_only_a_search_with_more_choices_finds_is_searched_with_them() -> None:
    test = load_test("entry-races-request")
    options, expected = searched(test, "mutant:generation-without-barrier")
    assert options.store_buffers
    assert expected == (test.expect.store_buffers["mutant:generation-without-barrier"],)
    assert searched(test, "mutant:requests-before-mode") == (
        NONE,
        expected_of(test, "mutant:requests-before-mode"),
    )


@pytest.mark.slow
def test_a_scale_that_is_large_enough_has_all_pairs() -> None:
    some, all_of_them = Scale.of(400, 3).pairs(), Scale.of(10**6, 3).pairs()
    assert len(some) == 20
    assert set(some) < set(all_of_them)
    assert len(all_of_them) > 1000
