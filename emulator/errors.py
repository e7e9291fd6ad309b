"""Errors in users' input, reported in one line of bounded length whatever the input contains."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from datetime import date, time
from typing import Final

# Characters of a line at most, by part: a file's path, a value or a parser's complaint, a list of names.
MOST_WHERE: Final = 300
MOST_FOUND: Final = 300
MOST_EXPECTED: Final = 2500
MOST_SHOWN: Final = 80


class BadInput(Exception):
    """Input that cannot be used: exit status 2 and one line.

    The line names the place (file, key, option), the value found there and the values expected.  Errors of
    other modules about bad input (a policy, a trace) derive from this class.
    """

    def __init__(self, where: str, found: str, expected: str | None = None) -> None:
        message = f"{one_line(where, MOST_WHERE)}: {one_line(found, MOST_FOUND)}"
        if expected is not None:
            message += f"; expected {one_line(expected, MOST_EXPECTED)}"
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors of other processes arrive pickled.  Build them again from the complete line.
        return _again, (type(self), str(self))


def bad_input_of(line: str) -> BadInput:
    """Return an error with a line that is complete already."""
    return _again(BadInput, line)


def _again(cls: type[BadInput], line: str) -> BadInput:
    error = cls.__new__(cls, line)
    Exception.__init__(error, line)
    return error


def one_line(text: str, most: int) -> str:
    """Return the text without line breaks, control characters and lone surrogates, its middle left out if it
    is longer than `most`."""
    # Only the ends are shown, so look at twice as many characters as are shown at each end, not at all.
    if len(text) > 4 * most:
        text = text[: 2 * most] + text[-2 * most :]
    text = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)
    return shortened(" ".join(text.split()), most)


def shortened(text: str, most: int) -> str:
    """Return the text, its middle left out if it is longer than `most`."""
    if len(text) <= most:
        return text
    tail = (most - 3) // 3
    return f"{text[: most - 3 - tail]}...{text[len(text) - tail :]}"


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write a number of more than 4300 digits.
        return repr(x) if x.bit_length() <= 128 else f"a number of {x.bit_length()} bits"


_REPR: Final = _Repr()


def shown(value: object) -> str:
    """Return a value's text in errors: its repr(), of bounded length, or a date as TOML writes it."""
    return one_line(str(value) if isinstance(value, date | time) else _REPR.repr(value), MOST_SHOWN)


# --- names that might have been meant ----------------------------------------------------------------------


def one_of(found: str, names: Iterable[str], more: str = "") -> str:
    """Return the expectation in place of a name that does not exist: the known names, `more` (other values
    that are accepted), and the name that was probably meant."""
    known = list(names)
    return f"one of {', '.join(known)}{more}{did_you_mean(found, known)}"


def did_you_mean(found: str, names: Iterable[str]) -> str:
    """Return " (did you mean NAME?)" if one of the names is close, else nothing."""
    close = closest(found, names)
    return "" if close is None else f" (did you mean {close}?)"


def closest(found: str, names: Iterable[str]) -> str | None:
    """Return the name that was probably meant: the closest one, if it differs by at most one typing error for
    each four letters (one for three to seven letters), or the only name that contains the one found."""
    known = list(names)
    allowed = max(1, len(found) // 4) if len(found) > 2 else 0
    near = {name: _slips(found.lower(), name.lower(), allowed) for name in known}
    best = min(known, key=lambda name: near[name], default=None)
    if best is not None and near[best] <= allowed:
        return best
    containing = [name for name in known if found.lower() in name.lower()] if len(found) > 3 else []
    return containing[0] if len(containing) == 1 else None


def _slips(one: str, other: str, most: int) -> int:
    """Return how many letters are to be added, removed, replaced or swapped with the next one to make `one`
    the other (optimal string alignment), or more than `most`."""
    if abs(len(one) - len(other)) > most:
        return most + 1
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        older, before, row = before, row, [i]
        for j, b in enumerate(other, 1):
            cost = min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return row[-1]
