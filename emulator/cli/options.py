"""Options that several commands share: each is declared once, as a field of a dataclass.

    @app.command()
    @expanded
    def run(as_json: JsonOption = False, *, options: RunOptions) -> None:

has the fields of RunOptions as options of the command line, after its own.
"""

from __future__ import annotations

import functools
import inspect
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from emulator.cli.completion import policies, scenarios, tests
from emulator.defaults import MAX_PCPUS
from emulator.errors import BadInput

if TYPE_CHECKING:
    from emulator.log import LogFormat


def refuse(context: typer.Context, names: Collection[str], found: str, expected: str) -> None:
    """Raise BadInput for the first of these parameters that was given on the command line.

    It would have no effect; `found` is the reason.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            name = parameter.opts[0]
            raise BadInput(name if name.startswith("-") else name.upper(), f"found {found}", expected)


MAX_JOBS = 64

FilesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILES]",
        help="Shipped tests by name, .toml files, or directories of them. Default: all shipped tests.",
        autocompletion=tests,
    ),
]
JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs", min=1, max=MAX_JOBS, help="The number of processes. Default: the number of cores."
    ),
]


KernelOption = Annotated[
    Path | None,
    typer.Option(
        "--kernel",
        metavar="TREE",
        help="A Linux source tree, 6.1 or newer: its own TDP MMU (tdp_mmu.c, tdp_iter.c, spte.c) is "
        "compiled and takes the place of the model's. Needs gcc. See `flushlab guide kernel`.",
    ),
]
KtapOption = Annotated[
    bool, typer.Option("--ktap", help="Print the verdicts as KTAP, as the kernel's tests do.")
]
JunitOption = Annotated[
    Path | None,
    typer.Option("--junit", metavar="FILE", help="Write the verdicts as JUnit XML as well, for CI systems."),
]


class GeometryChoice(StrEnum):
    DEFAULT = "default"
    UNBOUNDED = "unbounded"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormatChoice(StrEnum):
    TEXT = "text"
    JSON = "json"


ScenarioArgument = Annotated[
    str,
    typer.Argument(
        metavar="[SCENARIO]",
        envvar="FLUSHLAB_SCENARIO",
        help="An embedded scenario by name, or a .toml file.",
        autocompletion=scenarios,
    ),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="P",
        envvar="FLUSHLAB_POLICY",
        help="The policy: a preset, mutant:NAME, FILE.py or IDEA.patch. See `flushlab list policies`.",
        autocompletion=policies,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="POINT=ALTERNATIVE",
        envvar="FLUSHLAB_SET",
        help="Answer one decision point differently. May be repeated. See `flushlab list points`.",
    ),
]
PcpusOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_PCPUS,
        metavar="N",
        envvar="FLUSHLAB_PCPUS",
        help="Scale the scenario and its VMs to this number of pCPUs.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2**63 - 1,
        envvar="FLUSHLAB_SEED",
        help="Seed of all random choices. Default: a random one.",
    ),
]
DurationOption = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        envvar="FLUSHLAB_DURATION",
        help="How long to run, such as 30s, 5m or 1h. Default: as the scenario says.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the summary.")]
MetricsOption = Annotated[
    str | None,
    typer.Option(
        metavar="[HOST:]PORT",
        envvar="FLUSHLAB_METRICS",
        help="Serve Prometheus metrics at this address. Without HOST, on loopback only.",
    ),
]
PerCpuOption = Annotated[
    bool,
    typer.Option(
        "--metrics-per-cpu",
        envvar="FLUSHLAB_METRICS_PER_CPU",
        help="Add metrics of each of the first 64 pCPUs.",
    ),
]
ChaosOption = Annotated[
    int,
    typer.Option(
        min=0,
        max=2**32 - 1,
        metavar="N",
        envvar="FLUSHLAB_CHAOS",
        help="Delay a thread at one in N ordering points, at random. 0: no delays.",
    ),
]
GeometryOption = Annotated[
    GeometryChoice,
    typer.Option(
        envvar="FLUSHLAB_GEOMETRY",
        help="Size of the TLBs. unbounded: TLBs never evict, so stale entries stay until a flush.",
    ),
]
EptOption = Annotated[
    bool | None,
    typer.Option(
        "--ept/--no-ept",
        envvar="FLUSHLAB_EPT",
        help="Whether the host has EPT. Without it KVM shadows the guests' page tables. Default: as the "
        "scenario says.",
    ),
]
CostsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Your own cycles of single events, in place of those in the table of costs "
        "(emulator/costs.toml).",
    ),
]
LogLevelOption = Annotated[
    LogLevel, typer.Option(envvar="FLUSHLAB_LOG_LEVEL", help="Log messages of this level and above.")
]
LogFormatOption = Annotated[
    LogFormatChoice,
    typer.Option(envvar="FLUSHLAB_LOG_FORMAT", help="Format of log lines. json: one JSON object per line."),
]
LogFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="FLUSHLAB_LOG_FILE",
        help="Append log lines to this file, which may be rotated meanwhile. Default: standard error.",
    ),
]
ReportDirOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="FLUSHLAB_REPORT_DIR",
        help="Also write the JSON document and each violation into this directory.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """Options of the machine, its workload and its random choices."""

    pcpus: PcpusOption = None
    seed: SeedOption = None
    chaos: ChaosOption = 0
    geometry: GeometryOption = GeometryChoice.DEFAULT
    ept: EptOption = None
    costs: CostsOption = None

    @property
    def chosen_seed(self) -> int:
        """Return the seed.  Without --seed each call returns a new random one, so call once."""
        return secrets.randbits(32) if self.seed is None else self.seed

    @property
    def unbounded(self) -> bool:
        return self.geometry is GeometryChoice.UNBOUNDED


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(MachineOptions):
    """Options that `run` and `serve` share."""

    policy: PolicyOption = None
    settings: SetOption = None
    metrics_per_cpu: PerCpuOption = False
    log_level: LogLevelOption = LogLevel.INFO
    log_format: LogFormatOption = LogFormatChoice.TEXT
    log_file: LogFileOption = None
    report_dir: ReportDirOption = None

    @property
    def log_form(self) -> LogFormat:
        return "json" if self.log_format is LogFormatChoice.JSON else "text"


def expanded(function: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `options` by the fields of its type, which is one of the dataclasses."""
    signature = inspect.signature(function, eval_str=True)
    kind: Any = signature.parameters["options"].annotation
    own = [p for p in signature.parameters.values() if p.name != "options"]
    hints = get_type_hints(kind, include_extras=True)
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(kind)
    ]

    @functools.wraps(function)
    def command(*args: Any, **given: Any) -> None:
        options = kind(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        function(*args, **given, options=options)

    command.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
    return command


def duration_of(text: str | None, option: str = "--duration") -> float | None:
    """Return the seconds of the option, or None if it is not given."""
    from emulator.scenario.sections import parse_duration

    if text is None:
        return None
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise BadInput(option, f"found {text!r}", str(error)) from None
    if seconds <= 0:
        raise BadInput(option, f"found {text!r}", "more than 0s")
    return seconds
