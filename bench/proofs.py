"""Litmus tests that `flushlab explore` proves in seconds: each test under Linux 7.3, all interleavings.

One search a test, in this process, until it is complete or has taken SECONDS of CPU time, which a busy
machine disturbs less than wall time.  The table has the executions of each, those given up half way, and the
steps of the longest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from bench.benchmark import Context
from bench.errors import BenchFailed
from bench.figures import Figure
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.search import Found, Limits, search
from emulator.litmus.loader import load_test, load_tests
from emulator.litmus.policies import pairs_of
from emulator.policy import DEFAULT, Policy

SECONDS: Final = 5.0
# Searched with `--quick`: one is complete at once, one is not for a long time.
SMALL: Final = ("root-load-preempted", "slot-delete")


class Searched(NamedTuple):
    test: str
    found: Found
    seconds: float


def proofs(context: Context) -> Iterator[Figure]:
    quick = context.sizes.executions < 1000
    names = SMALL if quick else [test.name for test, _ in pairs_of(load_tests([]), [DEFAULT], named=False)]
    searched = []
    for name in names:
        context.say(f"prove {name}")
        searched.append(_searched(name, SECONDS / 10 if quick else SECONDS))
    context.show(table(searched))
    yield figure(searched)


def _searched(name: str, seconds: float) -> Searched:
    program = LitmusProgram(load_test(name), Policy())
    try:
        with instrument(program.control):
            started = time.process_time()
            strategy = Exhaustive(program.objects)
            found = search(
                program,
                program.objects,
                strategy,
                Limits(),
                bool,
                lambda: time.process_time() - started > seconds,
            )
            return Searched(name, found, time.process_time() - started)
    finally:
        program.close()


def table(searched: Sequence[Searched]) -> str:
    lines = [f"{'test':<32}{'':10}{'executions':>12}{'given up':>10}{'steps':>7}{'CPU s':>8}"]
    for test, found, seconds in searched:
        ending = "proved" if found.complete else "open"
        counts = f"{found.executions:>12,}{found.pruned:>10,}{found.depth:>7,}"
        lines.append(f"{test:<32}{ending:10}{counts}{seconds:>8.2f}")
    return "\n".join(lines)


def figure(searched: Sequence[Searched]) -> Figure:
    violated = [one.test for one in searched if one.found.schedule is not None]
    if violated:
        raise BenchFailed(f"{DEFAULT} violates {', '.join(violated)}")
    proved = sum(one.found.complete for one in searched)
    if not proved:
        raise BenchFailed("no test is proved")
    return Figure(
        name=f"tests proved within {SECONDS:g} s of CPU time each",
        what=f"under {DEFAULT}, all interleavings, in one process",
        unit="tests",
        values=(float(proved),),
        reference_name="tests",
        references=(float(len(searched)),),
        ratio_of="value/reference",
    )
