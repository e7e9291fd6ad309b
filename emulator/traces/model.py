"""A trace in memory, and the metadata in its file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from emulator.traces.record import MAX_RECORDS, Records, distinct_pages

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$"

MOST_DESCRIPTION = 1024

Count = Annotated[int, Field(ge=0, le=1 << 62)]


class Window(BaseModel):
    """The part of the recording that the trace holds, in records (after modifies and straddles were
    split)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    skipped: Count
    limit: Annotated[int, Field(ge=1)] | None
    # Records of the whole recording, when the converter saw its end.
    recording: Count | None
    instructions: bool

    def describe(self) -> str:
        """Return the cut in words."""
        kinds = "" if self.instructions else ", data accesses only"
        if self.skipped == 0 and self.recording is not None and self.limit is None:
            return f"whole recording{kinds}"
        of = "" if self.recording is None else f" of {self.recording:,}"
        length = "the rest" if self.limit is None else f"at most {self.limit:,} records"
        return f"{length}{of} after the first {self.skipped:,}{kinds}"


class TraceMetadata(BaseModel):
    """The origin and the content of a trace.  Validated whenever a file is read."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    program: Annotated[str, Field(max_length=256)]
    command: Annotated[str, Field(max_length=4096)]
    description: Annotated[str, Field(max_length=MOST_DESCRIPTION)] = ""
    valgrind: Annotated[str, Field(max_length=64)]
    accesses: Annotated[int, Field(ge=1, le=MAX_RECORDS)]
    reads: Count
    writes: Count
    executes: Count
    distinct_pages: Annotated[int, Field(ge=1)]
    window: Window

    @model_validator(mode="after")
    def _types_add_up(self) -> Self:
        if self.reads + self.writes + self.executes != self.accesses:
            raise ValueError("reads + writes + executes differ from accesses")
        if self.distinct_pages > self.accesses:
            raise ValueError("more distinct_pages than accesses")
        return self


@dataclass(frozen=True, eq=False)
class Trace:
    """A decoded trace. `records` and `pages` are read-only: every pCPU that runs the trace shares them."""

    name: str
    records: Records
    pages: npt.NDArray[np.uint64]
    metadata: TraceMetadata

    def first(self, records: int) -> Trace:
        """Return a trace of the first records only, and of the pages in them."""
        some = self.records[:records]
        return replace(self, records=some, pages=distinct_pages(some))


@dataclass(frozen=True)
class TraceInfo:
    """A trace file's facts that are known without decoding it."""

    name: str
    size: int
    metadata: TraceMetadata
