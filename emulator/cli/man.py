"""`flushlab man`: the manual page, in the language of man(7), made from the help of all commands."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any, Final

import typer

from emulator import __version__
from emulator.output import saying

MAN_HELP: Final = "Print the manual page, with all commands and options, in the language of man(7)."
MAN_EXAMPLES: Final = """\
\b
  flushlab man | man -l -
  flushlab man > ~/.local/share/man/man1/flushlab.1
"""
_NAME: Final = "emulates KVM's TLB flushing, judges every use of a translation, and counts the cost"
# Text that roff would take for a request or an escape.
_SPECIAL: Final = str.maketrans({"\\": "\\e", "-": "\\-"})


def man(context: typer.Context) -> None:
    with saying(0):
        sys.stdout.write("".join(f"{line}\n" for line in page(context.find_root().command)))


def page(root: Any) -> Iterator[str]:
    """Yield the lines of the page of a tree of click commands."""
    yield f'.TH FLUSHLAB 1 "" "flushlab {__version__}"'
    yield ".SH NAME"
    yield f"flushlab \\- {_escaped(_NAME)}"
    yield ".SH SYNOPSIS"
    yield ".B flushlab"
    yield r"\fICOMMAND\fR [\fIOPTION\fR]..."
    yield ".SH DESCRIPTION"
    yield from _paragraphs(root.help)
    yield ".SH COMMANDS"
    for path, command in sorted(_commands(root)):
        yield from _command(path, command)
    yield ".SH EXIT STATUS"
    yield from _paragraphs(root.epilog.removeprefix("Exit status: "))
    yield ".SH SEE ALSO"
    yield r"\fBflushlab guide\fR explains how to use flushlab, topic by topic."


def _commands(group: Any, path: str = "flushlab") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _command(path: str, command: Any) -> Iterator[str]:
    context = typer.Context(command, info_name=path)
    usage = " ".join(command.collect_usage_pieces(context))
    yield f".SS {_escaped(f'{path} {usage}')}"
    yield from _paragraphs(command.help or "")
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield from _item(*record)
    if command.epilog:
        yield ".PP"
        yield ".nf"
        yield from (_line(line) for line in command.epilog.replace("\b", "").strip("\n").splitlines())
        yield ".fi"


def _item(term: str, text: str | None) -> Iterator[str]:
    yield ".TP"
    yield f"\\fB{_escaped(term)}\\fR"
    yield _line(" ".join((text or "").split()))


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if number:
            yield ".PP"
        yield _line(" ".join(paragraph.replace("\b", "").split()))


def _escaped(text: str) -> str:
    return text.translate(_SPECIAL)


def _line(text: str) -> str:
    """Return a line of text; escape a dot or an apostrophe at its start, which would begin a roff request."""
    escaped = _escaped(text)
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped
