"""`flushlab list`: the names that the command line accepts."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from emulator.report.console import output_console

app = typer.Typer(
    help="List policies, mutants, decision points and scenarios.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def policies() -> None:
    """List the presets, merged and proposed designs, and where each differs from the default."""
    from emulator.policy import DEFAULT, MUTANTS, PRESET_DOCS, PRESETS

    table = _table("policy", "what it is")
    default = PRESETS[DEFAULT].answers()
    for name, policy in PRESETS.items():
        differences = [
            f"{point}={answer}" for point, answer in policy.answers().items() if answer != default[point]
        ]
        what = "the default" if name == DEFAULT else f"{DEFAULT} but {', '.join(differences) or 'the same'}"
        table.add_row(name, Text(f"{PRESET_DOCS[name]}\n{what}"))
    output_console(200).print(table)
    print(f"and {len(MUTANTS)} mutants, mutant:{next(iter(MUTANTS))} and so on: flushlab list mutants")


@app.command()
def mutants() -> None:
    """List the mutants: policies with a bug that KVM had or a plausible one, and how each is caught."""
    from emulator.policy import MUTANTS

    table = _table("policy", "base", "caught by", "what it is")
    for mutant in MUTANTS.values():
        caught = ", ".join(mutant.expected) or "nothing: costs only"
        if mutant.store_buffers:
            caught += " (explore --store-buffers)"
        what = Text(f"{_one_line(mutant.doc)} ({mutant.source})")
        table.add_row(f"mutant:{mutant.name}", mutant.base, Text(caught), what)
    output_console(200).print(table)


@app.command()
def points() -> None:
    """List the decision points and their alternatives; the first one of each point is Linux 7.3's."""
    from emulator.policy import POINTS

    table = _table("point", "alternative", "mutant", "what it is")
    for point in POINTS:
        table.add_row(Text(point.name, style="bold"), "", "", Text(_one_line(point.doc), style="bold"))
        for alternative in point.alternatives:
            mark = "mutant" if alternative.mutant else ""
            table.add_row("", alternative.name, mark, Text(_one_line(alternative.doc)))
    output_console(200).print(table)


@app.command()
def litmus(
    ops: Annotated[bool, typer.Option("--ops", help="What a test file may say, and the operations.")] = False,
) -> None:
    """List the litmus tests, with the subject and the origin of each."""
    from emulator.litmus import describe

    if ops:
        print(describe.schema())
        output_console(200).print(describe.operations())
    else:
        output_console(200).print(describe.tests())


@app.command()
def scenarios() -> None:
    """List the embedded scenarios."""
    from emulator.scenario.config import embedded_scenarios, load_scenario

    table = _table("scenario", "pCPUs", "VMs", "vCPUs", "MiB", "what it is")
    for name in embedded_scenarios():
        scenario = load_scenario(name)
        numbers = (scenario.machine.pcpus, scenario.vms, scenario.vcpus, scenario.guest_pages // 256)
        table.add_row(name, *(str(number) for number in numbers), Text(scenario.title))
    output_console(200).print(table)


def _one_line(doc: str) -> str:
    return " ".join(inspect.cleandoc(doc).split())


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column != "what it is")
    return table
