"""Proofs of `litmus --explore` as units of a sweep's store: one test under one policy is a unit.

Its record has the fields of a run's, so that stores, shards and `flushlab merge` treat both alike, and
`outcome`, from which the table of `litmus` is printed again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from emulator import __version__
from emulator.explore.results.rounds import Told
from emulator.explore.results.suite import explore_all
from emulator.litmus.loader import load_tests
from emulator.litmus.model import LitmusTest
from emulator.litmus.table import Results
from emulator.litmus.verdict import Outcome
from emulator.policy.spelling import digests
from emulator.sweep.grid import KEY_DIGITS
from emulator.sweep.store import VERSION, Record, Store

# Of an outcome that explore_all() makes, these are empty.
_ON_THREADS: Final = ("delays_passed", "reports")
_SENTENCES: Final = ("unwatched", "unordered")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A unit: a test, a policy as the user spells it, and the limits of the search.  `number`: its place."""

    test: LitmusTest
    policy: str
    executions: int
    seconds: float
    seed: int
    number: int

    @property
    def key(self) -> str:
        depends = {
            "version": __version__,
            "test": self.test.name,
            "text": self.test.text,
            "policy": self.policy,
            "files": digests(self.policy),
            "executions": self.executions,
            "seconds": self.seconds,
            "seed": self.seed,
        }
        text = json.dumps(depends, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]

    def record(self, outcome: Outcome, wall_seconds: float) -> Record:
        kept = {
            one.name: getattr(outcome, one.name) for one in fields(Outcome) if one.name not in _ON_THREADS
        }
        return {
            "flushlab_sweep": VERSION,
            "key": self.key,
            "number": self.number,
            "version": __version__,
            "scenario": self.test.name,
            "file": "" if self.test.path is None else str(self.test.path.resolve()),
            "point": {},
            "policy": self.policy,
            "seed": self.seed,
            "limits": [self.executions, self.seconds],
            "verdict": "failed" if outcome.failure else "violations" if outcome.kinds else outcome.proof,
            "wall_seconds": round(wall_seconds, 3),
            "values": {"executions": outcome.executions},
            "outcome": kept,
        }


def is_proof(record: Record) -> bool:
    return isinstance(record.get("outcome"), dict)


def outcome_of(record: Record) -> Outcome:
    """Return the outcome of a proof's record."""
    known = {one.name for one in fields(Outcome)}
    values: dict[str, Any] = {name: value for name, value in record["outcome"].items() if name in known}
    values |= {name: tuple(values.get(name, ())) for name in _SENTENCES}
    return Outcome(**values)


def prove(unit: Proof) -> Record | None:
    """Search in this process alone, and return the proof's record; None if a signal cut it short."""
    started, plan = time.monotonic(), [(unit.test, (unit.policy,))]
    for outcome in explore_all(plan, unit.executions, unit.seed, 1, lambda n: None, unit.seconds):
        if not outcome.cut:
            return unit.record(outcome, time.monotonic() - started)
    return None


def proved(
    units: Sequence[Proof],
    store: Store,
    jobs: int,
    told: Told,
    cluster: Callable[[Sequence[Proof], int], Iterator[Record]] | None = None,
) -> Iterator[tuple[Outcome, bool]]:
    """Yield the outcome of each unit that the store has, then those of the others as they are reached, which
    are put there; and whether it had it.  A search that a signal cut short is not kept.

    cluster: runs prove() for the units elsewhere (on_cluster()), and yields the records.
    """
    missing = []
    for unit in units:
        if unit.key in store.records:
            yield outcome_of(store.records[unit.key]), True
        else:
            missing.append(unit)
    if not missing:
        return
    if cluster is not None:
        for record in cluster(missing, jobs):
            store.add(record)
            yield outcome_of(record), False
        return
    by_pair = {(unit.test.name, unit.policy): unit for unit in missing}
    plan = [(unit.test, (unit.policy,)) for unit in missing]
    first, last = missing[0], time.monotonic()
    for outcome in explore_all(plan, first.executions, first.seed, jobs, lambda n: None, first.seconds, told):
        now = time.monotonic()
        if not outcome.cut:
            store.add(by_pair[outcome.test, outcome.policy].record(outcome, now - last))
        last = now
        yield outcome, False


def results_of(records: Sequence[Record]) -> Results:
    """Return the results of stores of proofs, for the table of `litmus`."""
    tests = load_tests(dict.fromkeys(record["file"] or record["scenario"] for record in records))
    executions, seconds = records[0]["limits"]
    results = Results(tests, records[0]["seed"], (executions, seconds))
    for record in records:
        results.add(outcome_of(record))
    return results
