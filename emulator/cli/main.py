"""The command line.

Exit status: 0 clean, 1 violations found, 2 bad input or usage (one line on standard error), 3 internal
failure (with traceback), 129, 130 or 143 ended early by SIGHUP, SIGINT or SIGTERM.
"""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emulator import __version__, interrupts
from emulator.cli.blank import refuse_blanks
from emulator.cli.compare import compare
from emulator.cli.drift import DRIFT_EXAMPLES, DRIFT_HELP, drift
from emulator.cli.explain import explain
from emulator.cli.explore import EXPLORE_EXAMPLES, EXPLORE_HELP, explore
from emulator.cli.guide import guide
from emulator.cli.import_ import IMPORT_EXAMPLES, IMPORT_HELP, import_
from emulator.cli.list import app as list_app
from emulator.cli.litmus import EXAMPLES, LITMUS_HELP, litmus
from emulator.cli.man import MAN_EXAMPLES, MAN_HELP, man
from emulator.cli.new import app as new_app
from emulator.cli.options import (
    DurationOption,
    JsonOption,
    KernelOption,
    MetricsOption,
    RunOptions,
    ScenarioArgument,
    duration_of,
    expanded,
)
from emulator.cli.replay import REPLAY_EXAMPLES, REPLAY_HELP, replay
from emulator.cli.schema import schema
from emulator.cli.show import show
from emulator.cli.sweep import merge
from emulator.cli.top import top
from emulator.cli.trace import app as trace_app
from emulator.defaults import DEFAULT_SCENARIO
from emulator.errors import MOST_EXPECTED, BadInput, one_line
from emulator.output import LostOutput, saying, watched

if TYPE_CHECKING:
    from emulator.cli.run import Request

BAD_INPUT = 2
INTERNAL_FAILURE = 3

app = typer.Typer(
    name="flushlab",
    help="Emulates KVM's TLB flushing on real threads: is an elided flush safe, and what does it save?",
    epilog="Exit status: 0 clean, 1 violations found, 2 bad input, 3 internal failure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(compare)
app.command(help=DRIFT_HELP, epilog=DRIFT_EXAMPLES)(drift)
app.command()(explain)
app.command()(guide)
app.command(help=EXPLORE_HELP, epilog=EXPLORE_EXAMPLES)(explore)
app.command("import", help=IMPORT_HELP, epilog=IMPORT_EXAMPLES)(import_)
app.command(help=LITMUS_HELP, epilog=EXAMPLES)(litmus)
app.add_typer(list_app, name="list")
app.command(help=MAN_HELP, epilog=MAN_EXAMPLES)(man)
app.command()(merge)
app.add_typer(new_app, name="new")
app.command(help=REPLAY_HELP, epilog=REPLAY_EXAMPLES)(replay)
app.command()(schema)
app.command()(show)
app.command()(top)
app.add_typer(trace_app, name="trace")


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"flushlab {__version__}")
        raise typer.Exit


@app.command()
@expanded
def run(
    scenario: ScenarioArgument = DEFAULT_SCENARIO,
    duration: DurationOption = None,
    as_json: JsonOption = False,
    metrics: MetricsOption = None,
    kernel: KernelOption = None,
    *,
    options: RunOptions,
) -> None:
    """Run a scenario under a policy, judge every use of a translation, and add up the costs of flushing."""
    seconds = duration_of(duration)
    request = _request(scenario, options, metrics, duration=seconds, as_json=as_json)
    raise typer.Exit(_status_of(request, kernel))


@app.command()
@expanded
def serve(
    scenario: ScenarioArgument = DEFAULT_SCENARIO,
    metrics: MetricsOption = "9464",
    kernel: KernelOption = None,
    *,
    options: RunOptions,
) -> None:
    """Run a scenario until SIGINT or SIGTERM, with live metrics; then print the summary."""
    raise typer.Exit(_status_of(_request(scenario, options, metrics, endless=True), kernel))


