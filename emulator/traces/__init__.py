"""Memory traces of real programs, which the guests run.

    from emulator import traces
    trace = traces.load("sort")          # an embedded one, or the path of a .fltrace file
    trace.records                        # uint64: type << 62 | linear address, in program order
    trace.pages                          # the sorted distinct 4K page numbers

`flushlab trace convert` makes files from recordings; data/SOURCES.md says how the embedded ones were made.
"""

from __future__ import annotations

from emulator.traces.convert import Cut, convert
from emulator.traces.embedded import embedded, info, load
from emulator.traces.errors import TraceError
from emulator.traces.model import Trace, TraceInfo, TraceMetadata, Window
from emulator.traces.record import AccessType, addresses_of, page_numbers, types_of

__all__ = [
    "AccessType",
    "Cut",
    "Trace",
    "TraceError",
    "TraceInfo",
    "TraceMetadata",
    "Window",
    "addresses_of",
    "convert",
    "embedded",
    "info",
    "load",
    "page_numbers",
    "types_of",
]
