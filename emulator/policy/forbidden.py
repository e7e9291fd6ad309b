"""Functions that a policy's file cannot call: they end the process, start others, or change how it ends.

Only the emulator gives verdicts, and so the exit status.  Threads and processes of a policy's own would
outlive its answers, and answers that depend on them prove nothing.  Python's audit events report calls of
most of these functions; a function without an event is replaced by one that checks its caller.  Modules that
a file imports may register exit functions and the like: such calls are refused only if the file itself makes
them.  Calls that end or start a process or a thread are refused however indirectly the file makes them.
"""

from __future__ import annotations

import _thread
import atexit
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from emulator.policy.guard import is_written_by_user, user_code_below

# By audit event, the words for the file's act.
_EVENTS: Final = {
    "_thread.start_joinable_thread": "starts a thread",
    "_thread.start_new_thread": "starts a thread",
    "os.exec": "starts a program",
    "os.fork": "starts a process",
    "os.forkpty": "starts a process",
    "os.kill": "sends a signal",
    "os.killpg": "sends a signal",
    "os.posix_spawn": "starts a process",
    "os.spawn": "starts a process",
    "os.system": "starts a process",
    "pty.spawn": "starts a process",
    "signal.pthread_kill": "sends a signal",
    "subprocess.Popen": "starts a process",
    "sys.setprofile": "traces the emulator",
    "sys.settrace": "traces the emulator",
}
# Functions without an event in some version of Python.  True: refused however indirectly the file calls them.
_FUNCTIONS: Final[tuple[tuple[ModuleType, str, bool], ...]] = (
    (os, "_exit", True),
    (os, "abort", True),
    (os, "dup2", False),
    (os, "close", False),
    (os, "closerange", False),
    (os, "chdir", False),
    (_thread, "interrupt_main", True),
    (_thread, "start_new", True),
    (_thread, "start_new_thread", True),
    (_thread, "start_joinable_thread", True),
    (threading, "_start_new_thread", True),
    (threading, "_start_joinable_thread", True),
    (atexit, "register", False),
    (atexit, "unregister", False),
    (atexit, "_clear", False),
    (signal, "alarm", False),
    (signal, "pthread_sigmask", False),
    (signal, "raise_signal", True),
    (signal, "setitimer", False),
    (signal, "signal", False),
    (sys, "addaudithook", False),
    (sys, "setrecursionlimit", False),
    (sys, "setswitchinterval", False),
)


class Forbidden(RuntimeError):
    """The error raised in the file, at the line of the forbidden call."""


class _Installed:
    done = False


def forbid() -> None:
    """Refuse these calls for the rest of the process's life: a file may keep functions that it obtained."""
    if _Installed.done:
        return
    _Installed.done = True
    for module, name, indirectly in _FUNCTIONS:
        if not hasattr(module, name):
            continue
        setattr(module, name, _refusing(module, name, indirectly))
    sys.addaudithook(_heard)


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _EVENTS and user_code_below():
        raise Forbidden(f"a policy that {_EVENTS[event]} ({event})")


def _refusing(module: ModuleType, name: str, indirectly: bool) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(module, name)

    @functools.wraps(function)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        if user_code_below() if indirectly else is_written_by_user(sys._getframe(1)):
            raise Forbidden(f"a policy that calls {module.__name__}.{name}()")
        return function(*args, **kwargs)

    return refusing
