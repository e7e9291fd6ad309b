"""The .fltrace file: header, metadata, compressed columns.

    offset  size  field (little endian)
    0       8     magic: 89 'FLTRACE'; the first byte is not ASCII, so that text-mode damage shows
    8       2     format version
    10      2     zero
    12      4     length of the metadata
    16      8     length of the payload
    24      16    BLAKE2b-128 of the header up to here, the metadata and the payload
    40            metadata: JSON, validated (`FileMetadata`)
                  payload: the columns of `columns.Columns` in order, each an .xz stream

Length and digest are checked before anything is decompressed, and a column's size before it is allocated.
"""

from __future__ import annotations

import hashlib
import lzma
import struct
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emulator.output import write_file
from emulator.traces.columns import COLUMN_NAMES, Columns, ColumnsError, decode, encode
from emulator.traces.errors import TraceError
from emulator.traces.model import Trace, TraceMetadata
from emulator.traces.record import MAX_RECORDS, AccessType, Records, distinct_pages, types_of, well_formed
from emulator.validation import read_bytes

MAGIC: Final = b"\x89FLTRACE"
VERSION: Final = 1
PREFIX: Final = struct.Struct("<8sHHIQ")
DIGEST_SIZE: Final = 16
# Most bytes of a file: MAX_RECORDS at the most bits per record that any program has needed.
MOST_BYTES: Final = 1 << 30
HEADER_SIZE: Final = PREFIX.size + DIGEST_SIZE
DTYPES: Final[dict[str, str]] = {
    "symbol_address": "<u8",
    "symbol_shape": "<u2",
    "block_length": "<u4",
    "block_symbol": "<u4",
    "path": "<u4",
    "data": "<u8",
}


class ColumnEntry(BaseModel):
    """One column of the payload."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    items: Annotated[int, Field(ge=0, le=MAX_RECORDS)]
    stored: Annotated[int, Field(ge=0)]


class FileMetadata(BaseModel):
    """The JSON part of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    trace: TraceMetadata
    columns: list[ColumnEntry]


def write_trace(path: Path, records: Records, metadata: TraceMetadata) -> int:
    """Write the file in one step, so that a reader sees the old one or the new one; return its size."""
    image = build_image(records, metadata)
    write_file("", path, image)
    return len(image)


def build_image(records: Records, metadata: TraceMetadata) -> bytes:
    """Return the bytes of a trace file."""
    if not well_formed(records) or records.size != metadata.accesses:
        raise ValueError("records are malformed or differ in number from their metadata")
    columns = encode(records)
    stored = [_compress(getattr(columns, name), DTYPES[name]) for name in COLUMN_NAMES]
    entries = [
        ColumnEntry(name=name, items=getattr(columns, name).size, stored=len(data))
        for name, data in zip(COLUMN_NAMES, stored, strict=True)
    ]
    text = FileMetadata(trace=metadata, columns=entries).model_dump_json().encode()
    return seal(text, b"".join(stored))


def seal(metadata: bytes, payload: bytes) -> bytes:
    """Put the header in front of metadata and payload."""
    prefix = PREFIX.pack(MAGIC, VERSION, 0, len(metadata), len(payload))
    return prefix + _digest(prefix, metadata, payload) + metadata + payload


def parse_image(image: bytes, where: str) -> Trace:
    """Return the trace in the bytes of a file; `where` names the file in errors."""
    file, payload = _open_image(image, where)
    metadata = file.trace
    _check_entries(file, len(payload), where)
    arrays: dict[str, npt.NDArray[Any]] = {}
    offset = 0
    for entry in file.columns:
        arrays[entry.name] = _decompress(payload[offset : offset + entry.stored], entry, where)
        offset += entry.stored
    try:
        records = decode(Columns(**arrays), metadata.accesses)
    except ColumnsError as error:
        raise TraceError(where, f"inconsistent columns ({error})", "columns written by flushlab") from None
    return _finish(records, metadata, where)


def parse_metadata(image: bytes, where: str) -> TraceMetadata:
    """Return only the metadata, with the whole file's checksum verified."""
    return _open_image(image, where)[0].trace


def read_image(path: Path) -> bytes:
    """Return the bytes of a trace file on disk."""
    return read_bytes(path, "a trace written by 'flushlab trace convert'", MOST_BYTES, TraceError)


def _digest(prefix: bytes, *parts: bytes) -> bytes:
    state = hashlib.blake2b(prefix, digest_size=DIGEST_SIZE)
    for part in parts:
        state.update(part)
    return state.digest()


