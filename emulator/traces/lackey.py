"""Reads the text that `valgrind --tool=lackey --trace-mem=yes` prints, streaming.

A line is one access of the traced program (lackey's documentation in lk_main.c):

    I  0401ab70,3      instruction fetch: hexadecimal address, size in bytes
     L 1fff000180,8    load
     S 1fff000748,8    store
     M 04a17de0,4      modify: a load and a store of the same address

Valgrind's own lines start with `==PID==` or `--PID--`; its version and the command are taken from
them. Anything else is an error with its line number: a program's output mixed into the recording must
not pass as accesses that are missing.

Parsing works on chunks of some MiB as arrays, because a recording grows by about two million lines a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from emulator.traces.columns import ranges
from emulator.traces.errors import TraceError
from emulator.traces.record import PAGE_SIZE, USER_END, AccessType, Records, pack

CHUNK: Final = 4 << 20
MAX_LINE: Final = 1 << 16
MAX_DIGITS: Final = 16
EXPECTED: Final = "lines of lackey --trace-mem=yes, such as 'I  04001000,3' or ' L 1ffeffe7e0,8'"

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

_BAD_DIGIT: Final = 255
_HEX = np.full(256, _BAD_DIGIT, dtype=np.uint8)
for _digit, _character in enumerate(b"0123456789abcdef"):
    _HEX[_character] = _digit
_VERSION = re.compile(rb"Using Valgrind-(\S+)")
_COMMAND = re.compile(rb"^==\d+== Command: (.*)$")


@dataclass
class Prelude:
    """Valgrind's version and command, from its own lines ahead of the accesses."""

    valgrind: str = "unknown"
    command: str = ""
    seen: bool = False


@dataclass(frozen=True, eq=False)
class Batch:
    """The records of one chunk and how many bytes of text they took."""

    records: Records
    consumed: int


class LackeyReader:
    """Iterates over the records of one recording. `where` names it in errors."""

    def __init__(self, stream: BinaryIO, where: str, *, instructions: bool = True) -> None:
        self._stream = stream
        self._where = where
        self._instructions = instructions
        self._line = 1
        self.prelude = Prelude()

    def __iter__(self) -> Iterator[Batch]:
        rest = b""
        while chunk := self._stream.read(CHUNK):
            text = rest + chunk
            cut = text.rfind(b"\n") + 1
            rest = text[cut:]
            if len(rest) > MAX_LINE:
                raise self._error(text[cut : cut + 61], text.count(b"\n", 0, cut))
            if cut:
                yield Batch(self._parse(text[:cut]), len(chunk))
        if rest:
            yield Batch(self._parse(rest + b"\n"), 0)

    def _parse(self, text: bytes) -> Records:
        """Return the records of whole lines."""
        buffer: U8 = np.frombuffer(text, dtype=np.uint8)
        ends: I64 = np.flatnonzero(buffer == ord("\n"))
        starts: I64 = np.append(0, ends[:-1] + 1).astype(np.int64)
        lines = np.arange(ends.size, dtype=np.int64)
        first = buffer[starts]
        other = (first != ord("I")) & (first != ord(" "))
        if np.any(other):
            keep = ~other
            for index in np.flatnonzero(other).tolist():
                self._message(text[starts[index] : ends[index]], index)
            starts, ends, lines = starts[keep], ends[keep], lines[keep]
        records = self._accesses(text, buffer, starts, ends, lines)
        self._line += int(text.count(b"\n"))
        return records

    def _message(self, line: bytes, index: int) -> None:
        """Take a line that is not an access: it must be empty, or valgrind's own."""
        if not line:
            return
        if not line.startswith((b"==", b"--")):
            raise self._error(line, index)
        self.prelude.seen = True
        if found := _VERSION.search(line):
            self.prelude.valgrind = found[1].decode("ascii", "replace")
        if found := _COMMAND.match(line):
            self.prelude.command = found[1].decode("utf-8", "replace").strip()

    def _accesses(self, text: bytes, buffer: U8, starts: I64, ends: I64, lines: I64) -> Records:
        if starts.size == 0:
            return np.zeros(0, dtype=np.uint64)
        commas = _last_commas(buffer, ends)
        bad = commas < starts + 4
        # Read bad lines as if they were short; they are reported below, before their records are used.
        commas = np.where(bad, starts + 3, commas)
        letter = np.where(buffer[starts] == ord("I"), buffer[starts], buffer[np.minimum(starts + 1, ends)])
        bad |= ~np.isin(letter, np.frombuffer(b"ILSM", dtype=np.uint8))
        bad |= (buffer[starts] == ord("I")) & (buffer[np.minimum(starts + 1, ends)] != ord(" "))
        bad |= buffer[np.minimum(starts + 2, ends)] != ord(" ")
        address, wrong = _number(buffer, starts + 3, np.minimum(commas, ends), 16)
        size, wrong_size = _number(buffer, commas + 1, ends, 10)
        bad |= wrong | wrong_size | (size == 0) | (size > PAGE_SIZE)
        if np.any(bad):
            first = int(np.flatnonzero(bad)[0])
            raise self._error(text[starts[first] : ends[first]], int(lines[first]))
        # Do not compute address + size, which may exceed 64 bits; a size is a page at most.
        outside = address > np.uint64(USER_END) - size
        if np.any(outside):
            first = int(np.flatnonzero(outside)[0])
            raise TraceError(
                f"{self._where}, line {self._line + int(lines[first])}",
                f"address {int(address[first]):#x}",
                f"a user-space address below {USER_END:#x}",
            )
        if not self._instructions:
            data = letter != ord("I")
            letter, address, size = letter[data], address[data], size[data]
        return expand(letter, address, size)

    def _error(self, line: bytes, index: int) -> TraceError:
        shown = line[:60].decode("ascii", "backslashreplace")
        shown = shown if len(line) <= 60 else shown + "..."
        return TraceError(f"{self._where}, line {self._line + index}", f"found {shown!r}", EXPECTED)


