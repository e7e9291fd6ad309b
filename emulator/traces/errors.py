"""The one error of this package: bad input, said in one line."""

from __future__ import annotations


class TraceError(Exception):
    """A trace file or recording that cannot be used.

    The message is one line that names the file (and line or field), what was found and what was
    expected; a command prints it as it is and exits with status 2.
    """

    def __init__(self, where: str, found: str, expected: str | None = None) -> None:
        message = f"{where}: {found}" if expected is None else f"{where}: {found}; expected {expected}"
        super().__init__(" ".join(message.splitlines()))
