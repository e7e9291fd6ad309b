"""Ends an execution in which patched code computes for ever, and no other thread ever takes a step.

A watching thread compares the execution's length with the processor time of the explored thread.  Wall time
proves nothing, because machines pause.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Final

from emulator.policy.guard import Place, overdue
from emulator.policy.imports import is_patchable
from emulator.policy.patience import thread_state

if TYPE_CHECKING:
    from emulator.explore.machine.control import Control

# Processor seconds of one step, which takes milliseconds.
MOST_SECONDS: Final = 10.0
_ROUND_SECONDS: Final = 0.5


@contextmanager
def steps_that_end(control: Control, patch: str) -> Iterator[None]:
    """Raise UserPolicyError, which names the patch and the line, in this thread if a step does not end."""
    end = threading.Event()
    arguments = (control, patch, threading.get_ident(), threading.get_native_id(), end)
    watch = threading.Thread(target=_watch, args=arguments, name="step watch", daemon=True)
    watch.start()
    try:
        yield
    finally:
        end.set()
        watch.join()


def _watch(control: Control, patch: str, ident: int, number: int, end: threading.Event) -> None:
    known: tuple[object, int] | None = None
    began = 0.0
    while not end.wait(_ROUND_SECONDS):
        execution, state = control.execution, thread_state(number)
        if state is None:
            return
        # Before and after an execution, `init` and `final` run without steps.
        now = (execution, 0 if execution is None else execution.length)
        if known != now:
            known, began = now, state[0]
        elif state[0] - began >= MOST_SECONDS:
            began = state[0]
            frame = _kvms(sys._current_frames().get(ident))
            if frame is not None:
                file = str(frame.f_globals["__name__"]).replace(".", "/")
                label = f"{frame.f_code.co_name}()"
                place = Place(f"{patch}: {file}.py", frame.f_lineno, label, "code that goes on")
                kind = overdue(place, None, f"used {MOST_SECONDS:.0f} s of processor time without a step")
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(kind))


def _kvms(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame of KVM's code, or None."""
    while frame is not None and not is_patchable(str(frame.f_globals.get("__name__"))):
        frame = frame.f_back
    return frame