def _status_of(request: Request, kernel: Path | None) -> int:
    """Run the scenario, with the tree's TDP MMU if there is one; return the exit status."""
    if kernel is not None:
        from emulator.cli.kernel import run_on_kernel

        return run_on_kernel(kernel, request)
    from emulator.cli.run import run_request

    return run_request(request)


def _request(
    scenario: str,
    options: RunOptions,
    metrics: str | None,
    *,
    duration: float | None = None,
    endless: bool = False,
    as_json: bool = False,
) -> Request:
    from emulator.cli.run import Request

    return Request(
        scenario=scenario,
        pcpus=options.pcpus,
        ept=options.ept,
        costs=options.costs,
        policy=options.policy,
        settings=tuple(options.settings or ()),
        duration=duration,
        endless=endless,
        seed=options.chosen_seed,
        chaos=options.chaos,
        unbounded=options.unbounded,
        metrics=metrics,
        metrics_per_cpu=options.metrics_per_cpu,
        as_json=as_json,
        log_level=options.log_level.upper(),
        log_format=options.log_form,
        log_file=options.log_file,
        report_dir=options.report_dir,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status; let no exception escape."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The terminal's encoding may lack characters of a file's name.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with interrupts.installed(), watched():
            try:
                return _run(arguments)
            except KeyboardInterrupt:
                return interrupts.status()
    except KeyboardInterrupt:
        return interrupts.status()


@cache
def _command() -> Any:
    """Return the tree of commands.  Building it takes a third of the time of a short command line, and one
    process may run many."""
    command = typer.main.get_command(app)
    refuse_blanks(command)
    return command


def _run(arguments: Sequence[str] | None) -> int:
    try:
        status = _command().main(
            args=None if arguments is None else list(arguments), prog_name="flushlab", standalone_mode=False
        )
        status = status if isinstance(status, int) else 0
        with saying(status):
            return status
    except BadInput as error:
        return _complain(str(error))
    except typer.TyperException as error:
        return _usage(error)
    except typer.Abort:
        return interrupts.status()
    except LostOutput as lost:
        return _lost(lost)
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    """Print an error that is not the input's, in one line if its reason is known, else with a traceback."""
    if isinstance(error, ImportError) and error.name == "native._native":
        print(f"flushlab: {error}", file=sys.stderr)
        return INTERNAL_FAILURE
    from concurrent.futures.process import BrokenProcessPool

    from emulator.scenario.limits import exhausted

    if isinstance(error, BrokenProcessPool):
        found = "a process of --jobs was killed or crashed; this takes less memory with fewer --jobs"
        print(f"flushlab: {found}", file=sys.stderr)
        return INTERNAL_FAILURE
    if (complaint := exhausted(error)) is not None:
        return _complain(str(complaint))
    traceback.print_exception(error)
    return INTERNAL_FAILURE


def _lost(lost: LostOutput) -> int:
    """Return the exit status after standard output has failed: a verdict's own, or else that of bad input.

    A reader that closed the pipe wants no more, so nothing is printed about it.
    """
    if lost.unwanted:
        return lost.status
    bad = _complain(str(lost))
    return lost.status or bad


def _complain(line: str) -> int:
    print(f"flushlab: {line}", file=sys.stderr)
    return BAD_INPUT


def _usage(error: typer.TyperException) -> int:
    from pydantic import BaseModel, ValidationError

    from emulator.validation import first_error

    text = error.format_message()
    context = getattr(error, "ctx", None)
    if text.lstrip().startswith("Usage:"):
        # No command was given: the help is the answer.
        print(text, file=sys.stderr)
        return BAD_INPUT
    path = context.command_path if context is not None else "flushlab"
    parameter = getattr(error, "param", None)
    if parameter is not None and isinstance(error.__cause__, ValidationError):
        # Typer's message leaves out the value that was found.
        found, expected = first_error(error.__cause__, BaseModel)
        text = str(BadInput(parameter.opts[0], found, expected))
    print(f"{path}: {one_line(text, MOST_EXPECTED)}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
