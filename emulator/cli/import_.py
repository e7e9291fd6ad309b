"""`flushlab import`: the flushes in a trace of a real host."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from emulator.cli.options import refuse
from emulator.errors import BadInput, one_of, shown
from emulator.output import saying

if TYPE_CHECKING:
    from emulator.hosttrace.builder import Builder

IMPORT_HELP = (
    "Read a trace of a real host's KVM: its flushes, their causes, the guests that they interrupt, and the"
    " questions that it leaves open.\n\n"
    "A trace is the text of ftrace, `trace-cmd report` or `perf script`, of any kernel since 5.10, also under"
    " gzip; trace.dat and perf.data are read where trace-cmd or perf is installed. Unknown events are"
    " counted."
)
IMPORT_EXAMPLES = """\
\b
  flushlab import --recipe > record.sh
  flushlab import --recipe bpftrace > record.bt
  flushlab import --recipe costs > costs.sh
  flushlab import kvm.trace
  flushlab import trace.dat --json
  flushlab import kvm.trace --scenario my-host.toml
  flushlab import kvm.trace --workload my-host.workload
  trace-cmd report | flushlab import -
"""
_EXPECTED = "lines such as 'qemu-8397 [002] d..1. 1404.389366: kvm_exit: vcpu 1 reason HLT'"
_ONCE = "second reading, which tells VMs apart by their struct kvm: standard input is read once"
# Lines between two looks at the progress.
_STEP = 100_000


def import_(
    context: typer.Context,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[TRACE]",
            help="The trace; - for standard input. With --recipe: trace, the default, trace-cmd, perf, "
            "bpftrace, or costs.",
        ),
    ] = None,
    recipe: Annotated[
        bool,
        typer.Option(
            "--recipe",
            help="Print a script that records a trace, and read none. --recipe costs: one that measures the "
            "host's costs, for --costs.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    scenario: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a scenario with the host's vCPUs, CPUs and rates as well."),
    ] = None,
    workload: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the events in their order as well, for `flushlab replay`."),
    ] = None,
    memslots: Annotated[
        list[str] | None,
        typer.Option(
            "--memslot",
            metavar="[VM:]GFN,PAGES,HVA",
            help="A memslot, which tells the guest pages of notifier ranges to --workload. May be repeated. "
            "Default: inferred from the SPTEs that are zapped after ranges.",
        ),
    ] = None,
) -> None:
    if recipe:
        refuse(
            context,
            ("as_json", "scenario", "workload", "memslots"),
            "--recipe, which reads no trace",
            "one of them",
        )
        _print_recipe(file or "trace")
        return
    if file is None:
        raise BadInput("TRACE", "found none", "a trace, - for standard input, or --recipe")
    if memslots and workload is None:
        raise BadInput("--memslot", "found no --workload", "--workload FILE, which alone needs memslots")
    _import(file, as_json, scenario, workload, memslots or [])


def _print_recipe(name: str) -> None:
    from emulator.hosttrace.bpftrace_recipe import bpftrace_recipe
    from emulator.hosttrace.cost_recipe import cost_recipe
    from emulator.hosttrace.recipe import perf_recipe, trace_cmd_recipe, trace_recipe

    recipes = {
        "trace": trace_recipe,
        "trace-cmd": trace_cmd_recipe,
        "perf": perf_recipe,
        "bpftrace": bpftrace_recipe,
        "costs": cost_recipe,
    }
    if name not in recipes:
        raise BadInput("--recipe", f"found {shown(name)}", one_of(name, recipes))
    with saying(0):
        sys.stdout.write(recipes[name]())


def _import(
    file: str, as_json: bool, scenario: Path | None, workload: Path | None, memslots: list[str]
) -> None:
    from emulator.hosttrace.builder import Builder
    from emulator.hosttrace.lines import Reading, events
    from emulator.hosttrace.memslots import RULE, parsed_memslot
    from emulator.hosttrace.observed import Observed
    from emulator.hosttrace.report import as_dict, print_report, wrapped
    from emulator.hosttrace.shape import scenario as shape
    from emulator.hosttrace.source import opened
    from emulator.hosttrace.workload_file import text_of
    from emulator.output import check_file, write_file

    if scenario is not None:
        check_file("--scenario", scenario)
    if workload is not None:
        check_file("--workload", workload)
    reading, observed = Reading(), Observed()
    given = tuple(parsed_memslot(text) for text in memslots)
    builder = None if workload is None else Builder(given)
    built = None
    with opened(file) as lines:
        for event in events(_counted(lines), reading):
            observed.add(event)
            if builder is not None:
                builder.add(event)
    builder = _read_again(file, builder)
    name = "standard input" if file == "-" else file
    if not reading.events:
        found = reading.first_other[0] if reading.first_other else "an empty file"
        raise BadInput(name, f"no event in {reading.lines:,} lines, the first: {found}", _EXPECTED)
    if scenario is not None:
        write_file("--scenario", scenario, shape(name, observed))
    if workload is not None and builder is not None:
        built = builder.workload(name, observed)
        write_file("--workload", workload, text_of(built))
    with saying(0):
        if as_json:
            print(json.dumps(as_dict(name, reading, observed), indent=1))
        else:
            print_report(name, reading, observed)
            slots = [] if built is None else built.memslots
            for slot in slots:
                print(f"Memslot of {slot}.")
            if any(slot.ranges for slot in slots):
                print(*wrapped(RULE), sep="\n")


def _read_again(file: str, builder: Builder | None) -> Builder | None:
    """Return the builder after a second reading, which a trace of several VMs needs to tell them apart."""
    from emulator.hosttrace.lines import Reading, events
    from emulator.hosttrace.source import opened

    second = None if builder is None else builder.again()
    if builder is None or second is None:
        return builder
    if file == "-":
        builder.left_out[
            _ONCE
        ] += 1
        return builder
    with opened(file) as lines:
        for event in events(_counted(lines), Reading()):
            second.add(event)
    return second


def _counted(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines; on a terminal show how many have been read."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from lines
        return
    with console.status("reading") as status:
        for number, line in enumerate(lines):
            if number % _STEP == 0:
                status.update(f"{number:,} lines read")
            yield line