def expand(letter: U8, address: U64, size: U64) -> Records:
    """Return the records of accesses: two for a modify (read and write), one for each page of an access that
    straddles two."""
    modify = letter == ord("M")
    last_page = (address + size - np.uint64(1)) & ~np.uint64(PAGE_SIZE - 1)
    parts = 1 + (last_page > address).astype(np.int64)
    counts = parts * (1 + modify)
    line = np.repeat(np.arange(letter.size, dtype=np.int64), counts)
    slot = ranges(np.zeros_like(counts), counts)
    types = np.full(256, AccessType.READ, dtype=np.uint64)
    types[ord("S")] = AccessType.WRITE
    types[ord("I")] = AccessType.EXECUTE
    second_half = slot >= parts[line]
    kind = np.where(second_half, np.uint64(AccessType.WRITE), types[letter[line]])
    straddled = (slot - np.where(second_half, parts[line], 0)) == 1
    return pack(kind, np.where(straddled, last_page[line], address[line]))


def _last_commas(buffer: U8, ends: I64) -> I64:
    """Return the position of the last comma before each line's end, or -1."""
    commas = np.flatnonzero(buffer == ord(","))
    if commas.size == 0:
        return np.full(ends.size, -1, dtype=np.int64)
    index = np.searchsorted(commas, ends) - 1
    return np.where(index >= 0, commas[np.maximum(index, 0)], -1)


def _number(buffer: U8, starts: I64, ends: I64, base: int) -> tuple[U64, npt.NDArray[np.bool_]]:
    """Return the number in digits of `base` between each start and end, and a mask of lines without one."""
    lengths = ends - starts
    bad = (lengths <= 0) | (lengths > MAX_DIGITS)
    lengths = np.minimum(lengths, MAX_DIGITS)
    value = np.zeros(starts.size, dtype=np.uint64)
    for position in range(int(lengths.max(initial=0))):
        inside = lengths > position
        digit = _HEX[buffer[np.where(inside, starts + position, 0)]]
        bad |= inside & (digit >= base)
        value = np.where(inside, value * np.uint64(base) + digit, value)
    return value, bad
