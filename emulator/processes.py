"""Pools of processes that end as soon and as quietly as their work allows."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from ctypes import Array, c_byte, c_char
from types import TracebackType
from typing import Any, Final, NoReturn, ParamSpec, TypeVar

from emulator import interrupts
from emulator.errors import BadInput, bad_input_of

P = ParamSpec("P")
T = TypeVar("T")

# Seconds between two checks for a signal.
_TICK: Final = 0.05
# Bytes of the line that a process may leave when it has to end at once.
_LAST_WORDS: Final = 2000
_BAD_INPUT: Final = 2
# Saved before emulator.policy.forbidden replaces it to keep it from policies.
_exit: Final = os._exit


class ProcessPool(ProcessPoolExecutor):
    """`jobs` processes, each of which calls `begin` first.

    Signals to the process group do not end them: the process that waits for their work decides.  When it is
    interrupted, and when the pool is left, work that has not begun is cancelled, and `ending` is true for
    work that has begun.
    """

    def __init__(self, jobs: int, begin: Callable[..., None] | None = None, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        # Use raw memory without a lock, since a process might be killed while it holds the lock.
        self._end = context.RawValue("b", 0)
        self._words = context.RawArray("c", _LAST_WORDS)
        self._jobs = jobs
        # This starts multiprocessing's own process, which cleans up after the others.
        with interrupts.blocked():
            super().__init__(jobs, context, _begin, (self._end, self._words, begin, arguments))

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        # The first call starts the processes: an exception in between would leave processes that never end.
        with interrupts.held(), interrupts.blocked():
            try:
                return super().submit(fn, *args, **kwargs)
            except BrokenProcessPool:
                raise
            except (OSError, RuntimeError) as error:
                # "can't start new thread" is a RuntimeError.
                found = f"found {self._jobs}, but {getattr(error, 'strerror', None) or error}"
                raise BadInput("--jobs", found, "fewer, or higher limits of processes and memory") from error

    def completed(
        self, futures: Sequence[Future[T]], waiting: Callable[[], None] = lambda: None
    ) -> Iterator[Future[T]]:
        """Yield the futures in the order in which they complete, and call `waiting` every now and then.

        After a signal, work that has not begun is cancelled; work that has begun ends soon, and is yielded.
        """
        pending = set(futures)
        while pending:
            done, pending = wait(pending, _TICK, FIRST_COMPLETED)
            waiting()
            yield from (future for future in done if not future.cancelled())
            self._end_if_interrupted(pending)

    def result(self, future: Future[T]) -> T:
        """Wait for a result and return it.  After a signal the work behind it ends soon."""
        while not wait([future], _TICK).done:
            self._end_if_interrupted(())
        return future.result()

    def _end_if_interrupted(self, pending: set[Future[T]] | tuple[()]) -> None:
        if interrupts.came() and not self._end.value:
            self._end.value = 1
            for future in pending:
                future.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.value = 1
        self.shutdown(cancel_futures=True)
        if kind is not None and issubclass(kind, BrokenProcessPool) and self._words.value:
            raise bad_input_of(self._words.value.decode(errors="replace")) from None


def ending() -> bool:
    """Return whether work should end: a signal came, or this process' pool needs its work no more."""
    return interrupts.came() is not None or (_Here.end is not None and bool(_Here.end.value))


def end_process(line: str) -> NoReturn:
    """End this process at once, because one of its threads cannot be ended in any other way.

    The line is printed, here or by the process that waits for this one's work.  The exit status is that of
    bad input.
    """
    if _Here.words is None:
        print(f"flushlab: {line}", file=sys.stderr, flush=True)
    else:
        _Here.words.value = line.encode()[: _LAST_WORDS - 1]
    _exit(_BAD_INPUT)


class _Here:
    end: c_byte | None = None
    words: Array[c_char] | None = None


def _begin(
    end: c_byte, words: Array[c_char], begin: Callable[..., None] | None, arguments: tuple[Any, ...]
) -> None:
    _Here.end, _Here.words = end, words
    interrupts.dump_stacks_on_request()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threading.Thread(target=_end_on_request, daemon=True).start()
    if begin is not None:
        try:
            begin(*arguments)
        except BadInput as error:
            # Without this line the pool would report only that it is broken.
            end_process(str(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    _exit(1)


def _end_on_request() -> None:
    """Wait for SIGTERM from the parent, and end this process.

    A pool that has lost a process ends the others by SIGTERM.  SIGTERM from another sender is ignored here:
    it is meant for the parent, which then ends the pool.
    """
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    _exit(1)
