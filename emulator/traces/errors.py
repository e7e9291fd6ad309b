"""The one error of this package: bad input, said in one line."""

from __future__ import annotations

from emulator.errors import BadInput


class TraceError(BadInput):
    """A trace file or recording that cannot be used: which line or field, what was found, and what else."""
