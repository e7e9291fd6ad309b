"""Litmus tests that `flushlab explore` proves in seconds: each test under Linux 7.3, all interleavings.

Two searches a test in this process, without states and with them, each until it is complete or has taken
SECONDS of CPU time, which a busy machine disturbs less than wall time.  The search with states supposes that
the precondition was met: `explore` samples executions before.  The tables have the executions of each test,
those given up half way, the states, and the steps of the longest execution.
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
from emulator.explore.machine.states import MachineStates, hear
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.search import Found, Limits, search
from emulator.explore.strategies.stateful import Stateful
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
    states: int = 0


def proofs(context: Context) -> Iterator[Figure]:
    quick = context.sizes.executions < 1000
    names = SMALL if quick else [test.name for test, _ in pairs_of(load_tests([]), [DEFAULT], named=False)]
    for stateful in (False, True):
        how = "each state once" if stateful else "all interleavings"
        searched = []
        for name in names:
            context.say(f"prove {name}, {how}")
            searched.append(_searched(name, SECONDS / 10 if quick else SECONDS, stateful))
        context.show(table(searched))
        yield figure(searched, how)


def _searched(name: str, seconds: float, stateful: bool) -> Searched:
    program = LitmusProgram(load_test(name), Policy())
    if stateful:
        hear(program)
    try:
        with instrument(program.control):
            started = time.process_time()
            strategy = Exhaustive(program.objects)
            if stateful:
                strategy = Stateful(program.objects, MachineStates(program), has_met=True)
            found = search(
                program,
                program.objects,
                strategy,
                Limits(),
                bool,
                lambda: time.process_time() - started > seconds,
            )
            states = strategy.size if isinstance(strategy, Stateful) else 0
            return Searched(name, found, time.process_time() - started, states)
    finally:
        program.close()


def table(searched: Sequence[Searched]) -> str:
    lines = [f"{'test':<32}{'':10}{'executions':>12}{'given up':>10}{'states':>9}{'steps':>7}{'CPU s':>8}"]
    for test, found, seconds, states in searched:
        ending = "proved" if found.complete else "open"
        counts = f"{found.executions:>12,}{found.pruned:>10,}{states:>9,}{found.depth:>7,}"
        lines.append(f"{test:<32}{ending:10}{counts}{seconds:>8.2f}")
    return "\n".join(lines)


def figure(searched: Sequence[Searched], how: str) -> Figure:
    violated = [one.test for one in searched if one.found.schedule is not None]
    if violated:
        raise BenchFailed(f"{DEFAULT} violates {', '.join(violated)}")
    proved = sum(one.found.complete for one in searched)
    if not proved:
        raise BenchFailed("no test is proved")
    return Figure(
        name=f"tests proved within {SECONDS:g} s of CPU time each, {how}",
        what=f"under {DEFAULT}, in one process",
        unit="tests",
        values=(float(proved),),
        reference_name="tests",
        references=(float(len(searched)),),
        ratio_of="value/reference",
    )
