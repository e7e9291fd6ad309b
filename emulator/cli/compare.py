"""`flushlab compare`: policies side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emulator.cli.completion import policies
from emulator.cli.kernel import on_kernel
from emulator.cli.options import (
    DurationOption,
    JsonOption,
    KernelOption,
    LogLevel,
    ScenarioArgument,
    duration_of,
    expanded,
    refuse,
)
from emulator.cli.replay import SpeedOption, replay
from emulator.cli.sweep import HtmlOption, Sweep, SweepOptions, check_html, run_sweep
from emulator.defaults import DEFAULT_POLICY
from emulator.errors import BadInput
from emulator.output import Unwritable, saying

if TYPE_CHECKING:
    from emulator.cli.kernel import TreeReport
    from emulator.compare.runner import Comparison, Plan
    from emulator.policy import Policy
    from emulator.report.result import Result

DEFAULT_COMPARED = "migration-storm"
_WORKLOAD = ".workload"

PoliciesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="P",
        help="A policy to compare: a preset, mutant:NAME, FILE.py or IDEA.patch, with +point=alternative to "
        "answer single points differently, and +IDEA.patch to change KVM's code. May be repeated; the first "
        f"is the baseline. A single policy is compared with {DEFAULT_POLICY}.",
        autocompletion=policies,
    ),
]
RepeatOption = Annotated[
    int,
    typer.Option(min=1, max=1000, metavar="N", help="Run each policy N times, and show medians and spreads."),
]
UnitsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="End each run after N operations of the scenario's unit, such as migrations. --duration is the "
        "most that a run takes.",
    ),
]
SensitivityOption = Annotated[
    bool,
    typer.Option(
        "--sensitivity",
        help="Also tell at which value of a cost the order of two policies turns, and which orders hold "
        "wherever the costs lie in their ranges.",
    ),
]


@expanded
def compare(
    context: typer.Context,
    scenario: ScenarioArgument = DEFAULT_COMPARED,
    policies: PoliciesOption = None,
    repeat: RepeatOption = 1,
    duration: DurationOption = None,
    units: UnitsOption = None,
    as_json: JsonOption = False,
    html: HtmlOption = None,
    sensitivity: SensitivityOption = False,
    kernel: KernelOption = None,
    speed: SpeedOption = 0.0,
    *,
    options: SweepOptions,
) -> None:
    """Run the same seeded workload under each policy; show each policy's flushes and their costs.

    With --vary, --store, --shard, --table or --cluster it is a sweep: a grid of runs, shown as medians
    with intervals, which with --store goes on where it stopped. Its seed is 0 unless --seed gives another.

    With a file that ends in .workload it is `flushlab replay`: the recording's events under each policy.
    """
    from emulator.compare.runner import Plan
    from emulator.policy.suitable import check_suits
    from emulator.scenario import limits
    from emulator.scenario.config import load_scaled

    if scenario.endswith(_WORKLOAD):
        expected = "a scenario; with a workload: --policy, --costs, --speed and --json only"
        every = {parameter.name or "" for parameter in context.command.params}
        taken = {"scenario", "policies", "costs", "speed", "as_json"}
        refuse(context, every - taken, "with a workload", expected)
        replay(Path(scenario), _with_baseline(policies or []), speed, options.costs, as_json)
        return
    refuse(context, {"speed"}, "without a workload", "a file that ends in .workload")
    chosen = load_policies(policies or [])
    check_html(html)
    if options.given:
        expected = "a comparison without --vary, --store, --shard, --table and --cluster"
        refuse(context, {"sensitivity", "kernel", "units"}, "with a sweep", expected)
        sweep = _sweep(scenario, chosen, repeat, duration, options, as_json=as_json, html=html)
        raise typer.Exit(run_sweep(sweep))
    refuse(context, {"jobs", "figures"}, "without a sweep", "--vary, --store, --shard or --table beside it")
    shape = load_scaled(scenario, options.pcpus, options.ept, options.costs)
    if units is not None and shape.unit is None:
        raise BadInput("--units", f"found {units}", f"a scenario with a unit, which {shape.name} has not")
    limits.check(shape)
    for policy in chosen:
        check_suits(policy, shape.name, **shape.kind_of_host)
    plan = Plan(
        scenario=shape,
        policies=chosen,
        repeat=repeat,
        duration=duration_of(duration) or shape.duration,
        seed=options.chosen_seed,
        chaos=options.chaos,
        unbounded=options.unbounded,
        sensitivity=sensitivity,
        costs=options.costs,
        named=(scenario, tuple(policies or ())),
        units=units,
    )
    if kernel is None:
        raise typer.Exit(_compare(plan, as_json, html))
    raise typer.Exit(
        on_kernel(
            kernel,
            shape,
            chosen,
            lambda tree: _compare(plan, as_json, html, tree),
            chosen=[policy.name for policy in chosen],
            as_json=as_json,
        )
    )


def _compare(plan: Plan, as_json: bool, html: Path | None, tree: TreeReport | None = None) -> int:
    """Run the comparison and write it; return the exit status."""
    from emulator.actors.crew import stop_seconds
    from emulator.cli.session import Session
    from emulator.compare.runner import Comparer
    from emulator.log import Logging

    comparer = Comparer(plan, _announce)
    with Logging(LogLevel.WARNING.upper(), "text"):
        stopping = stop_seconds(plan.scenario.threads)
        comparison = Session(comparer, None, comparer.view, stopping=stopping).execute()
    status = _write(comparison, as_json, html)
    if tree is None:
        return status
    print(tree.text(), file=sys.stderr if as_json else sys.stdout)
    return status or tree.status()


def _sweep(
    scenario: str,
    policies: tuple[Policy, ...],
    repeat: int,
    duration: str | None,
    options: SweepOptions,
    *,
    as_json: bool,
    html: Path | None,
) -> Sweep:
    return Sweep(
        scenario=scenario,
        policies=[(policy.spelled(), policy) for policy in policies],
        repeat=repeat,
        seed=options.seed or 0,
        as_json=as_json,
        html=html,
        options=options,
        unit={
            "duration": duration_of(duration),
            "pcpus": options.pcpus,
            "ept": options.ept,
            "costs": options.costs,
            "chaos": options.chaos,
            "unbounded": options.unbounded,
        },
    )


def _with_baseline(texts: list[str]) -> list[str]:
    """Return the policies; with the default one first if there is no other to compare with."""
    return [DEFAULT_POLICY, *texts] if len(texts) == 1 and texts[0] != DEFAULT_POLICY else texts


def load_policies(texts: list[str]) -> tuple[Policy, ...]:
    """Return the named policies, the baseline first; raise BadInput if one is named twice."""
    from emulator.cli.run import load_policy

    if not texts:
        raise BadInput(
            "--policy", "found none", f"the policies to compare, such as --policy {DEFAULT_POLICY}"
        )
    loaded = [load_policy(text, ()) for text in texts]
    if len(loaded) == 1 and loaded[0].name != DEFAULT_POLICY:
        loaded.insert(0, load_policy(DEFAULT_POLICY, ()))
    names = [policy.name for policy in loaded]
    for name in names:
        if names.count(name) > 1:
            raise BadInput("--policy", f"found {name} twice", "each policy once; --repeat N runs it again")
    return tuple(loaded)


def _announce(number: int, runs: int, result: Result) -> None:
    """Print a line after each run if standard error is no terminal, so that there is no live display."""
    if not sys.stderr.isatty():
        seconds = f"{result.snapshot.elapsed:.1f}s"
        print(f"run {number} of {runs}: {result.policy_name}: {result.verdict}, {seconds}", file=sys.stderr)


def _write(comparison: Comparison, as_json: bool, html: Path | None) -> int:
    """Write the page, then standard output, which may have a slow reader; return the exit status."""
    from emulator.compare.document import comparison_document
    from emulator.compare.table import comparison_table
    from emulator.report.console import output_console

    lost = None
    if html is not None:
        from emulator.compare.html import write_page

        try:
            write_page(comparison, html)
        except Unwritable as error:
            lost = error
    with saying(comparison.exit_status):
        if as_json:
            print(json.dumps(comparison_document(comparison), allow_nan=False))
        else:
            width = 40 + 32 * (len(comparison.columns) + 1)
            console = output_console(width, highlight=False)
            console.print(comparison_table(comparison, console))
    if lost is not None:
        print(f"flushlab: {lost}", file=sys.stderr)
    return comparison.exit_status
