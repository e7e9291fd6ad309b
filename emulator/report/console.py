"""The console on which tables and catalogues are printed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

# The columns of a catalogue in a pipe or file, and on a wide terminal.
_PLAIN, _READABLE = 80, 100
_INDENT = 4


def output_console(width: int, *, highlight: bool = True) -> Console:
    """Return a console on standard output.  Lines are folded to the width of a terminal, or to `width`
    columns in a pipe or file."""
    console = Console(highlight=highlight)
    return console if console.is_terminal else Console(highlight=highlight, width=width)


def letter(number: int) -> str:
    """Return the letter that stands for a policy in a table's head: A for 0, Z for 25, then AA."""
    more, last = divmod(number, 26)
    return (letter(more - 1) if more else "") + chr(ord("A") + last)


def print_catalogue(entries: Iterable[tuple[int, str, Iterable[str]]]) -> None:
    """Print entries, each of which is its depth, its name, and sentences that stand indented below it."""
    console = output_console(_PLAIN, highlight=False)
    for depth, name, sentences in entries:
        console.print(Text(_fill(console, name, depth), style="bold"))
        for sentence in sentences:
            console.print(Text(_fill(console, sentence, depth + 1)))


def _fill(console: Console, text: str, depth: int) -> str:
    margin = " " * _INDENT * depth
    wrapper = textwrap.TextWrapper(
        min(console.width, _READABLE),
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapper.fill(" ".join(text.split()))
