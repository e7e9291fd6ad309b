"""`flushlab list`: the names that the command line accepts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from emulator.cli.show import entry_of
from emulator.report.console import output_console, print_catalogue

if TYPE_CHECKING:
    from emulator.policy import DecisionPoint

app = typer.Typer(
    help="List policies, mutants, decision points, scenarios and litmus tests.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def policies() -> None:
    """List the presets, merged and proposed designs, and where each differs from the default."""
    from emulator.policy import DEFAULT, MUTANTS, PRESET_DOCS, PRESETS

    def entries() -> Iterator[tuple[int, str, list[str]]]:
        default = PRESETS[DEFAULT].answers()
        for name, policy in PRESETS.items():
            differences = [
                f"{point}={answer}" for point, answer in policy.answers().items() if answer != default[point]
            ]
            answers = (
                f"Differs from {DEFAULT} in {', '.join(differences)}." if differences else "The default."
            )
            yield 0, name, [PRESET_DOCS[name], answers]

    print_catalogue(entries())
    print("\nProposals that act are classes, with their mails in emulator/policy/proposals.")
    print(f"{len(MUTANTS)} policies with a bug are named mutant:NAME: flushlab list mutants")
    print("Your own, a class or a patch of KVM's code: flushlab guide policies, patches")


@app.command()
def mutants() -> None:
    """List the mutants: policies with a bug that KVM had or a plausible one, and how each is caught."""
    from emulator.policy import MUTANTS

    print_catalogue((0, *entry_of(mutant)) for mutant in MUTANTS.values())
    print("\nThe id in parentheses is an alias: mutant:B6 is mutant:iterator-skips-spte.")
    print("flushlab show mutant:NAME shows the change beside the function that it changes.")


@app.command()
def points() -> None:
    """List the decision points and their alternatives; the first one of each point is Linux 7.3's."""
    from emulator.policy import POINTS

    def entries(point: DecisionPoint) -> Iterator[tuple[int, str, list[str]]]:
        yield 0, point.name, [point.doc]
        for alternative in point.alternatives:
            default = " (Linux 7.3)" if alternative.name == point.default else ""
            mutant = " (known to be wrong)" if alternative.mutant else ""
            proposed = " (a proposal)" if alternative.proposed else ""
            yield 1, alternative.name + default + mutant + proposed, [alternative.doc]
        if point.acts:
            yield 1, "done", ["For classes only: the class has flushed, or accounted for it, itself."]

    print_catalogue(entry for point in POINTS for entry in entries(point))


@app.command()
def litmus(
    ops: Annotated[
        bool, typer.Option("--ops", help="Show the keys of a test file and the operations instead.")
    ] = False,
) -> None:
    """List the litmus tests, with the subject and the origin of each."""
    from emulator.litmus import describe

    if ops:
        print(describe.schema())
        print("\nOperations\n")
        print_catalogue(describe.operations())
    else:
        print_catalogue(describe.tests())


@app.command()
def scenarios() -> None:
    """List the embedded scenarios."""
    from emulator.scenario.config import embedded_scenarios, load_scenario

    table = Table(box=None, pad_edge=False)
    for column in ("scenario", "pCPUs", "VMs", "vCPUs", "MiB", "title"):
        table.add_column(column, no_wrap=column != "title")
    for name in embedded_scenarios():
        scenario = load_scenario(name)
        numbers = (scenario.machine.pcpus, scenario.vms, scenario.vcpus, scenario.guest_pages // 256)
        table.add_row(name, *(str(number) for number in numbers), Text(scenario.title))
    output_console(80).print(table)
