"""Converts a lackey recording to a trace file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from emulator.errors import one_line, shown
from emulator.output import check_file
from emulator.traces.container import write_trace
from emulator.traces.errors import TraceError
from emulator.traces.lackey import LackeyReader, Prelude
from emulator.traces.model import MOST_DESCRIPTION, NAME_PATTERN, Trace, TraceMetadata, Window
from emulator.traces.record import MAX_RECORDS, AccessType, Records, distinct_pages, types_of

RECORD_HINT = "valgrind --tool=lackey --trace-mem=yes --log-fd=9 PROGRAM 9>&1 >/dev/null"

_NAMES = "up to 64 of A-Z a-z 0-9 . _ + - and no leading sign"


@dataclass(frozen=True)
class Cut:
    """The part of a recording that a trace takes, counted in records."""

    skip: int = 0
    limit: int | None = None
    instructions: bool = True

    @property
    def stop(self) -> int | None:
        """Return the first record after the window."""
        return None if self.limit is None else self.skip + self.limit


@dataclass
class _Window:
    """Collects the records of the cut while the recording streams by."""

    cut: Cut
    position: int = 0
    kept: int = 0
    batches: list[Records] = field(default_factory=list)

    def add(self, records: Records) -> None:
        begin = max(self.cut.skip - self.position, 0)
        end = records.size if self.cut.stop is None else max(self.cut.stop - self.position, 0)
        self.position += records.size
        if part := records[begin:end].size:
            self.batches.append(records[begin:end].copy())
            self.kept += part

    @property
    def full(self) -> bool:
        return self.cut.limit is not None and self.kept >= self.cut.limit


def convert(
    stream: BinaryIO,
    where: str,
    output: Path,
    *,
    cut: Cut = Cut(),
    name: str | None = None,
    description: str = "",
    progress: Callable[[int, int, int], None] | None = None,
) -> tuple[Trace, int]:
    """Write the trace of a recording; return it and the file's size.

    Reading stops when the window is full.  `progress` is called with the numbers of bytes read, of records
    seen and of records kept.
    """
    if not output.parent.is_dir():  # fail before minutes of reading, not after
        raise TraceError(str(output), "cannot be written", f"a directory {output.parent}")
    check_file("", output)
    if name is None:
        name = output.name.removesuffix(".fltrace")
        if not re.fullmatch(NAME_PATTERN, name):
            raise TraceError(str(output), f"no name for a trace: {shown(name)}", f"{_NAMES}, or --name")
    trace = read_recording(stream, where, name, cut, description, progress)
    return trace, write_trace(output, trace.records, trace.metadata)


def read_recording(
    stream: BinaryIO,
    where: str,
    name: str,
    cut: Cut = Cut(),
    description: str = "",
    progress: Callable[[int, int, int], None] | None = None,
) -> Trace:
    """Return the trace of a recording, in memory."""
    _check_words(name, description)
    reader = LackeyReader(stream, where, instructions=cut.instructions)
    window = _Window(cut)
    consumed, ended = 0, True
    for batch in reader:
        window.add(batch.records)
        consumed += batch.consumed
        if progress is not None:
            progress(consumed, window.position, window.kept)
        if window.kept > MAX_RECORDS:
            raise TraceError(where, f"more than {MAX_RECORDS} records", "a window of it (--skip, --limit)")
        if window.full:
            ended = False
            break
    if window.kept == 0:
        raise _nothing(where, window, reader.prelude)
    records = np.concatenate(window.batches)
    taken = _window_of(cut, window.position if ended else None)
    metadata = _describe(records, name, description, reader.prelude, taken)
    return Trace(name, records, distinct_pages(records), metadata)


def _check_words(name: str, description: str) -> None:
    """Refuse a name or description that the metadata cannot hold, before minutes of reading."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise TraceError("--name", f"found {shown(name)}", _NAMES)
    if len(description) > MOST_DESCRIPTION:
        found = f"found {len(description)} characters"
        raise TraceError("--description", found, f"at most {MOST_DESCRIPTION}")
    if not description.isprintable():
        raise TraceError("--description", f"found {shown(description)}", "one line of printable characters")


def _nothing(where: str, window: _Window, prelude: Prelude) -> TraceError:
    if window.position:
        return TraceError(where, f"{window.position} records, all skipped", f"more than {window.cut.skip}")
    found = "no accesses after valgrind's own lines" if prelude.seen else "nothing"
    return TraceError(where, found, f"a recording made with: {RECORD_HINT}")


def _window_of(cut: Cut, recording: int | None) -> Window:
    return Window(skipped=cut.skip, limit=cut.limit, recording=recording, instructions=cut.instructions)


def _describe(
    records: Records, name: str, description: str, prelude: Prelude, window: Window
) -> TraceMetadata:
    counts = np.bincount(types_of(records), minlength=len(AccessType))
    command = one_line(without_paths(prelude.command), 4096)
    return TraceMetadata(
        name=name,
        program=command.split(" ", 1)[0][:256] or "unknown",
        command=command,
        description=description,
        valgrind=prelude.valgrind[:64],
        accesses=records.size,
        reads=int(counts[AccessType.READ]),
        writes=int(counts[AccessType.WRITE]),
        executes=int(counts[AccessType.EXECUTE]),
        distinct_pages=distinct_pages(records).size,
        window=window,
    )


def without_paths(command: str) -> str:
    """Return the command line with absolute paths cut to their last part: traces are shared, directories are
    not."""
    return re.sub(r"(?<![\w./-])/(?!dev/)[^\s=:,]*", lambda found: PurePosixPath(found[0]).name, command)
