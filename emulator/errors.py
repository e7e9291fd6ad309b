"""What is said to users whose input cannot be used."""

from __future__ import annotations


class BadInput(Exception):
    """Input that cannot be used: exit status 2 and one line.

    The line names the place (file, key, option), what was found there and what was expected.  Errors of
    other modules that mean the same (a policy's, a trace's) may derive from this class.
    """

    def __init__(self, where: str, found: str, expected: str | None = None) -> None:
        message = f"{where}: {found}" if expected is None else f"{where}: {found}; expected {expected}"
        # Whatever went in, one line comes out.
        super().__init__(" ".join(message.split()))

    def __reduce__(self) -> tuple[object, ...]:
        # Other processes' errors come pickled; the class is made again from its one argument, the line.
        return _again, (type(self), str(self))


def _again(cls: type[BadInput], line: str) -> BadInput:
    error = cls.__new__(cls, line)
    Exception.__init__(error, line)
    return error
