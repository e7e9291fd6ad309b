"""The console on which tables are printed."""

from __future__ import annotations

from rich.console import Console


def output_console(width: int, *, highlight: bool = True) -> Console:
    """Return a console on standard output.  Lines are folded to the width of a terminal, or to `width`
    columns in a pipe or file."""
    console = Console(highlight=highlight)
    return console if console.is_terminal else Console(highlight=highlight, width=width)
