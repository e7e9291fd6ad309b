"""`flushlab explain`: a violation from a file, or a whole trace, as a diagram."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emulator.errors import BadInput
from emulator.output import write_file

if TYPE_CHECKING:
    from emulator.explain.document import Case


class Format(StrEnum):
    TEXT = "text"
    SVG = "svg"
    JSON = "json"
    PERFETTO = "perfetto"


def explain(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Counterexamples and traces of explore, reports of --report-dir, or documents of --json.",
        ),
    ],
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="Format of the diagram. perfetto: a trace for ui.perfetto.dev and chrome://tracing.",
        ),
    ] = Format.TEXT,
    report: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Draw the N-th violation of the file. Default: the one with the most details.",
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            min=40,
            max=1000,
            metavar="N",
            help="Width of the text in columns. Default: 72 for up to three CPUs, more for more.",
        ),
    ] = None,
    times: Annotated[
        bool, typer.Option("--times", help="Add a column of times, in microseconds before the use.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="PATH", help="Write the diagram into this file instead of printing it."
        ),
    ] = None,
) -> None:
    """Draw the race behind a violation CPU by CPU, as kernel changelogs do."""
    from emulator.explain.diagram import diagram
    from emulator.explain.explanation import as_dict, explain
    from emulator.explain.perfetto import perfetto
    from emulator.explain.svg import svg

    if form is not Format.TEXT and len(files) > 1:
        raise BadInput(f"--format {form}", f"found {len(files)} files", "one")
    cases = [_chosen(file, report) for file in files]
    if form is Format.TEXT:
        text = "\n".join(diagram(explain(case), width, times) for case in cases)
    elif form is Format.SVG:
        text = svg(explain(cases[0]))
    elif form is Format.PERFETTO:
        text = perfetto(cases[0])
    else:
        text = json.dumps(as_dict(explain(cases[0])), indent=1) + "\n"
    if output is None:
        sys.stdout.write(text)
        return
    write_file("--output", output, text)


def _chosen(file: Path, number: int | None) -> Case:
    from emulator.explain.document import Case, load_cases

    cases = load_cases(file)
    if number is None:
        if len(cases) > 1:
            print(f"{file}: {len(cases)} violations with events; --report N chooses", file=sys.stderr)
        # max() returns the first of the cases that show most.
        return max(cases, key=Case.quality)
    if number > len(cases):
        raise BadInput("--report", f"found {number}", f"1 to {len(cases)}, as many as {file} has with events")
    return cases[number - 1]
