"""`flushlab compare --vary` and `flushlab merge`: sweeps over a grid, and their stores."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emulator import interrupts
from emulator.cli.options import MAX_JOBS, JsonOption, MachineOptions
from emulator.errors import BadInput
from emulator.output import Unwritable, check_file, saying

if TYPE_CHECKING:
    from emulator.policy import Policy
    from emulator.sweep.table import Swept

_WIDTH = 120

VaryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--vary",
        metavar="KEY=V1,V2,...",
        help="Compare at each of these values of a key of the scenario: vm.count=1,4 host.unmap=100,1000 "
        "pcpus=4,16. May be repeated: a grid.",
    ),
]
StoreOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Keep each run of a sweep in this file as soon as it is done; do not repeat runs that it has.",
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="Run the I-th of N parts. `flushlab merge` joins their stores."),
]
SweepJobsOption = Annotated[
    int,
    typer.Option(
        "--jobs",
        min=1,
        max=MAX_JOBS,
        help="Runs at a time in a sweep. Runs at the same time slow each other down.",
    ),
]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Hand the runs of a sweep to the dask.distributed scheduler at this address; local: to a "
        "cluster of --jobs processes on loopback.",
    ),
]
HtmlOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Also write a report with plots, as one self-contained page."),
]
TableOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Also write a row for each run of a sweep, as .csv or .parquet."),
]
FigureOption = Annotated[
    list[str] | None,
    typer.Option(
        "--figure",
        metavar="F",
        help="A figure to show of a sweep, by its key in --json. May be repeated. Default: flush cycles/M, "
        "interruptions/M.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions(MachineOptions):
    """Options of `compare` that make it a sweep, and those of the machine."""

    vary: VaryOption = None
    store: StoreOption = None
    shard: ShardOption = None
    jobs: SweepJobsOption = 1
    cluster: ClusterOption = None
    table: TableOption = None
    figures: FigureOption = None

    @property
    def given(self) -> bool:
        return bool(self.vary or self.store or self.shard or self.cluster or self.table)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweep as the command line asks for it."""

    scenario: str
    policies: Sequence[tuple[str, Policy]]
    repeat: int
    seed: int
    as_json: bool
    options: SweepOptions
    html: Path | None = None
    unit: dict[str, Any] = field(default_factory=dict)


def run_sweep(sweep: Sweep) -> int:
    """Run the units that the store does not have; print the table of all; return the exit status."""
    from emulator.scenario.vary import parse_vary
    from emulator.sweep.grid import Grid, shard
    from emulator.sweep.store import Store
    from emulator.sweep.table import Swept, check_table
    from emulator.sweep.work import in_processes, on_cluster

    options = sweep.options
    vary = tuple(map(parse_vary, options.vary or ()))
    keys = [key for key, _ in vary]
    if len(set(keys)) < len(keys):
        raise BadInput("--vary", f"found {max(keys, key=keys.count)} twice", "each key once")
    if options.table is not None:
        check_table(options.table)
        check_file("--table", options.table)
    run = in_processes if options.cluster is None else on_cluster(options.cluster)
    grid = Grid(sweep.scenario, vary, tuple(sweep.policies), sweep.repeat, sweep.seed, sweep.unit)
    units = shard(grid.units, options.shard)
    interrupts.only_note()
    with Store(options.store) as store:
        missing = [unit for unit in units if unit.key not in store.records]
        lines = _Lines(len(units), len(units) - len(missing))
        for record in run(missing, options.jobs) if missing else ():
            store.add(record)
            lines.print(record)
        records = [
            {**store.records[unit.key], "number": unit.number} for unit in units if unit.key in store.records
        ]
    swept = Swept(records)
    status = _print(swept, options.figures, options.table, as_json=sweep.as_json, html=sweep.html)
    return interrupts.ended(status, len(units) - len(records), len(units), "runs")


def check_html(path: Path | None) -> None:
    """Raise BadInput, before minutes of running, if a page is asked for and cannot be made."""
    if path is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadInput(
            "--html", "matplotlib is not installed", "it: pip install 'flushlab[report]'"
        ) from None
    check_file("--html", path)


