"""`flushlab top`: a running service, live."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live

from emulator import interrupts
from emulator.cli.options import duration_of
from emulator.errors import BadInput
from emulator.output import saying

if TYPE_CHECKING:
    from emulator.top.sample import Sample

_TICK = 0.05


def top(
    address: Annotated[
        str,
        typer.Argument(metavar="[[HOST:]PORT]", help="The service's address, as serve's --metrics has it."),
    ] = "9464",
    interval: Annotated[
        str, typer.Option(metavar="TIME", help="Time between two looks, such as 500ms or 2s.")
    ] = "1s",
    once: Annotated[bool, typer.Option("--once", help="Print the rates of one interval, and end.")] = False,
) -> None:
    """Watch a service that `flushlab serve` runs: flushes per VM and pCPU, IPIs, pauses, violations.

    On a terminal it goes on until Ctrl-C; in a pipe or a file it prints one interval.
    """
    from emulator.top.sample import Interval, NoService, scrape
    from emulator.top.view import View
    from metrics import parse_address

    try:
        host, port = parse_address(address)
    except ValueError as error:
        raise BadInput("ADDRESS", f"found {address!r}", str(error)) from None
    seconds = duration_of(interval, "--interval") or 1.0
    try:
        before = scrape(host, port)
    except NoService as error:
        expected = "the address of a running flushlab serve --metrics"
        raise BadInput(f"ADDRESS {host}:{port}", str(error), expected) from None
    console, view = Console(highlight=False), View()
    interrupts.only_note()
    if once or not console.is_terminal:
        _wait(seconds)
        now = _again(host, port)
        with saying(0):
            console.print(view.draw(Interval(before, now)))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while interrupts.came() is None:
            _wait(seconds)
            try:
                now = scrape(host, port)
            except NoService as error:
                live.update(f"{host}:{port}: {error}; still trying (Ctrl-C ends)", refresh=True)
                continue
            live.update(view.draw(Interval(before, now), lines=console.height), refresh=True)
            before = now


def _again(host: str, port: int) -> Sample:
    from emulator.top.sample import NoService, scrape

    try:
        return scrape(host, port)
    except NoService as error:
        raise BadInput(f"ADDRESS {host}:{port}", str(error), "a service that answers twice") from None


def _wait(seconds: float) -> None:
    """Sleep, until a signal at most."""
    until = time.monotonic() + seconds
    while interrupts.came() is None and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _TICK))
