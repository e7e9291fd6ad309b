"""The suite catches a fixed sample of the mutants that concern flushes, kicks, requests and references."""

from __future__ import annotations

import os

import pytest

from bench.mutation import run
from bench.mutation.generate import mutants, sample
from bench.mutation.judge import CAUGHT, COST_ONLY, EQUIVALENT, QUICK, is_reached
from bench.mutation.results import Results
from bench.mutation.suite import FIRST, quick_pairs

RULES = ("drop-flush", "drop-kick", "drop-request", "drop-sequence", "drop-reference", "late-flush", "split-")
SIZE, SEED = 12, 1
# Caught by tests that need more executions than are spent here.
LATER = {"drop-flush@map_replace_flush#1": "huge-replaces-table: after 58 interleavings"}


@pytest.mark.stress
@pytest.mark.timeout(300)
def test_no_unlisted_mutant_survives() -> None:
    run.prepare()
    results, jobs = Results(None, ""), len(os.sched_getaffinity(0))
    known = run.learn(results, quick_pairs(), jobs, print, executions=FIRST)
    found = [one for one in mutants() if one.rule.startswith(RULES) and is_reached(one, known)]
    chosen = sample(found, SIZE, SEED)
    judged = run.judge_all(results, chosen, known, jobs, print, depth=QUICK)
    assert len(judged) == SIZE
    listed = run.survivors().keys() | LATER.keys()
    unlisted = {
        mutant.name: judgement.verdict
        for mutant, judgement in judged
        if judgement.verdict not in (CAUGHT, EQUIVALENT, COST_ONLY) and mutant.name not in listed
    }
    assert unlisted == {}
    assert sum(judgement.verdict == CAUGHT for _, judgement in judged) >= SIZE // 2
