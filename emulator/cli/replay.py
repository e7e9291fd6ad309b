"""`flushlab replay`: a real host's workload under policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emulator import interrupts
from emulator.cli.options import CostsOption, JsonOption
from emulator.defaults import DEFAULT_POLICY
from emulator.errors import BadInput
from emulator.output import saying

if TYPE_CHECKING:
    from emulator.replay.machine import Replay
    from emulator.report.result import Snapshot

REPLAY_HELP = (
    "Replay a workload that `flushlab import --workload` made from a trace of a real host, under each policy:"
    " the flushes of the recording, and those of the other policies.\n\n"
    "Events come one after the other, as fast as they go or, with --speed, in time: a workload has the same"
    " counts each time. Which flushes a policy elides safely is a question for `run`, `litmus` and `explore`."
)
REPLAY_EXAMPLES = """\
\b
  flushlab import kvm.trace --workload kvm.workload
  flushlab replay kvm.workload --policy linux-6.12 --policy root-tlb-gen
  flushlab replay kvm.workload --speed 1
"""
_WIDTH = 100
_FASTEST = 1e6


SpeedOption = Annotated[
    float,
    typer.Option(
        "--speed",
        metavar="X",
        help="Replay a workload in time: 1 as recorded, 10 ten times as fast. 0, the default: as fast as it "
        "goes.",
    ),
]


def replay(
    workload: Annotated[
        Path,
        typer.Argument(
            metavar="WORKLOAD", help="The workload's file, or the shipped numa-balancing.workload."
        ),
    ],
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="P",
            help="A policy: a preset, mutant:NAME, FILE.py or IDEA.patch. May be repeated. Default: "
            f"{DEFAULT_POLICY}.",
        ),
    ] = None,
    speed: SpeedOption = 0.0,
    costs: CostsOption = None,
    as_json: JsonOption = False,
) -> None:
    from emulator.hosttrace.workload_file import read_workload
    from emulator.policy import canonical, spelled_policy
    from emulator.policy.suitable import check_suits
    from emulator.replay.machine import Replay
    from emulator.replay.report import document, replayed, table
    from emulator.report.console import output_console
    from emulator.scenario.costs import load_costs

    if not 0 <= speed <= _FASTEST:
        raise BadInput("--speed", f"found {speed:g}", f"a number from 0 to {_FASTEST:g}")
    loaded = read_workload(workload)
    names = [canonical(name) for name in policies or [DEFAULT_POLICY]]
    for name in names:
        if names.count(name) > 1:
            raise BadInput("--policy", f"found {name} twice", "each policy once")
    chosen = [spelled_policy(name, name) for name in names]
    for policy in chosen:
        check_suits(policy, str(workload), ept=True)
    prices = load_costs() if costs is None else load_costs(costs, load_costs())
    interrupts.only_note()
    found = []
    with _progress() as progress:
        task = progress.add_task("replay", total=len(loaded.steps) * len(chosen))
        for number, policy in enumerate(chosen):
            replay = Replay(loaded, policy, speed)
            snapshot = _replay(replay, progress, task, number)
            if snapshot is None:
                break
            found.append(replayed(policy.name, replay, snapshot, prices))
    with saying(0):
        if as_json:
            print(json.dumps(document(loaded, found, speed), indent=1))
        elif found:
            console = output_console(_WIDTH, highlight=False)
            console.print(table(loaded, found, console.width, speed))
    raise typer.Exit(interrupts.ended(0, len(chosen) - len(found), len(chosen), "policies"))


def _replay(replay: Replay, progress: Progress, task: object, number: int) -> Snapshot | None:
    def done(steps: int) -> bool:
        progress.update(task, completed=number * len(replay.workload.steps) + steps)  # type: ignore[arg-type]
        return interrupts.came() is not None

    with replay.policy.confined(), replay:
        return replay.run(done)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
