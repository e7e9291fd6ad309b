"""Print how far a long search is: on a terminal in a line that is updated, else in a line per ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from emulator.explore.strategies.forecast import Stage

# Seconds between two prints: on a terminal, and elsewhere.
MOVING: Final = 0.2
STILL: Final = 10.0
# A line that is as wide as the terminal would wrap.
_COLUMNS: Final = 79
_ERASE: Final = "\r\x1b[K"


class SearchProgress:
    """Counts runs and verdicts, and prints them from time to time.

    It has no thread: the search calls `told` between two runs, or while it waits for other processes.
    """

    def __init__(
        self, planned: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.planned = planned
        self.runs = 0
        self.verdicts = 0
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._moving = self._stream.isatty()
        self._pause = MOVING if self._moving else STILL
        self._started = clock()
        self._due = self._started + self._pause
        self._shown = False
        self._before = 0, 0.0  # runs and seconds at the line before
        self._stage: Callable[[], Stage] | None = None

    def told(self, runs: int, stage: Callable[[], Stage] | None = None) -> None:
        """Count so many further runs, and print a line if it is due.

        stage: returns the present stage of the search, which it takes a while to compute.
        """
        self.runs += runs
        self._stage = stage or self._stage
        now = self._clock()
        if now >= self._due:
            self._due = now + self._pause
            self._print(self._line(now - self._started))

    def reached(self) -> None:
        """Count a verdict, and erase the progress line, because the verdict is printed in its place."""
        self.verdicts += 1
        self._stage = None
        self.erase()

    def erase(self) -> None:
        if self._shown:
            self._write(_ERASE)
            self._shown = False

    def _line(self, seconds: float) -> str:
        n = f"{self.verdicts} of {self.planned} verdicts, " if self.planned > 1 else ""
        # The runs of another process become known with its verdict.
        runs = f"{self.runs:,} executions, " if self.runs else ""
        line = f"explore: {n}{runs}{seconds:.0f} s"[:_COLUMNS]
        rate = f"{(self.runs - self._before[0]) / max(seconds - self._before[1], 1e-9):,.0f}/s"
        self._before = self.runs, seconds
        if self._stage is not None:
            for part in (*self._stage().parts(), rate):
                longer = f"{line}{', ' if ';' in line else '; '}{part}"
                line = longer if len(longer) <= _COLUMNS else line
        return line

    def _print(self, line: str) -> None:
        self._shown = self._moving
        self._write(f"{_ERASE}{line}" if self._moving else f"{line}\n")

    def _write(self, text: str) -> None:
        # If standard error is closed or full, the line is lost, but the search goes on.
        with suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()
