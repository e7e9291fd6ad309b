"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console


def output_console(width: int, *, highlight: bool = True) -> Console:
    """Standard output: folds to a terminal's width; a pipe or file gets lines of up to `width` columns."""
    console = Console(highlight=highlight)
    return console if console.is_terminal else Console(highlight=highlight, width=width)
