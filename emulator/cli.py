"""The command line.

Exit status: 0 clean, 1 violations found, 2 bad input or usage (one line on standard error), 3 internal
failure (with traceback).
"""

from __future__ import annotations

import secrets
import sys
import traceback
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, ValidationError

from emulator import __version__
from emulator.cli_list import app as list_app
from emulator.cli_trace import app as trace_app
from emulator.config import DEFAULT_SCENARIO, parse_duration
from emulator.errors import BadInput
from emulator.run import Request, run_request
from emulator.traces import TraceError
from emulator.validation import first_error

BAD_INPUT = 2
INTERNAL_FAILURE = 3

app = typer.Typer(
    name="flushlab",
    help="Emulates KVM's TLB flushing on real threads: is an elided flush safe, and what does it save?",
    epilog="Exit status: 0 clean, 1 violations found, 2 bad input, 3 internal failure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(list_app, name="list")
app.add_typer(trace_app, name="trace")


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


def _duration(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise BadInput("--duration", f"found {text!r}", str(error)) from None
    if seconds <= 0:
        raise BadInput("--duration", f"found {text!r}", "more than 0s")
    return seconds


ScenarioArgument = Annotated[
    str,
    typer.Argument(
        metavar="[SCENARIO]",
        envvar="FLUSHLAB_SCENARIO",
        help="An embedded scenario's name, or a .toml file.",
    ),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="P",
        envvar="FLUSHLAB_POLICY",
        help="A preset or mutant (see `flushlab list policies`), or a file with a policy of your own (.py).",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="POINT=ALTERNATIVE",
        envvar="FLUSHLAB_SET",
        help="Answer one decision point differently; repeatable. See `flushlab list points`.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        min=0, max=2**63 - 1, envvar="FLUSHLAB_SEED", help="Of everything that is drawn; random if not given."
    ),
]
MetricsOption = Annotated[
    str | None,
    typer.Option(
        metavar="[HOST:]PORT",
        envvar="FLUSHLAB_METRICS",
        help="Serve Prometheus metrics here; on loopback unless HOST says otherwise.",
    ),
]
PerCpuOption = Annotated[
    bool,
    typer.Option(
        "--metrics-per-cpu", envvar="FLUSHLAB_METRICS_PER_CPU", help="Add series for the first 64 pCPUs."
    ),
]
ChaosOption = Annotated[
    int,
    typer.Option(
        min=0,
        max=2**32 - 1,
        metavar="N",
        envvar="FLUSHLAB_CHAOS",
        help="Delay one in N points where order matters; 0 never.",
    ),
]
GeometryOption = Annotated[
    GeometryChoice,
    typer.Option(
        envvar="FLUSHLAB_GEOMETRY",
        help="unbounded: TLBs never evict, stale entries live as long as they can.",
    ),
]
LogLevelOption = Annotated[LogLevel, typer.Option(envvar="FLUSHLAB_LOG_LEVEL", help="What is logged.")]
LogFormatOption = Annotated[
    LogFormatChoice, typer.Option(envvar="FLUSHLAB_LOG_FORMAT", help="json: one object a line.")
]
ReportDirOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="FLUSHLAB_REPORT_DIR",
        help="Write the JSON document and each violation into this directory as well.",
    ),
]


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"flushlab {__version__}")
        raise typer.Exit


@app.command()
def run(
    scenario: ScenarioArgument = DEFAULT_SCENARIO,
    policy: PolicyOption = None,
    settings: SetOption = None,
    duration: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            envvar="FLUSHLAB_DURATION",
            help="Such as 30s, 5m, 1h; the scenario's if not given.",
        ),
    ] = None,
    seed: SeedOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of the summary.")
    ] = False,
    metrics: MetricsOption = None,
    metrics_per_cpu: PerCpuOption = False,
    chaos: ChaosOption = 0,
    geometry: GeometryOption = GeometryChoice.DEFAULT,
    log_level: LogLevelOption = LogLevel.INFO,
    log_format: LogFormatOption = LogFormatChoice.TEXT,
    report_dir: ReportDirOption = None,
) -> None:
    """Run a scenario under a policy, judge every use of a translation, and add up what flushing cost."""
    request = Request(
        scenario=scenario,
        policy=policy,
        settings=tuple(settings or ()),
        duration=None if duration is None else _duration(duration),
        seed=_seed(seed),
        chaos=chaos,
        unbounded=geometry is GeometryChoice.UNBOUNDED,
        metrics=metrics,
        metrics_per_cpu=metrics_per_cpu,
        as_json=as_json,
        log_level=log_level.upper(),
        log_format="json" if log_format is LogFormatChoice.JSON else "text",
        report_dir=report_dir,
    )
    raise typer.Exit(run_request(request))


@app.command()
def serve(
    scenario: ScenarioArgument = DEFAULT_SCENARIO,
    policy: PolicyOption = None,
    settings: SetOption = None,
    seed: SeedOption = None,
    metrics: MetricsOption = "9464",
    metrics_per_cpu: PerCpuOption = False,
    chaos: ChaosOption = 0,
    geometry: GeometryOption = GeometryChoice.DEFAULT,
    log_level: LogLevelOption = LogLevel.INFO,
    log_format: LogFormatOption = LogFormatChoice.TEXT,
    report_dir: ReportDirOption = None,
) -> None:
    """Run a scenario until SIGINT or SIGTERM, with live metrics; then print the summary."""
    request = Request(
        scenario=scenario,
        policy=policy,
        settings=tuple(settings or ()),
        duration=None,
        endless=True,
        seed=_seed(seed),
        chaos=chaos,
        unbounded=geometry is GeometryChoice.UNBOUNDED,
        metrics=metrics,
        metrics_per_cpu=metrics_per_cpu,
        as_json=False,
        log_level=log_level.upper(),
        log_format="json" if log_format is LogFormatChoice.JSON else "text",
        report_dir=report_dir,
    )
    raise typer.Exit(run_request(request))


def _seed(seed: int | None) -> int:
    return secrets.randbits(32) if seed is None else seed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status and lets nothing escape."""
    try:
        command = typer.main.get_command(app)
        status = command.main(
            args=None if arguments is None else list(arguments), prog_name="flushlab", standalone_mode=False
        )
    except (BadInput, TraceError) as error:
        return _complain(str(error))
    except typer.TyperException as error:
        return _usage(error)
    except typer.Abort:
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        sys.stdout = None
        return 0
    except Exception:
        traceback.print_exc()
        return INTERNAL_FAILURE
    return status if isinstance(status, int) else 0


def _complain(line: str) -> int:
    print(f"flushlab: {line}", file=sys.stderr)
    return BAD_INPUT


def _usage(error: typer.TyperException) -> int:
    text = error.format_message()
    context = getattr(error, "ctx", None)
    if text.lstrip().startswith("Usage:"):
        # No command was given: the help is the answer.
        print(text, file=sys.stderr)
        return BAD_INPUT
    path = context.command_path if context is not None else "flushlab"
    parameter = getattr(error, "param", None)
    if parameter is not None and isinstance(error.__cause__, ValidationError):
        # Typer leaves out what was found.
        found, expected = first_error(error.__cause__, BaseModel)
        text = str(BadInput(parameter.opts[0], found, expected))
    print(f"{path}: {' '.join(text.split())}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
