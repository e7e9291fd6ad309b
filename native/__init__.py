"""The C core: `ffi`, `lib`, and names derived from the core's own enums."""

from __future__ import annotations

import sys

# `python -m native.build` imports this package before there is anything to import.
if "native.build" not in sys.orig_argv:
    from native._core import (
        COUNTER_NAMES,
        EXIT_REASONS,
        FLUSH_REASONS,
        FLUSH_SCOPES,
        HISTOGRAM_NAMES,
        VIOLATION_KINDS,
        VM_STAT_NAMES,
        enum_names,
        ffi,
        lib,
    )

__all__ = [
    "COUNTER_NAMES",
    "EXIT_REASONS",
    "FLUSH_REASONS",
    "FLUSH_SCOPES",
    "HISTOGRAM_NAMES",
    "VIOLATION_KINDS",
    "VM_STAT_NAMES",
    "enum_names",
    "ffi",
    "lib",
]