class _Lines:
    """Print a line on standard error for each run, with an estimate of the time that is left."""

    def __init__(self, units: int, there: int) -> None:
        self.units, self.there, self.done = units, there, 0
        self.started = time.monotonic()
        if there:
            print(f"{there} of {units} runs are in the store", file=sys.stderr)

    def print(self, record: dict[str, Any]) -> None:
        self.done += 1
        left = self.units - self.there - self.done
        seconds = (time.monotonic() - self.started) / self.done * left
        point = " ".join(f"{key}={value}" for key, value in record["point"].items())
        what = " ".join(filter(None, [point, record["policy"], f"seed {record['seed']}"]))
        rest = f", about {_about(seconds)} left" if left else ""
        print(
            f"run {self.there + self.done} of {self.units}: {what}: {record['verdict']}{rest}",
            file=sys.stderr,
        )


def _about(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _print(
    swept: Swept,
    figures: Sequence[str] | None,
    table: Path | None,
    *,
    as_json: bool,
    html: Path | None = None,
) -> int:
    """Write the files, then standard output, which may have a slow reader; return the exit status."""
    from emulator.report.console import output_console
    from emulator.sweep.table import FIGURES, sweep_table

    shown = tuple(dict.fromkeys(figures or FIGURES))
    lost = None
    try:
        if table is not None:
            swept.write(table)
        if html is not None:
            from emulator.sweep.page import write_page

            write_page(swept, shown, shlex.join(["flushlab", *sys.argv[1:]]), html)
    except Unwritable as error:
        lost = error
    with saying(swept.status):
        if as_json:
            print(json.dumps(swept.document(shown), allow_nan=False))
        else:
            console = output_console(_WIDTH, highlight=False)
            console.print(sweep_table(swept, shown, console.width))
    if lost is not None:
        print(f"flushlab: {lost}", file=sys.stderr)
    return swept.status


def merge(
    stores: Annotated[list[Path], typer.Argument(metavar="STORES", help="The stores of a sweep's shards.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the runs of all into one store.")
    ] = None,
    figures: FigureOption = None,
    table: TableOption = None,
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Join the stores of a sweep's shards, or of `litmus --explore --shard`, and print their table."""
    from emulator.sweep.proofs import is_proof
    from emulator.sweep.store import merged, write_store
    from emulator.sweep.table import Swept, check_table

    if table is not None:
        check_table(table)
        check_file("--table", table)
    if output is not None:
        check_file("--output", output)
    check_html(html)
    records = merged(stores)
    if any(map(is_proof, records)):
        raise typer.Exit(_merge_proofs(records, output, as_json=as_json))
    scenarios = sorted({str(record["scenario"]) for record in records})
    if len(scenarios) > 1:
        raise BadInput("STORES", f"found runs of {' and '.join(scenarios)}", "stores of one sweep")
    if output is not None:
        write_store("--output", output, records)
    raise typer.Exit(_print(Swept(records), figures, table, as_json=as_json, html=html))


def _merge_proofs(records: Sequence[dict[str, Any]], output: Path | None, *, as_json: bool) -> int:
    """Write the joined store of proofs, print the verdicts as `litmus` does, and return the exit status."""
    from emulator.litmus.table import print_results
    from emulator.report.console import output_console
    from emulator.sweep.proofs import is_proof, results_of
    from emulator.sweep.store import write_store

    if not all(map(is_proof, records)):
        raise BadInput("STORES", "found runs beside proofs", "stores of one kind")
    if len({(*record["limits"], record["seed"]) for record in records}) > 1:
        raise BadInput("STORES", "found proofs with other limits or seeds", "stores of one command's shards")
    if output is not None:
        write_store("--output", output, records)
    results = results_of(records)
    status = 1 if results.differing() or results.unforeseen() else 0
    with saying(status):
        if as_json:
            print(json.dumps(results.document(), indent=1))
        else:
            print_results(results, output_console(200))
    return status
