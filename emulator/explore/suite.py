"""Many tests under many policies, each pair in a process of its own pool, in the order asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from emulator.explore.verdict import Plan, Verdict, explore_verdict
from emulator.litmus.model import LitmusTest
from emulator.litmus.policies import named_policy
from emulator.processes import ProcessPool, ending


@dataclass(frozen=True, slots=True)
class Work:
    test: LitmusTest
    policy: str
    plan: Plan
    seconds: float  # 0: no limit


def explore_one(work: Work, jobs: int = 1) -> Verdict:
    """One test under one policy."""
    started = time.monotonic()

    def out_of_time() -> bool:
        return (bool(work.seconds) and time.monotonic() - started > work.seconds) or ending()

    verdict = explore_verdict(work.test, named_policy(work.policy), work.plan, out_of_time, jobs)
    verdict.policy = work.policy
    return verdict


def explore_suite(work: Sequence[Work], jobs: int) -> Iterator[Verdict]:
    """Verdicts in the order of the work.  A single pair is divided among the processes."""
    if jobs <= 1 or len(work) <= 1:
        yield from (explore_one(one, jobs) for one in work)
        return
    with ProcessPool(min(jobs, len(work))) as pool:
        yield from pool.map(explore_one, work)
