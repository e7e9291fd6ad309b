"""The suite that mutants are judged by: pairs of a shipped litmus test and a preset, and of a test and
further choices where it asks for them; and each pair's verdict and coverage with KVM's code as it is."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import emulator
import native
from bench.mutation import patched
from bench.mutation.counts import counts_of
from emulator.explore.machine.options import NONE, ExploreOptions
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.litmus.harness import Harness
from emulator.litmus.loader import load_test, shipped_tests, shipped_texts
from emulator.litmus.model import INCONCLUSIVE, SAFE, LitmusTest
from emulator.litmus.policies import expected_of, named_policy, suits
from emulator.policy import DEFAULT

# Other policies: their answers lead through code of KVM that the default's do not.
OTHERS: Final = (
    "linux-5.18",
    "linux-5.14",
    "lkml-2021-batch-list",
    "role_change=keep-roots",
    "slot_delete=zap-slot-leafs",
    "zap_scope=leafs-and-tables",
)
# Executions: a glance at each test, a first and a second look, and a look under another preset.
GLANCE: Final = 8
FIRST: Final = 40
SECOND: Final = 200
OTHER: Final = 20
# Executions under another preset with KVM's code as it is.
_COVERAGE: Final = OTHER
# A look ends after so many runs, complete or pruned, for each execution that it may have and for FIRST more.
RUNS: Final = 25
# The most seconds of CPU time for one pair.  A look that is cut short by them leaves its mutant undecided.
PATIENCE: Final = 20.0

_CHOICES: Final = {
    "": NONE,
    "evict": ExploreOptions.given(["evict"], 1, False),
    "speculate": ExploreOptions.given(["speculate"], 1, False),
    "store-buffers": ExploreOptions.given([], 1, True),
}


@dataclass(frozen=True, slots=True, order=True)
class Pair:
    """One test under one preset.  choices: "" or one of explore's: evict, speculate, store-buffers."""

    test: str
    preset: str = DEFAULT
    choices: str = ""

    def __str__(self) -> str:
        preset = "" if self.preset == DEFAULT else f" under {self.preset}"
        return f"{self.test}{preset}" + (f" with {self.choices}" if self.choices else "")

    @property
    def litmus(self) -> LitmusTest:
        return _test(self.test)

    @property
    def key(self) -> str:
        """Return the pair with a hash of its test's text: a look at it counts as long as the text stays."""
        return f"{self} {text_hash(self.test)}"


@cache
def text_hash(test: str) -> str:
    """Return a short hash of a test's text, "" if no such test ships."""
    text = shipped_texts().get(test)
    return "" if text is None else hashlib.sha256(text.encode()).hexdigest()[:8]


@cache
def _test(name: str) -> LitmusTest:
    return load_test(name)


@dataclass(frozen=True, slots=True)
class Shown:
    """The result of a pair: the verdict, its kinds, and the number of executions.

    failure: the text of an execution that could not go on.  seconds: CPU time of the whole search.  complete:
    all interleavings were searched.  cut_short: the CPU time was used up before the executions were.  depth:
    the steps of the longest execution; endless: executions that were given up because they did not end.
    """

    verdict: str
    kinds: tuple[str, ...]
    executions: int
    failure: str = ""
    seconds: float = 0.0
    complete: bool = False
    cut_short: bool = False
    depth: int = 0
    endless: int = 0


@dataclass(slots=True)
class Budget:
    """Ends a look at a pair after a number of runs, which depends on the code alone, and not on the machine's
    load; as a last resort, after some CPU time of this process."""

    runs: int
    seconds: float
    cut_short: bool = False
    begun: float = field(default_factory=time.process_time)

    def ended(self) -> bool:
        """Return whether to begin no further run: the search asks before each."""
        self.runs -= 1
        self.cut_short = self.cut_short or self.used() > self.seconds
        return self.cut_short or self.runs < 0

    def used(self) -> float:
        return time.process_time() - self.begun


@dataclass(slots=True)
class Known:
    """The findings about a pair with KVM's code as it is.

    lines: module and line of the statements that it reaches.  counts: of its first execution.
    """

    pair: Pair
    shown: Shown
    counts: dict[str, int] = field(default_factory=dict)
    lines: frozenset[tuple[str, int]] = frozenset()


def pairs() -> Iterator[Pair]:
    """Yield the pairs in which no violation is expected."""
    for test in shipped_tests():
        for preset in (DEFAULT, *OTHERS):
            if suits(test, preset) and all(one in (SAFE, INCONCLUSIVE) for one in expected_of(test, preset)):
                yield Pair(test.name, preset)
        for choice, policies in test.expect.apart().items():
            if policies and DEFAULT not in policies:
                yield Pair(test.name, DEFAULT, choice)


def quick_pairs() -> list[Pair]:
    """Return the pairs under the default preset."""
    return [pair for pair in pairs() if pair.preset == DEFAULT]


def counts(pair: Pair) -> dict[str, int]:
    """Return the counts of one execution of a pair, in which each thread runs until it waits."""
    return counts_of(pair.litmus, named_policy(pair.preset), _CHOICES[pair.choices])


def plan_of(pair: Pair, executions: int) -> Plan:
    return Plan(executions=executions, minimize=False, options=_CHOICES[pair.choices])


def most_of(pair: Pair) -> int:
    """Return the executions of the longest look at a pair."""
    return SECOND if pair.preset == DEFAULT else OTHER


def show(pair: Pair, executions: int) -> Shown:
    """Explore a pair with the code that is in this process."""
    budget = Budget(RUNS * (executions + FIRST), PATIENCE)
    found = explore_verdict(pair.litmus, named_policy(pair.preset), plan_of(pair, executions), budget.ended)
    return Shown(
        found.verdict,
        found.kinds,
        found.executions,
        found.failure,
        round(budget.used(), 3),
        found.complete,
        budget.cut_short,
        found.depth,
        found.cut_off,
    )


def known(pair: Pair, cover: Cover, executions: int = 0) -> Known:
    """Explore a pair as it is, with its coverage."""
    cover.reached.clear()
    most = (executions or SECOND) if pair.preset == DEFAULT else _COVERAGE
    shown = show(pair, most)
    lines = frozenset(cover.places[number] for number in cover.reached)
    return Known(pair, shown, counts(pair), lines)


class Cover:
    """The statements that were reached since the last VMs were made; once it exists, code is slower."""

    def __init__(self) -> None:
        self.reached: set[int] = set()
        add: Callable[[int], Any] = self.reached.add
        self.places = patched.cover(add)
        reset = Harness.reset

        def counted(harness: Harness) -> None:
            reset(harness)
            self.reached.clear()

        setattr(Harness, "reset", counted)  # noqa: B010


def fingerprint() -> str:
    """Return a hash of all that a look depends on besides the mutant and the test: emulator and core."""
    found = hashlib.sha256()
    for package, suffixes in ((emulator, (".py",)), (native, (".c", ".h"))):
        root = Path(next(iter(package.__path__)))
        for file in sorted(root.rglob("*")):
            if file.suffix in suffixes:
                found.update(f"{file.relative_to(root)}\n".encode())
                found.update(file.read_bytes())
    return found.hexdigest()
