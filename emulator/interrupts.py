"""How signals end a command: SIGINT, SIGTERM and SIGHUP are noted, and the command looks.

Python runs a handler between any two bytecodes of the main thread: inside of another handler, while the
thread holds a lock, in the middle of a write.  So a handler here takes no lock, logs nothing and writes
nothing.  It notes the first signal and starts the timer that gives up on a command that does not end.

Until a command has something to lose, a signal also raises KeyboardInterrupt, once.  From `only_note` on it
does not: the command polls `came`, ends its work, and writes what it has.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Exit status of a command that was ended before it had anything to say.
INTERRUPTED: Final = 130
GIVEN_UP: Final = 3
# A command that still runs so long after the first signal hangs: say where, and give up.
GIVE_UP_SECONDS: Final = 20.0
# A further signal so long after the first one is a user who waits no longer.
INSIST_SECONDS: Final = 5.0
# The descriptor: the object that stands for sys.stderr just now need not be a file.
_STDERR: Final = 2


class _State:
    number = 0  # of the first signal; 0: none came
    since = 0.0
    raised = False
    noting = False
    held = 0  # blocks of `held` that the main thread is in
    patience = GIVE_UP_SECONDS


def install() -> None:
    """Take the signals over for good, in the main thread.  SIGHUP stays ignored under nohup."""
    dump_stacks_on_request()
    signal.signal(signal.SIGALRM, _give_up)
    for number in ENDING:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)


def dump_stacks_on_request() -> None:
    """SIGUSR1 prints the stacks of all threads; faulthandler does so without the interpreter."""
    faulthandler.register(signal.SIGUSR1, _STDERR, all_threads=True)


def ignore() -> None:
    """Nothing is left to be done but to end: the exit status stands."""
    for number in (*ENDING, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def installed() -> Iterator[None]:
    """Take the signals over while the block lasts, if `install` has not and this is the main thread."""
    if signal.getsignal(signal.SIGTERM) is _note or not _in_main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (*ENDING, signal.SIGALRM)}
    _State.number, _State.raised, _State.noting, _State.patience = 0, False, False, GIVE_UP_SECONDS
    install()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.number, _State.noting = 0, False


def came() -> signal.Signals | None:
    """Return the first signal that asked the command to end, if any."""
    return signal.Signals(_State.number) if _State.number else None


def only_note() -> None:
    """From here on, to the end of the command, a signal raises nothing: the command polls `came`."""
    if _State.number and not _State.raised and _in_main_thread():
        _State.raised = True
        raise KeyboardInterrupt
    _State.noting = True


def allow(seconds: float) -> None:
    """Give up only so long after a signal, if the command's work takes longer than usual to end."""
    _State.patience = max(GIVE_UP_SECONDS, seconds)


def ended(status: int, missing: int, planned: int) -> int:
    """Say that a signal ended a command with `missing` of the `planned` verdicts not reached.  Returns the
    exit status: that of the verdicts that were reached, if any."""
    number = came()
    if number is None:
        return status
    print(
        f"flushlab: interrupted by {number.name}: {missing} of {planned} tests and policies not reached",
        file=sys.stderr,
    )
    return status if missing < planned else INTERRUPTED


@contextmanager
def held() -> Iterator[None]:
    """Let a signal wait for the end of the block, where nothing may be left half done."""
    if not _in_main_thread():
        yield  # handlers run on the main thread only
        return
    _State.held += 1
    try:
        yield
    finally:
        _State.held -= 1
        if _State.number and not (_State.raised or _State.noting or _State.held):
            _State.raised = True
            raise KeyboardInterrupt


@contextmanager
def blocked() -> Iterator[None]:
    """Keep the signals from the processes that the block starts: they inherit the mask.  Each ends when its
    parent says so, or has ended."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _note(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _State.number:
        if now - _State.since >= INSIST_SECONDS:
            os._exit(INTERRUPTED)
        return
    _State.since, _State.number = now, number
    signal.setitimer(signal.ITIMER_REAL, _State.patience)
    if not (_State.noting or _State.held):
        _State.raised = True
        raise KeyboardInterrupt


def _give_up(number: int, frame: FrameType | None) -> None:
    which = signal.Signals(_State.number or number).name
    text = f"flushlab: still running {_State.patience:.0f}s after {which}; stacks follow\n"
    os.write(_STDERR, text.encode())
    faulthandler.dump_traceback(_STDERR, all_threads=True)
    # Threads inside native calls cannot be ended in any other way.
    os._exit(GIVEN_UP)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
