"""The size of a search: the operations that race in some random executions, and about which objects."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from emulator.explore.engine.scheduler import spelled
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.options import ExploreOptions
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.strategies.racing import Operation, Racing
from emulator.explore.strategies.search import Limits, search
from emulator.litmus.failure import LitmusFailure
from emulator.litmus.model import LitmusTest
from emulator.litmus.policies import named_policy
from native import lib
from native.types import SignalSlot

# Random executions of which the races are counted.
EXECUTIONS: Final = 30
# Pairs of operations, and objects of each, that a report names.
_PAIRS, _OBJECTS = 5, 2
# The operation that orders two others.
_WAIT: Final = "wait "


@dataclass(frozen=True, slots=True)
class Race:
    """Two operations that race: how often in all executions, and about which objects most.

    threads, texts, numbers: of the one and of the other; an operation's number counts from 1.
    """

    threads: tuple[str, str]
    texts: tuple[str, str]
    numbers: tuple[int, int]
    races: int
    objects: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        ends = [f"{thread}: {text}" for thread, text in zip(self.threads, self.texts, strict=True)]
        return {"operations": ends, "races": self.races, "objects": list(self.objects)}


@dataclass(frozen=True, slots=True)
class Size:
    """The races of some random executions: all of them, and those of the pairs of operations that race most.

    The first is of the two threads with most races; pairs: the number of their operations' pairs that race.
    """

    executions: int
    races: int
    most: tuple[Race, ...]
    pairs: int

    def document(self) -> dict[str, Any]:
        most = [race.document() for race in self.most]
        return {"executions": self.executions, "races": self.races, "most": most}

    def text(self) -> str:
        """Return a sentence: the reason for the size, and a remedy."""
        race = self.most[0]
        (one, other), (first, second) = race.threads, race.texts
        free = f"{self.pairs} pairs of operations, most" if self.pairs > 1 else "one pair of operations:"
        share, about = 100 * race.races // self.races, " and ".join(race.objects)
        return (
            f"large because {one} and {other} race freely in {free} `{first}` and `{second}` "
            f"({share} % of all races; about {about}); `wait {other} {race.numbers[1]}` before `{first}` "
            f"orders these two"
        )


def size_of(test: LitmusTest, policy: str, options: ExploreOptions, seed: int) -> Size | None:
    """Count the races of some random executions of a test under a policy.  None: no two threads race."""
    named = named_policy(policy)
    with named.confined():
        program = LitmusProgram(test, named, options, frozen=True)
        counting = Racing(program.objects, EXECUTIONS, seed, partial(_operation, program))
        try:
            with instrument(program.control):
                limits = Limits(executions=EXECUTIONS, first_only=False)
                found = search(program, program.objects, counting, limits, bool)
        except LitmusFailure:
            return None
        finally:
            program.close()
    return _size(test, counting, found.executions)


def _size(test: LitmusTest, counting: Racing, executions: int) -> Size | None:
    by_threads: Counter[tuple[str, str]] = Counter()
    found = []
    for ends, races in sorted(counting.races.items(), key=lambda entry: (-entry[1], entry[0])):
        (one, n), (other, m) = ends
        if not n or not m:
            continue
        texts = test.threads[one].ops[n - 1], test.threads[other].ops[m - 1]
        if not any(text.startswith(_WAIT) for text in texts):
            by_threads[one, other] += races
            about = counting.objects_of[ends].most_common(_OBJECTS)
            objects = tuple(_named(counting, bit) for bit, _ in about)
            found.append(Race((one, other), texts, (n, m), races, objects))
    if not found:
        return None
    first = max(by_threads, key=lambda threads: (by_threads[threads], threads))
    found.sort(key=lambda race: race.threads != first)
    pairs = sum(race.threads == first for race in found)
    return Size(executions, counting.races.total(), tuple(found[:_PAIRS]), pairs)


def _named(counting: Racing, bit: int) -> str:
    name = counting.objects.names[bit]
    return spelled(*name) if isinstance(name, tuple) else str(name)


def _operation(program: LitmusProgram, index: int) -> Operation:
    """Return the task's name and the number of its operation."""
    assert program.control.execution is not None
    name = program.control.execution.tasks[index].name
    thread = program.harness.threads.get(name)
    if thread is None:
        return name, 0
    done = int(lib.signal_get(program.machine.m, SignalSlot(thread.number)))
    return name, min(done + 1, len(thread.section.ops))
