"""Ends calls of a policy's file that do not return.

A watching thread inspects the stacks of all others a few times a second, so a call itself costs nothing more.
A call is overdue if

* its thread has used more processor time in it than its place allows.  Wall time proves nothing, because
  machines pause; or
* it stays in one sleep, by the kernel's count of context switches, over many looks; or
* it has not returned after ROUNDS looks, in any state.

Then an exception is raised in its thread.  If the call catches even that, or sleeps where no exception
arrives, the process is ended with one line and the status of bad input.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from emulator.policy.guard import THE_DOOR, Place, UserPolicyError, is_call, is_users, overdue
from emulator.processes import end_process

ROUND_SECONDS: Final = 0.2
# Looks at a call that sleeps, and at one that does anything else.
ASLEEP: Final = 15
ROUNDS: Final = 300
# Looks until the exception is raised again in a call that has not ended, and how often it is raised.
_GRACE: Final = 4
_ATTEMPTS: Final = 3
_ENDS: Final = "code that ends"
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class _Call:
    """A call that was running when the watch looked last."""

    frame: FrameType
    cpu_time: float
    switches: int
    rounds: int = 0
    asleep: int = 0
    raised: int = 0
    rest: int = 0
    found: str = ""


class Patience:
    """A watch over the process's threads between `start` and `stop`."""

    def __init__(self) -> None:
        self._calls: dict[int, _Call] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="policy watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(ROUND_SECONDS):
            self.look()

    def look(self) -> None:
        """Look at each thread once."""
        numbers = {thread.ident: thread.native_id for thread in threading.enumerate()}
        before, self._calls = self._calls, {}
        for ident, top in sys._current_frames().items():
            frame = _call_of(top)
            state = None if frame is None else thread_state(numbers.get(ident))
            if frame is None or state is None:
                continue
            call = before.get(ident)
            if call is None or call.frame is not frame:
                self._calls[ident] = _Call(frame, *state)
                continue
            self._calls[ident] = call
            self._consider(ident, call, *state, top)

    def _consider(self, ident: int, call: _Call, cpu_time: float, switches: int, top: FrameType) -> None:
        call.rounds += 1
        call.asleep = call.asleep + 1 if switches == call.switches else 0
        call.switches = switches
        place, used = _place_of(call.frame), cpu_time - call.cpu_time
        if call.raised:
            call.rest -= 1
            if call.rest > 0:
                return
        elif used >= place.seconds:
            call.found = f"used {used:.1f} s of processor time without returning"
        elif call.asleep >= ASLEEP and used < ROUND_SECONDS:
            call.found = "sleeps and does not return"
        elif call.rounds >= ROUNDS:
            call.found = "does not return"
        else:
            return
        kind = overdue(place, _line_of(top, place.path), call.found)
        if call.raised == _ATTEMPTS or (call.raised and call.asleep >= _GRACE):
            end_process(str(kind()))  # type: ignore[call-arg]
        call.raised, call.rest = call.raised + 1, _GRACE
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(kind))


def unreturned() -> UserPolicyError | None:
    """Return the error for a user's call that another thread is in, or None.

    For callers that find that a thread makes no progress.
    """
    for ident, top in sys._current_frames().items():
        frame = None if ident == threading.get_ident() else _call_of(top)
        if frame is not None:
            place = _place_of(frame)
            where = place.at(_line_of(top, place.path))
            return UserPolicyError(where, "does not return", place.expected or _ENDS)
    return None


def _call_of(frame: FrameType | None) -> FrameType | None:
    """Return the outermost frame that the file is responsible for."""
    found = None
    while frame is not None:
        if is_call(frame):
            found = frame
        frame = frame.f_back
    return found


def _place_of(frame: FrameType) -> Place:
    if frame.f_code is THE_DOOR:
        place: Any = frame.f_locals["place"]
        return place  # type: ignore[no-any-return]
    code = frame.f_code
    return Place(code.co_filename, code.co_firstlineno, code.co_qualname)


def _line_of(frame: FrameType | None, path: str) -> int | None:
    """Return the line at which the file is now."""
    while frame is not None:
        if is_users(frame) and frame.f_code.co_filename == path:
            return frame.f_lineno
        frame = frame.f_back
    return None


def thread_state(number: int | None) -> tuple[float, int] | None:
    """Return the processor time and the context switches of a thread; None if it has ended."""
    task = Path(f"/proc/self/task/{number}")
    try:
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
    except (OSError, ValueError):
        return None
    switches = int(status["voluntary_ctxt_switches"]) + int(status["nonvoluntary_ctxt_switches"])
    return (int(fields[11]) + int(fields[12])) / _TICKS, switches
