"""The kill rate as a figure: how many mutants of KVM's code the litmus tests catch.

`python -m bench.mutation` judges samples and single mutants, and keeps results.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from bench.benchmark import Context
from bench.errors import BenchFailed
from bench.figures import Figure
from bench.mutation.generate import mutants, sample
from bench.mutation.judge import CLASSES, QUICK, THOROUGH
from bench.mutation.report import kill_rate, table
from bench.mutation.results import Results
from bench.mutation.run import judge_all, learn, prepare
from bench.mutation.suite import FIRST, pairs, quick_pairs

SEED = 1


def mutation(context: Context) -> Iterator[Figure]:
    """Judge all mutants, which takes a night, or a sample; print the table, and yield the kill rate."""
    found = mutants()
    quick = context.sizes.mutants is not None
    chosen = found if context.sizes.mutants is None else sample(found, context.sizes.mutants, SEED)
    prepare()
    results, jobs = Results(None, ""), len(os.sched_getaffinity(0))
    wanted = quick_pairs() if quick else list(pairs())
    known = learn(results, wanted, jobs, context.say, executions=FIRST if quick else 0)
    depth = QUICK if quick else THOROUGH
    judged = judge_all(results, chosen, known, jobs, context.say, depth=depth)
    context.show(table(judged, len(chosen), len(found)))
    caught, of = kill_rate(judged)
    if not caught:
        raise BenchFailed(f"no mutant of {len(chosen)} was caught")
    counts = Counter(judgement.verdict for _, judgement in judged)
    yield Figure(
        name="mutants caught",
        what=f"{len(chosen)} of {len(found)} made by rule: "
        + ", ".join(f"{counts[verdict]} {verdict}" for verdict in CLASSES if counts[verdict]),
        unit="mutants",
        values=(float(caught),),
        reference_name="neither broken, equivalent nor cost-only",
        references=(float(of),),
        ratio_of="value/reference",
        wanted="ratio >= 0.95",
    )
