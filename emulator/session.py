"""Runs a job beside the terminal: signals, live display, the deadline for stopping.

The job runs on a thread of its own.  The main thread only waits and draws, because Python runs signal
handlers there and a native call in progress would delay them.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Generic, Protocol, TypeVar

from loguru import logger
from rich.console import Console, RenderableType
from rich.live import Live

from emulator.report import progress_line
from emulator.result import Snapshot

# A machine that still runs this long after it was told to stop hangs: say where, and give up.
GIVE_UP_SECONDS = 20.0
_TICK = 0.1
# The descriptor: whatever stands for sys.stderr just now need not be a file.
_STDERR = 2


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Runnable(Protocol[T_co]):
    """What a session needs of a job."""

    def run(self, progress: Callable[[Snapshot], None], stop: threading.Event) -> T_co: ...


class Session(Generic[T]):
    """One run. Use `execute` once, from the main thread.

    `view` draws the line that is shown meanwhile; without it that is the job's progress.
    """

    def __init__(
        self, job: Runnable[T], duration: float | None, view: Callable[[], RenderableType] | None = None
    ) -> None:
        self._job = job
        self._view = view or (lambda: progress_line(*self._snapshots, duration))
        self._console = Console(stderr=True)
        self._stop = threading.Event()
        self._snapshots: tuple[Snapshot | None, Snapshot | None] = (None, None)
        self._result: T | None = None
        self._error: BaseException | None = None

    def execute(self) -> T:
        """Run the job to its end, or to the first SIGINT or SIGTERM.  Raises what the job raised."""
        worker = threading.Thread(target=self._work, name="job", daemon=True)
        with self._signals(), ExitStack() as stack:
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
        give_up: float | None = None
        while worker.is_alive():
            worker.join(_TICK)
            if live is not None:
                live.update(self._view())
            if self._stop.is_set():
                now = time.monotonic()
                give_up = give_up or now + GIVE_UP_SECONDS
                if now > give_up:
                    self._abandon()

    def _abandon(self) -> None:
        print(
            f"flushlab: still running {GIVE_UP_SECONDS:.0f}s after the stop; stacks follow", file=sys.stderr
        )
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        sys.stderr.flush()
        # Threads inside native calls cannot be ended in any other way.
        os._exit(3)

    def _display(self) -> Live:
        return Live(console=self._console, refresh_per_second=5, transient=True, redirect_stdout=False)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            if self._stop.is_set() and number == signal.SIGINT:
                # Pressed again: the user does not want to wait for the summary.
                os._exit(130)
            self._stop.set()
            logger.info("stopping", signal=signal.Signals(number).name)

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        faulthandler.register(signal.SIGUSR1, _STDERR, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR1)
            for number, handler in previous.items():
                signal.signal(number, handler)
