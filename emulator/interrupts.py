"""Ends commands by signals: a handler notes SIGINT, SIGTERM or SIGHUP, and the command polls for it.

Python runs a handler between any two bytecodes of the main thread: inside of another handler, while the
thread holds a lock, in the middle of a write.  So a handler here takes no lock, logs nothing and writes
nothing.  It notes the first signal and starts the timer that gives up on a command that does not end.

Until a command calls `only_note`, the first signal also raises Interrupted.  Then the command may have
results to lose: a signal raises nothing, and the command polls `came`, ends its work, and writes its results.
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
# The exit status of a command that a signal ended early is this, as shells have it, and the signal's number.
SIGNALLED: Final = 128
GIVEN_UP: Final = 3
# A command that still runs so many seconds after the first signal hangs: print its stacks, and give up.
GIVE_UP_SECONDS: Final = 20.0
# A further signal so many seconds after the first one ends the process at once: its user waits no longer.
INSIST_SECONDS: Final = 5.0
# Standard error's descriptor, since sys.stderr may be replaced by an object that is no file.
_STDERR: Final = 2


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end.

    It is no plain KeyboardInterrupt, because CPython remembers when one leaves exec() of a string, even if
    it is caught afterwards, and ends the process by SIGINT instead of with its exit status
    (run_eval_code_obj() and Py_RunMain() of 3.11).  Dataclasses run such strings while modules are imported.
    CPython compares the type itself, so a subclass is not remembered.
    """


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
    """Print the stacks of all threads at SIGUSR1.  faulthandler does so without the interpreter."""
    faulthandler.register(signal.SIGUSR1, _STDERR, all_threads=True)


def ignore() -> None:
    """Ignore signals from here on: the exit status is decided, and the process is about to end."""
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


def status() -> int:
    """Return the exit status of a command that a signal has ended early: 130 for SIGINT, 143 for SIGTERM."""
    return SIGNALLED + (_State.number or signal.SIGINT)


def only_note() -> None:
    """Stop raising Interrupted until the end of the command, which polls `came` instead.

    A signal that came earlier and has not raised it yet raises it here.
    """
    if _State.number and not _State.raised and _in_main_thread():
        _State.raised = True
        raise Interrupted
    _State.noting = True


def allow(seconds: float) -> None:
    """Let the command take `seconds` to end after a signal, if that is more than GIVE_UP_SECONDS."""
    _State.patience = max(GIVE_UP_SECONDS, seconds)


def ended(found: int, missing: int, planned: int, of: str = "tests and policies", *, cut: int = 0) -> int:
    """Return the exit status of a command; if a signal ended it early, print how many verdicts are missing.

    `of`: their name.  `cut`: verdicts that the signal has cut short.  `found` is the exit status of the
    verdicts that were reached; it is the command's only if these are all verdicts, and none is cut short.
    Otherwise a search that was stopped would pass for one that has found nothing.
    """
    number = came()
    if number is None or not (missing or cut):
        return found
    short = f", {cut} cut short" if cut else ""
    print(
        f"flushlab: interrupted by {number.name}: {missing} of {planned} {of} not reached{short}",
        file=sys.stderr,
    )
    return status()


@contextmanager
def held() -> Iterator[None]:
    """Delay Interrupted to the end of the block, which must not be left half done."""
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
            raise Interrupted


@contextmanager
def blocked() -> Iterator[None]:
    """Block the signals in the processes that the block starts, which inherit the mask.

    Each of these processes ends when its parent tells it to, or has ended.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _note(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _State.number:
        if now - _State.since >= INSIST_SECONDS:
            os._exit(SIGNALLED + _State.number)
        return
    _State.since, _State.number = now, number
    signal.setitimer(signal.ITIMER_REAL, _State.patience)
    if not (_State.noting or _State.held):
        _State.raised = True
        raise Interrupted


def _give_up(number: int, frame: FrameType | None) -> None:
    which = signal.Signals(_State.number or number).name
    text = f"flushlab: still running {_State.patience:.0f}s after {which}; stacks follow\n"
    os.write(_STDERR, text.encode())
    faulthandler.dump_traceback(_STDERR, all_threads=True)
    # Threads inside native calls cannot be ended in any other way.
    os._exit(GIVEN_UP)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
