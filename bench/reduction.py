"""Executions that partial-order reduction saves `flushlab explore`: a search with it beside one without.

Both searches cover equal interleavings of one program: all with so many preemptions at most, or all.  If one
does not end within its budget, its count is a lower bound, and the figure says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.benchmark import Context
from bench.errors import BenchFailed
from bench.figures import Figure
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.search import Found, Limits, search
from emulator.litmus.loader import load_test
from emulator.policy import Policy

TESTS = ("entry-races-request", "root-load-preempted", "huge-collapse", "log-arm")
BOUNDS = (0, 1, 2, None)


@dataclass(frozen=True, slots=True)
class Pair:
    """The searches of one program with one bound."""

    reduced: Found
    plain: Found

    @property
    def agree(self) -> bool:
        """Return whether both searches found equal outcomes.  If the plain one is incomplete, it may have
        found fewer."""
        seen, all_there = set(self.plain.outcomes), set(self.reduced.outcomes)
        return seen == all_there if self.plain.complete else seen <= all_there


def reduction(context: Context) -> Iterator[Figure]:
    for name in TESTS:
        program = LitmusProgram(load_test(name), Policy())
        try:
            with instrument(program.control):
                for bound in BOUNDS:
                    context.say(f"{name}, {_within(bound)}")
                    yield _figure(name, bound, _both(program, bound, context.sizes.executions))
        finally:
            program.close()


def _both(program: LitmusProgram, bound: int | None, most: int) -> Pair:
    limits = Limits(executions=most)
    found = []
    for reduce in (True, False):
        strategy = Exhaustive(program.objects, bound=bound, reduce=reduce)
        found.append(search(program, program.objects, strategy, limits, bool))
    return Pair(*found)


def _within(bound: int | None) -> str:
    return "all interleavings" if bound is None else f"up to {bound} preemptions"


def _figure(name: str, bound: int | None, pair: Pair) -> Figure:
    if not pair.agree:
        raise BenchFailed(f"{name}, {_within(bound)}: outcomes differ with and without reduction")
    counts = [found.executions + found.pruned for found in (pair.reduced, pair.plain)]
    less = ["" if found.complete else ", at least" for found in (pair.reduced, pair.plain)]
    return Figure(
        name=f"{name}, {_within(bound)}{less[0]}",
        what=f"{pair.reduced.pruned} of them given up half way; up to {pair.reduced.depth} steps each",
        unit="executions",
        values=(float(counts[0]),),
        reference_name=f"without reduction{less[1]}",
        references=(float(counts[1]),),
        ratio_of="reference/value",
    )
