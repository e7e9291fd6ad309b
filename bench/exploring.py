"""Executions per second of `flushlab explore`, and the gain of more processes.

Tests of three actors each (a vCPU, the host, interrupts), all interleavings, again and again in one process;
the reference builds the machine anew each time.  Then one large search by as many processes as there are
cores, beside a run of this search by one process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from statistics import median

from bench.benchmark import Context
from bench.figures import Figure
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results.workers import Team
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.search import Limits, search
from emulator.explore.strategies.tree import wide_search
from emulator.litmus.loader import load_test
from emulator.policy import Policy

TESTS = ("root-recycled-elsewhere", "entry-races-request", "root-load-preempted", "log-arm", "shadow-oldest")
LARGE = "remote-two-vcpus"


def exploring(context: Context) -> Iterator[Figure]:
    """Yield executions per second of this process' CPU time, which a busy machine disturbs less than wall
    time.

    Executions that are given up half way take time and do not count.
    """
    most = context.sizes.executions // 10
    for name in TESTS:
        context.say(f"explore {name}")
        kept, steps = _rates(context, name, most, rebuild=False)
        anew, _ = _rates(context, name, max(1, most // 10), rebuild=True)
        yield Figure(
            name=f"explore {name}",
            what=f"executions of {median(steps):.0f} steps each, in one process",
            unit="/s",
            values=tuple(kept),
            reference_name="with a new machine for each execution",
            references=tuple(anew),
            ratio_of="value/reference",
            wanted="value >= 2000" if name == TESTS[0] else "",
        )


def _rates(context: Context, name: str, most: int, *, rebuild: bool) -> tuple[list[float], list[float]]:
    program = LitmusProgram(load_test(name), Policy(), rebuild=rebuild)
    """Finished executions per second, and steps of one, by repeat."""
    rates, steps = [], []
    try:
        with instrument(program.control):
            for _ in range(context.sizes.repeats):
                executions = runs = taken = 0
                started = time.process_time()
                while executions < most:
                    strategy, limits = Exhaustive(program.objects), Limits(executions=most - executions)
                    found = search(program, program.objects, strategy, limits, bool)
                    executions += found.executions
                    runs += found.executions + found.pruned
                    taken += found.steps
                rates.append(executions / (time.process_time() - started))
                steps.append(taken / runs)
    finally:
        program.close()
    return rates, steps


def exploring_jobs(context: Context) -> Iterator[Figure]:
    """Yield executions per second of wall time.  The machine should have nothing else to do."""
    jobs = len(os.sched_getaffinity(0))
    rates: dict[int, list[float]] = {1: [], jobs: []}
    for _ in range(max(1, context.sizes.repeats // 4)):
        for n, found in rates.items():
            context.say(f"explore {LARGE} with {n} processes")
            found.append(_wide(n, context.sizes.executions))
    yield Figure(
        name=f"explore {LARGE}, {jobs} processes",
        what=f"one search of {context.sizes.executions:,} executions",
        unit="/s",
        values=tuple(rates[jobs]),
        reference_name="one process",
        references=tuple(rates[1]),
        ratio_of="value/reference",
    )


def _wide(jobs: int, most: int) -> float:
    program = LitmusProgram(load_test(LARGE), Policy())
    try:
        with instrument(program.control), Team(program, jobs, lambda: False) as team:
            started = time.perf_counter()
            found = wide_search(program, program.objects, None, Limits(executions=most), bool, team)
            return (found.executions + found.pruned) / (time.perf_counter() - started)
    finally:
        program.close()
