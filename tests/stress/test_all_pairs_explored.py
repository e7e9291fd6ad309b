"""Every shipped test under every preset, explored: each verdict as the test says, and no proof of nothing."""

from __future__ import annotations

import os
import time
from random import Random

import pytest

from emulator.explore.results.suite import explore_all
from emulator.litmus.loader import shipped_tests
from emulator.litmus.model import LitmusTest
from emulator.litmus.policies import pairs_of
from emulator.litmus.table import Results
from emulator.litmus.verdict import proofs
from emulator.policy import PRESETS

# Pairs, and executions of each, unless the environment asks for all; executions that find rare violations.
FEW, EXECUTIONS, MORE = 40, 200, 2000
DAY = 86400


@pytest.mark.stress
@pytest.mark.timeout(0 if "FLUSHLAB_ALL_PAIRS" in os.environ else 300)
def test_verdicts_are_as_the_tests_say() -> None:
    """Some pairs, others each day, or all of them with as many seconds each as the environment says:

    FLUSHLAB_ALL_PAIRS=10 python -m pytest -s -m stress -o faulthandler_timeout=0 \\
        tests/stress/test_all_pairs_explored.py
    """
    asked = os.environ.get("FLUSHLAB_ALL_PAIRS")
    seed = int(os.environ.get("FLUSHLAB_SEED", time.time() // DAY))
    tests = shipped_tests()
    pairs = pairs_of(tests, list(PRESETS), named=False)
    if asked is None:
        pairs = Random(seed).sample(pairs, FEW)
    executions, seconds = (EXECUTIONS, 0.0) if asked is None else (10**9, float(asked))
    results = explored(pairs, executions, seconds)
    print(f"{len(pairs)} pairs, seed {seed}: {proofs(results.verdicts())}")
    assert len(results.outcomes) == len(pairs)
    wrong = [(test, outcome.policy) for test, outcome, _ in results.differing()]
    again = explored(wrong, MORE, 0.0) if wrong else results
    assert not (found := [(test.name, o.policy, text) for test, o, text in again.differing()]), found


def explored(pairs: list[tuple[LitmusTest, str]], executions: int, seconds: float) -> Results:
    tests = list({test.name: test for test, _ in pairs}.values())
    plan = [(test, tuple(policy for other, policy in pairs if other is test)) for test in tests]
    results = Results(tests, 0, (executions, seconds))
    jobs = len(os.sched_getaffinity(0))
    for outcome in explore_all(plan, executions, 0, jobs, lambda n: None, seconds):
        results.add(outcome)
    return results
