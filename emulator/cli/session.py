"""Runs a job together with its live display, signals and the deadline for stopping.

The job runs on a thread of its own.  The main thread only waits and draws, because Python runs signal
handlers there and a native call in progress would delay them.  Handlers note a signal; `_wait` finds it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Generic, Protocol, TypeVar

from loguru import logger
from rich.console import Console, RenderableType
from rich.live import Live

from emulator import interrupts
from emulator.report.result import Snapshot
from emulator.report.summary import progress_line

_TICK = 0.1
# Seconds for adding up and writing the results, on top of the job's own time to stop.
_SPARE_SECONDS = 15.0


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Runnable(Protocol[T_co]):
    """A job as a session runs it."""

    def run(self, progress: Callable[[Snapshot], None], stop: threading.Event) -> T_co: ...


class Session(Generic[T]):
    """One run.  Call `execute` once, from the main thread.

    `view` draws the live display's line; without it the line is the job's progress.  `stopping`: the seconds
    that the job may need to stop.
    """

    def __init__(
        self,
        job: Runnable[T],
        duration: float | None,
        view: Callable[[], RenderableType] | None = None,
        *,
        stopping: float = 0,
    ) -> None:
        self._stopping = stopping
        self._job = job
        self._view = view or (lambda: progress_line(*self._snapshots, duration))
        self._console = Console(stderr=True)
        self._stop = threading.Event()
        self._snapshots: tuple[Snapshot | None, Snapshot | None] = (None, None)
        self._result: T | None = None
        self._error: BaseException | None = None

    def execute(self) -> T:
        """Run the job to its end, or until a signal requests it; return its result or raise its exception."""
        worker = threading.Thread(target=self._work, name="job", daemon=True)
        interrupts.allow(self._stopping + _SPARE_SECONDS)
        interrupts.only_note()
        with ExitStack() as stack:
            live = stack.enter_context(self._display()) if self._console.is_terminal else None
            worker.start()
            self._wait(worker, live)
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise RuntimeError("the job ended without a result")
        return self._result

    def _work(self) -> None:
        try:
            self._result = self._job.run(self._progress, self._stop)
        except BaseException as error:
            # The main thread re-raises it: nothing may die silently on this thread.
            self._error = error

    def _progress(self, snapshot: Snapshot) -> None:
        self._snapshots = (self._snapshots[1], snapshot)

    def _wait(self, worker: threading.Thread, live: Live | None) -> None:
        while worker.is_alive():
            worker.join(_TICK)
            if live is not None:
                live.update(self._view())
            signal = interrupts.came()
            if signal is not None and not self._stop.is_set():
                self._stop.set()
                logger.info("stopping", signal=signal.name)

    def _display(self) -> Live:
        return Live(console=self._console, refresh_per_second=5, transient=True, redirect_stdout=False)
