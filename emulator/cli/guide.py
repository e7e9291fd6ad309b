"""`flushlab guide`: the pages of the guide, in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from emulator.cli.completion import topics

# Longer lines are hard to read.
_WIDEST = 100


def guide(
    topic: Annotated[
        str | None,
        typer.Argument(help="The topic to explain. Default: list the topics.", autocompletion=topics),
    ] = None,
) -> None:
    """Explain how to use flushlab, and how it works, topic by topic.

    In a pipe or a file the page is Markdown.
    """
    from emulator.guide import TOPICS, page, title

    if topic is None:
        for name in TOPICS:
            print(f"flushlab guide {name:<14} {title(name)}")
        return
    text = page(topic)
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    console.print(Markdown(text), width=min(console.width, _WIDEST))
