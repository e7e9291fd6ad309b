"""Runs the units of a sweep that its store does not have: in processes of this machine, or on a cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

from loguru import logger

from emulator import __version__
from emulator.compare.measure import measure
from emulator.compare.runner import paced_job
from emulator.errors import BadInput
from emulator.interrupts import came
from emulator.policy import spelled_policy
from emulator.processes import ProcessPool, ending
from emulator.sweep.grid import Unit
from emulator.sweep.store import VERSION, Record

Run = Callable[[Sequence[Unit], int], Iterator[Record]]


class Keyed(Protocol):
    """A unit of work: a run or a proof."""

    @property
    def key(self) -> str: ...


_TICK: Final = 0.2


def run_unit(unit: Unit) -> Record | None:
    """Run a unit and return its record; None if it was interrupted."""
    logger.disable("emulator")
    shape, stop, started = unit.shape(), threading.Event(), time.monotonic()
    policy = spelled_policy(unit.policy)
    duration = unit.duration or shape.duration
    job = paced_job(shape, policy, unit.seed, duration, chaos=unit.chaos, unbounded=unit.unbounded)
    result = job.run(lambda snapshot: stop.set() if ending() else None, stop)
    if stop.is_set():
        return None
    return {
        "flushlab_sweep": VERSION,
        "key": unit.key,
        "number": unit.number,
        "version": __version__,
        "scenario": shape.name,
        "point": dict(unit.point),
        "policy": unit.name,
        "seed": unit.seed,
        "duration_seconds": duration,
        "verdict": "failed" if result.failure else result.verdict,
        "violations": dict(result.snapshot.violations),
        "failure": result.failure,
        "wall_seconds": round(time.monotonic() - started, 3),
        "values": measure(result, shape).values,
    }


def in_processes(units: Sequence[Unit], jobs: int) -> Iterator[Record]:
    """Yield the records in the order in which `jobs` processes complete them; after a signal, those that are
    complete."""
    with ProcessPool(min(jobs, max(len(units), 1))) as pool:
        for future in pool.completed([pool.submit(run_unit, unit) for unit in units]):
            record = future.result()
            if record is not None:
                yield record


def on_cluster(
    address: str, task: Callable[..., Any] | None = None, *shared: Any
) -> Callable[[Sequence[Keyed], int], Iterator[Any]]:
    """Return a function that hands units to the scheduler of dask.distributed at this address; `local` is a
    cluster of processes on loopback.  It yields the results of `task`, by default
    run_unit(), that are not None.  Each worker gets what is `shared` once, as the task's further arguments.
    """
    try:
        import distributed
    except ImportError:
        found = "dask.distributed is not installed"
        raise BadInput("--cluster", found, "it: pip install 'flushlab[cluster]'") from None

    def run(units: Sequence[Keyed], jobs: int) -> Iterator[Any]:
        if address == "local":
            cluster = distributed.LocalCluster(
                n_workers=jobs,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address=None,
                silence_logs="ERROR",
            )
            with cluster, distributed.Client(cluster) as client:
                yield from _completed(client, units, task or run_unit, shared)
            return
        try:
            client = distributed.Client(address, timeout="10s")
        except (OSError, ValueError) as error:
            expected = "a scheduler's address such as tcp://HOST:8786, or local"
            raise BadInput("--cluster", f"found {address} ({error})", expected) from error
        with client:
            yield from _completed(client, units, task or run_unit, shared)

    return run


def _completed(
    client: Any, units: Sequence[Keyed], task: Callable[..., Any], shared: Sequence[Any]
) -> Iterator[Any]:
    given = client.scatter(list(shared), broadcast=True, hash=False) if shared else ()
    futures = {client.submit(task, unit, *given, key=f"flushlab-{unit.key}", pure=False) for unit in units}
    while futures and came() is None:
        done = {future for future in futures if future.done()}
        for future in done:
            record = future.result()
            if record is not None:
                yield record
        futures -= done
        if not done:
            time.sleep(_TICK)
    for future in futures:
        future.cancel()
