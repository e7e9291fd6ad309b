"""Pools of processes that end as soon and as quietly as their work allows."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from ctypes import c_byte
from types import FrameType, TracebackType
from typing import Any, Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM)


class ProcessPool(ProcessPoolExecutor):
    """`jobs` processes, each of which calls `begin` first.  Ctrl-C does not reach them: it is for whoever
    waits for their work.  When the pool is left, what has not begun is cancelled, and `ending` is true for
    what has."""

    def __init__(self, jobs: int, begin: Callable[..., None] | None = None, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        # Without a lock, which a process that is killed might hold.
        self._end = context.RawValue("b", 0)
        super().__init__(jobs, context, _begin, (self._end, begin, arguments))

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        # This may start a process, and an interrupt before that is noted would leave one that nobody ends.
        with _undisturbed():
            return super().submit(fn, *args, **kwargs)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.value = 1
        self.shutdown(cancel_futures=True)


def ending() -> bool:
    """Whether this process belongs to a pool whose results nobody waits for any more."""
    return _Here.end is not None and bool(_Here.end.value)


class _Here:
    end: c_byte | None = None


def _begin(end: c_byte, begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    _Here.end = end
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin is not None:
        begin(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait for the end of the block.  Processes that are started in it never see SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals interrupt the main thread only
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    handlers = {number: signal.signal(number, note) for number in _INTERRUPTS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])
