"""The door between KVM's code and a policy's file: each call of code that a user has written goes through it.

A file may raise any exception, including `SystemExit` and exceptions with a `str()` that raises, and may
return objects with a `repr()` that raises.  In every case one `UserPolicyError` comes out, which names the
file, the line and the method.  Exceptions by which the emulator unwinds a thread (MachineStopped, an
execution that explore abandons, Ctrl-C) pass.  They are recognized by the frame that raised them: a
MachineStopped that the file raises itself becomes a UserPolicyError, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Final, TypeVar

from emulator.errors import MOST_FOUND, one_line
from emulator.machine.runtime import MachineStopped
from emulator.policy.policy import PolicyError

T = TypeVar("T")

_OURS: Final = ("emulator", "native", "metrics")
# The names of the files from which policies were loaded, as in their code objects.
_files: set[str] = set()
# The names of files of emulator.kvm that a patch changes, likewise.
_patched: set[str] = set()


class UserPolicyError(PolicyError):
    """An error of a user's policy in one line: file, line, method, the finding and the expectation."""


@dataclass(frozen=True, slots=True)
class Place:
    """A piece of a policy's file that is called.  `seconds`: processor time that one call may take."""

    path: str
    line: int = 1
    label: str = ""
    expected: str | None = None
    seconds: float = 2.0

    def at(self, line: int | None = None) -> str:
        where = f"{self.path}:{line or self.line}"
        return f"{where}: {self.label}" if self.label else where


def through(place: Place, function: Callable[..., T], /, *arguments: Any) -> T:
    """Call `function`, which runs the user's code.  Raises UserPolicyError for every error in it."""
    try:
        return function(*arguments)
    except BaseException as error:
        if _is_ours(error):
            raise
        failure = failed(place, error)
    # Outside of the handler, so that the exception's context does not refer to the file's objects.
    raise failure


THE_DOOR: Final = through.__code__


def is_call(frame: FrameType) -> bool:
    """Return whether the frame is the door's, or runs code of a policy's file."""
    return frame.f_code is THE_DOOR or is_users(frame)


def is_users(frame: FrameType) -> bool:
    return frame.f_code.co_filename in _files


def is_written_by_user(frame: FrameType) -> bool:
    """Return whether the frame runs code of a policy's file, or of a file that a patch changes."""
    return is_users(frame) or frame.f_code.co_filename in _patched


def user_code_below() -> bool:
    """Return whether code of a policy's file or patch called the caller, however indirectly."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_written_by_user(frame):
            return True
        frame = frame.f_back
    return False


def register(path: str) -> None:
    """Treat code of this file as a user's from now on."""
    _files.add(path)


def register_patched(filename: str) -> None:
    """Treat code of this file as changed by a user's patch from now on."""
    _patched.add(filename)


# --- saying it ----------------------------------------------------------------------------------------------


def error_text(error: BaseException) -> str:
    """Return the error's class and text in one line, even if its methods raise."""
    name = class_name(type(error))
    text = _text(str, error)
    return f"{name}: {text}" if text else name


def shown(obj: object) -> str:
    """Return the object's repr in one line, or its class if it has none."""
    return _text(repr, obj) or f"an object of class {class_name(type(obj))}"


def class_name(cls: type) -> str:
    """Return the name of a class without asking its metaclass."""
    name: str = type.__dict__["__name__"].__get__(cls)
    return _in_one_line(name)


def exact(text: object) -> str | None:
    """Return a string, or the string that an object of a derived class holds; None for other objects."""
    return str.__str__(text) if issubclass(type(text), str) else None


def _text(how: Callable[[Any], object], obj: object) -> str:
    try:
        text = exact(how(obj))
    except BaseException:
        return ""
    return _in_one_line(text or "")


def _in_one_line(text: str) -> str:
    return one_line(text, MOST_FOUND)


def failed(place: Place, error: BaseException) -> UserPolicyError:
    """Return the UserPolicyError for an error that the file raised."""
    if issubclass(type(error), Overdue):
        return UserPolicyError(place.at(error.line), error.found, error.expected)  # type: ignore[attr-defined]
    return UserPolicyError(place.at(_line(error, place.path)), error_text(error), place.expected)


class Overdue(UserPolicyError):
    """The error raised in the thread of a call that does not return.

    `overdue` derives a class for each such call, because asynchronous exceptions have no arguments.
    """

    line: int | None = None
    found: str = ""
    expected: str | None = None


def overdue(place: Place, line: int | None, found: str) -> type[Overdue]:
    """Return a class that holds the whole report: it may be raised when the call has just returned."""
    expected = place.expected or "code that ends"
    whole = UserPolicyError(place.at(line), found, expected)

    def begin(self: Overdue) -> None:
        Exception.__init__(self, str(whole))

    def reduce(self: Overdue) -> tuple[object, ...]:
        return whole.__reduce__()

    names = {"line": line, "found": found, "expected": expected, "__init__": begin, "__reduce__": reduce}
    return type("Overdue", (Overdue,), names)


def _is_ours(error: BaseException) -> bool:
    """Return whether the emulator raised it, to unwind the thread or to report an error of the file."""
    kind = type(error)
    if issubclass(kind, Exception) and not issubclass(kind, MachineStopped | UserPolicyError):
        return False
    frame = _last_frame(error)
    if issubclass(kind, Overdue) or frame is None or is_users(frame):
        return False
    return str(frame.f_globals.get("__name__")).partition(".")[0] in _OURS


def _trace(error: BaseException) -> TracebackType | None:
    # Not error.__traceback__, which the error's class may override.
    trace: TracebackType | None = BaseException.__dict__["__traceback__"].__get__(error)
    return trace


def _last_frame(error: BaseException) -> FrameType | None:
    frame, trace = None, _trace(error)
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
    return frame


def came_through(error: BaseException, path: str) -> bool:
    """Return whether code of the file raised the error, or called the code that did."""
    return _line(error, path) is not None


def _line(error: BaseException, path: str) -> int | None:
    """Return the line of the file that the error came through last."""
    line, trace = None, _trace(error)
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
