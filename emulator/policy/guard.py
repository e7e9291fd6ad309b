"""The door between KVM's code and a policy's file: each call of code that a user has written goes through it.

A file may raise what it likes, `SystemExit` and exceptions whose text cannot be made included, and may give
objects whose `repr()` raises.  Whatever it is, one `UserPolicyError` comes out, which names the file, the
line and the method.  What passes is the emulator's own way of unwinding a thread (MachineStopped, an
execution that explore abandons, Ctrl-C), which is told by the frame that raised it: a file that raises
MachineStopped itself is told like any other error.
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
# The names of files that policies were loaded from, as their code objects have them.
_files: set[str] = set()


class UserPolicyError(PolicyError):
    """One line about a user's policy: file, line, method, what was found, what was expected."""


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
    """Call `function`, which runs the user's code.  Raises UserPolicyError for all that goes wrong in it."""
    try:
        return function(*arguments)
    except BaseException as error:
        if _is_ours(error):
            raise
        failure = failed(place, error)
    # Outside of the handler, so that no context leads to objects of the file's.
    raise failure


THE_DOOR: Final = through.__code__


def is_call(frame: FrameType) -> bool:
    """Whether the frame is the door's, or one of a policy's file."""
    return frame.f_code is THE_DOOR or is_users(frame)


def is_users(frame: FrameType) -> bool:
    return frame.f_code.co_filename in _files


def user_code_below() -> bool:
    """Whether the caller was called, however indirectly, by code of a policy's file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_users(frame):
            return True
        frame = frame.f_back
    return False


def register(path: str) -> None:
    """Take code of this file for a user's from now on."""
    _files.add(path)


# --- saying it ----------------------------------------------------------------------------------------------


def told(error: BaseException) -> str:
    """Return the error's class and text in one line, whatever its methods do."""
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
    """Return the one line about an error of the file's."""
    if issubclass(type(error), Overdue):
        return UserPolicyError(place.at(error.line), error.found, error.expected)  # type: ignore[attr-defined]
    return UserPolicyError(place.at(_line(error, place.path)), told(error), place.expected)


class Overdue(UserPolicyError):
    """Raised in the thread of a call that does not return; each time by a class of its own, made by
    `overdue`, because asynchronous exceptions have no arguments."""

    line: int | None = None
    found: str = ""
    expected: str | None = None


def overdue(place: Place, line: int | None, found: str) -> type[Overdue]:
    """Return a class that is complete by itself, should it be raised when the call has just returned."""
    expected = place.expected or "code that ends"
    whole = UserPolicyError(place.at(line), found, expected)

    def begin(self: Overdue) -> None:
        Exception.__init__(self, str(whole))

    def reduce(self: Overdue) -> tuple[object, ...]:
        return whole.__reduce__()

    names = {"line": line, "found": found, "expected": expected, "__init__": begin, "__reduce__": reduce}
    return type("Overdue", (Overdue,), names)


def _is_ours(error: BaseException) -> bool:
    """Whether the emulator raised it to unwind the thread, or to say what is wrong with the file."""
    kind = type(error)
    if issubclass(kind, Exception) and not issubclass(kind, MachineStopped | UserPolicyError):
        return False
    frame = _last_frame(error)
    if issubclass(kind, Overdue) or frame is None or is_users(frame):
        return False
    return str(frame.f_globals.get("__name__")).partition(".")[0] in _OURS


def _trace(error: BaseException) -> TracebackType | None:
    # Not error.__traceback__, which a class may define as it likes.
    trace: TracebackType | None = BaseException.__dict__["__traceback__"].__get__(error)
    return trace


def _last_frame(error: BaseException) -> FrameType | None:
    frame, trace = None, _trace(error)
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
    return frame


def came_through(error: BaseException, path: str) -> bool:
    """Whether code of the file raised the error, or called what did."""
    return _line(error, path) is not None


def _line(error: BaseException, path: str) -> int | None:
    """Return the line of the file that the error came through last."""
    line, trace = None, _trace(error)
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
