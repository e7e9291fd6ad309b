"""Mutants as units of a sweep's store: one mutant, judged to one depth, is a unit.

A unit's record depends on its sources alone, and not on the mutants that were judged before it: of earlier
catches it knows those of catching.toml.  So the processes of one machine, shards, and a cluster make the same
records.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from bench.mutation.generate import Mutant
from bench.mutation.judge import BRIEF, FAIR, QUICK, THOROUGH, Depth, Judgement, judge
from bench.mutation.pool import Lost, each
from bench.mutation.results import Results
from bench.mutation.run import Stop, never, of_lost, prepare
from bench.mutation.suite import Known
from emulator import __version__
from emulator.sweep.grid import KEY_DIGITS
from emulator.sweep.store import VERSION, Record, Store
from emulator.sweep.work import on_cluster

DEPTHS: Final[dict[str, Depth]] = {"brief": BRIEF, "quick": QUICK, "fair": FAIR, "thorough": THOROUGH}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A unit.  depth: its name.  sources: their fingerprint.  number: its place among all that were asked
    for."""

    mutant: Mutant
    depth: str
    sources: str
    number: int

    @property
    def key(self) -> str:
        depends = [self.sources, self.mutant.digest, self.depth]
        return hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:KEY_DIGITS]

    def record(self, judgement: Judgement) -> Record:
        return {
            "flushlab_sweep": VERSION,
            "key": self.key,
            "number": self.number,
            "version": __version__,
            "scenario": self.mutant.name,
            "point": {},
            "policy": self.depth,
            "seed": 0,
            "verdict": judgement.verdict,
            "values": {"executions": judgement.executions},
            "judgement": judgement.document(),
        }


def judgement_of(record: Record) -> Judgement:
    return Judgement(**record["judgement"])


def judged(
    units: Sequence[Unit],
    store: Store,
    known: Sequence[Known],
    jobs: int,
    *,
    cluster: str | None = None,
    stop: Stop = never,
) -> Iterator[Record]:
    """Yield the records that the store has, then those of the other units as they come, which are put there.

    cluster: the address of a scheduler of dask.distributed, whose workers run in checkouts of these sources.
    """
    missing = [unit for unit in units if unit.key not in store.records]
    yield from (store.records[unit.key] for unit in units if unit.key in store.records)
    if not missing:
        return
    if cluster is None:
        found = _in_processes(missing, known, jobs, stop)
    else:
        found = on_cluster(cluster, on_worker, tuple(known))(missing, jobs)
    for record in found:
        store.add(record)
        yield record


def _in_processes(
    units: Sequence[Unit], known: Sequence[Known], jobs: int, stop: Stop = never
) -> Iterator[Record]:
    listed = Results(None, units[0].sources)

    def do(unit: Unit, heard: Callable[[str], None]) -> Judgement:
        telling, counts_tell = listed.telling(unit.mutant), listed.counts_tell(unit.mutant)
        return judge(unit.mutant, known, heard, DEPTHS[unit.depth], None, telling, counts_tell)

    for unit, found in each(units, do, jobs, stop):
        yield unit.record(of_lost(unit.mutant, found) if isinstance(found, Lost) else found)


def on_worker(unit: Unit, known: Sequence[Known]) -> Record:
    """Judge a unit in a process of its own, because a mutant may take its process down, and a worker of dask
    may have no children of multiprocessing."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.mutation.units"],
        input=pickle.dumps((unit, known)),
        stdout=subprocess.PIPE,
        check=True,
    )
    record: Record = json.loads(done.stdout)
    return record


def _serve() -> None:
    """Read a unit and the findings about KVM's code as it is from standard input, and print the record."""
    unit, known = pickle.load(sys.stdin.buffer)
    prepare()
    (record,) = _in_processes([unit], known, 1)
    json.dump(record, sys.stdout)


if __name__ == "__main__":
    _serve()