def _open_image(image: bytes, where: str) -> tuple[FileMetadata, bytes]:
    """Check header and checksum; return metadata and payload."""
    if image[: len(MAGIC)] != MAGIC[: len(image)] or not image:
        found = "an empty file" if not image else f"not a trace (starts with {image[:8].hex(' ')})"
        raise TraceError(where, found, f"the magic {MAGIC.hex(' ')}; make one with 'flushlab trace convert'")
    if len(image) < HEADER_SIZE:
        raise TraceError(where, f"truncated ({len(image)} bytes)", f"a header of {HEADER_SIZE} bytes")
    _, version, reserved, text_size, payload_size = PREFIX.unpack_from(image)
    if version != VERSION:
        raise TraceError(where, f"trace format version {version}", f"version {VERSION}")
    expected = HEADER_SIZE + text_size + payload_size
    if len(image) != expected:
        word = "truncated" if len(image) < expected else "too long"
        raise TraceError(where, f"{word} ({len(image)} bytes)", f"{expected} bytes as its header says")
    stored = image[PREFIX.size : HEADER_SIZE]
    text, payload = image[HEADER_SIZE : HEADER_SIZE + text_size], image[HEADER_SIZE + text_size :]
    actual = _digest(image[: PREFIX.size], text, payload)
    if stored != actual or reserved:
        raise TraceError(where, f"corrupt (checksum {actual.hex()})", f"checksum {stored.hex()}")
    try:
        return FileMetadata.model_validate_json(text), payload
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise TraceError(where, f"metadata field {place}: {first['msg']}", "valid trace metadata") from None


def _check_entries(file: FileMetadata, payload_size: int, where: str) -> None:
    names = tuple(entry.name for entry in file.columns)
    if names != COLUMN_NAMES:
        raise TraceError(where, f"columns {', '.join(names) or 'none'}", f"columns {', '.join(COLUMN_NAMES)}")
    stored = sum(entry.stored for entry in file.columns)
    if stored != payload_size:
        raise TraceError(where, f"a payload of {payload_size} bytes", f"its columns' sum, {stored}")
    # No column is longer than the trace: every symbol, block and path step stands for a record at least.
    for entry in file.columns:
        if entry.items > file.trace.accesses:
            raise TraceError(
                where,
                f"column {entry.name} of {entry.items} items",
                f"at most {file.trace.accesses}, the number of accesses",
            )


def _filters(width: int, size: int) -> list[dict[str, Any]]:
    """Return LZMA filters tuned to aligned items (position bits tell the bytes of an item apart), with a
    dictionary no larger than needed."""
    bits = width.bit_length() - 1
    preset = 9 | lzma.PRESET_EXTREME
    window = min(max(size, 4096), 64 << 20)
    return [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": window, "lc": 0, "lp": bits, "pb": bits}]


def _compress(column: npt.NDArray[Any], dtype: str) -> bytes:
    data = column.astype(dtype).tobytes()
    filters = _filters(np.dtype(dtype).itemsize, len(data))
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=filters)


def _decompress(data: bytes, entry: ColumnEntry, where: str) -> npt.NDArray[Any]:
    dtype = np.dtype(DTYPES[entry.name])
    size = entry.items * dtype.itemsize
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        raw = decompressor.decompress(data, max_length=size + 1)
        if len(raw) == size and not decompressor.eof:
            raw += decompressor.decompress(b"", max_length=1)
    except (lzma.LZMAError, EOFError) as error:
        raise TraceError(where, f"column {entry.name} ({error})", "an .xz stream") from None
    if len(raw) != size or not decompressor.eof or decompressor.unused_data:
        raise TraceError(where, f"column {entry.name} holds other than {size} bytes", f"{entry.items} items")
    return np.frombuffer(raw, dtype=dtype).astype(dtype.newbyteorder("="), copy=False)


def _finish(records: Records, metadata: TraceMetadata, where: str) -> Trace:
    """Check the decoded records against the metadata, and return the trace."""
    if not well_formed(records):
        raise TraceError(where, "a record outside user space or of unknown type", "addresses below 2^47")
    counts = np.bincount(types_of(records), minlength=len(AccessType))
    pages = distinct_pages(records)
    found = (int(counts[0]), int(counts[1]), int(counts[2]), pages.size)
    expected = (metadata.reads, metadata.writes, metadata.executes, metadata.distinct_pages)
    if found != expected:
        raise TraceError(where, f"reads, writes, executes, pages {found}", f"{expected} as its metadata says")
    records.setflags(write=False)
    pages.setflags(write=False)
    return Trace(metadata.name, records, pages, metadata)
