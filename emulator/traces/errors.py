"""The one error of this package: bad input, reported in one line."""

from __future__ import annotations

from emulator.errors import BadInput


class TraceError(BadInput):
    """A trace file or recording that cannot be used.  Names the line or field, the value and the
    expectation."""
