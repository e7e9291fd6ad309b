"""Turns records into columns that compress well, and back.

A program's control flow almost determines the order of its accesses, so the columns store the control flow:

* A *group* is an instruction fetch and the data accesses up to the next one. Its *symbol* is the pair of
  instruction address and *shape* (how many data accesses, which of them write). A loop body has one
  symbol per instruction, however often it runs. Data accesses without a fetch (recordings
  without instructions, leading accesses) form groups of their own, with a symbol that has no address.
* A *block* is a straight-line sequence of groups: it ends where the next fetch is not 1 to 15 bytes further
  on (an x86 instruction is at most 15 bytes long: SDM vol. 2A, section 2.3.11). Each distinct block is
  stored once; the program's path is the column `path` of block numbers.
* Data addresses are sorted by *stream* (symbol and position in its group), stably, and stored as differences:
  an array walk is a constant, and instructions that follow the same pointer have equal difference
  sequences, which the compressor then finds.

Every step is a whole-array numpy operation in both directions except the search for distinct blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from emulator.traces.record import ADDRESS_MASK, AccessType, Records, addresses_of, pack, types_of

GROUP_DATA = 8
MAX_INSTRUCTION = 15
NO_FETCH = 1 << 15

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
_Unsigned = TypeVar("_Unsigned", np.uint32, np.uint64)


@dataclass(frozen=True, eq=False)
class Columns:
    """The stored columns, in file order. All differences are modulo 2^64 and start from zero."""

    symbol_address: U64  # differences of the instruction addresses of the symbols, which are sorted
    symbol_shape: npt.NDArray[np.uint16]  # data count << 8 | bitmap of writes, or NO_FETCH on top
    block_length: npt.NDArray[np.uint32]  # groups in each distinct block
    block_symbol: npt.NDArray[np.uint32]  # differences of the symbols of the distinct blocks
    path: npt.NDArray[np.uint32]  # blocks in the order of execution
    data: U64  # differences of data addresses, sorted by stream


COLUMN_NAMES = tuple(field.name for field in fields(Columns))


class ColumnsError(ValueError):
    """Columns that no encoder writes."""


def encode(records: Records) -> Columns:
    """Return the columns of well-formed records."""
    types, addresses = types_of(records), addresses_of(records)
    starts = _group_starts(types)
    heads = np.where(types[starts] == AccessType.EXECUTE, addresses[starts], np.uint64(0))
    symbols, symbol_address, symbol_shape = _symbols(types, starts, heads)
    block_length, block_symbol, path = _blocks(symbols, heads)
    stream = _streams(symbols, symbol_shape)
    data = addresses[types != AccessType.EXECUTE][np.argsort(stream, kind="stable")]
    return Columns(
        symbol_address=_differences(symbol_address),
        symbol_shape=symbol_shape,
        block_length=block_length.astype(np.uint32),
        block_symbol=_differences(block_symbol.astype(np.uint32)),
        path=path.astype(np.uint32),
        data=_differences(data),
    )


def decode(columns: Columns, accesses: int) -> Records:
    """Return the records of columns; raise ColumnsError if the columns are inconsistent, or do not hold
    `accesses` records."""
    fetches, counts, writes = _check_symbols(columns)
    symbols = _expand_path(columns, accesses)
    sizes = fetches[symbols] + counts[symbols]
    if int(sizes.sum()) != accesses:
        raise ColumnsError(f"{int(sizes.sum())} records in the columns, {accesses} in the metadata")
    starts = np.cumsum(sizes) - sizes
    records = np.empty(accesses, dtype=np.uint64)
    has_fetch = fetches[symbols] == 1
    addresses = np.cumsum(columns.symbol_address, dtype=np.uint64)
    execute = np.full(1, AccessType.EXECUTE, dtype=np.uint64)
    records[starts[has_fetch]] = pack(execute, addresses[symbols[has_fetch]])

    per_group = counts[symbols]
    slots = ranges(np.zeros_like(per_group), per_group)
    if slots.size != columns.data.size:
        raise ColumnsError(f"{columns.data.size} data addresses for {slots.size} data accesses")
    position = ranges(starts + fetches[symbols], per_group)
    kind = (np.repeat(writes[symbols], per_group) >> slots) & 1
    stream = _streams(symbols, columns.symbol_shape)
    data = np.empty(slots.size, dtype=np.uint64)
    data[np.argsort(stream, kind="stable")] = np.cumsum(columns.data, dtype=np.uint64)
    if data.size and int(data.max()) > ADDRESS_MASK:
        raise ColumnsError("a data address beyond 48 bits")
    records[position] = pack(kind.astype(np.uint64), data)
    return records


def ranges(starts: I64, lengths: I64) -> I64:
    """Return start, start + 1, ... of each given length, one range after the other."""
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(starts - offsets, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


def _differences(values: npt.NDArray[_Unsigned]) -> npt.NDArray[_Unsigned]:
    return np.diff(values, prepend=values.dtype.type(0))


def _group_starts(types: npt.NDArray[np.uint8]) -> I64:
    """Return the indices of the records that begin a group: each fetch, and every GROUP_DATA-th data access
    without one."""
    index = np.arange(types.size, dtype=np.int64)
    fetch = types == AccessType.EXECUTE
    last_fetch = np.maximum.accumulate(np.where(fetch, index, -1))
    ordinal = index - last_fetch - 1
    overflow = ~fetch & (ordinal % GROUP_DATA == 0) & ((ordinal > 0) | (last_fetch < 0))
    return np.flatnonzero(fetch | overflow)


def _symbols(
    types: npt.NDArray[np.uint8], starts: I64, heads: U64
) -> tuple[I64, U64, npt.NDArray[np.uint16]]:
    """Return the symbol of each group, and the sorted table of symbols (address, shape)."""
    sizes = np.diff(starts, append=types.size)
    fetch = types[starts] == AccessType.EXECUTE
    index = np.arange(types.size, dtype=np.int64) - np.repeat(starts + fetch, sizes)
    weight = np.where(types == AccessType.WRITE, np.int64(1) << np.maximum(index, 0), 0)
    bitmap = np.add.reduceat(weight, starts) if starts.size else np.zeros(0, dtype=np.int64)
    shape = ((sizes - fetch) << 8) | bitmap | np.where(fetch, 0, NO_FETCH)
    unique_heads, head_index = np.unique(heads, return_inverse=True)
    table, symbols = np.unique((head_index << 16) | shape, return_inverse=True)
    return symbols.astype(np.int64), unique_heads[table >> 16], (table & 0xFFFF).astype(np.uint16)


def _blocks(symbols: I64, heads: U64) -> tuple[I64, I64, I64]:
    """Return lengths and symbols of the distinct blocks in order of first appearance, and the path."""
    # A group without a fetch (head 0) is always a block of its own.
    step = np.diff(heads, prepend=np.uint64(0))
    begin = (step == 0) | (step > MAX_INSTRUCTION) | (heads == 0)
    begin[1:] |= heads[:-1] == 0
    begin[:1] = True
    starts = np.flatnonzero(begin)
    ends = np.append(starts[1:], symbols.size)
    raw, width = symbols.tobytes(), symbols.itemsize
    numbers: dict[bytes, int] = {}
    path = np.empty(starts.size, dtype=np.int64)
    for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        path[i] = numbers.setdefault(raw[start * width : end * width], len(numbers))
    lengths = np.fromiter((len(block) // width for block in numbers), dtype=np.int64, count=len(numbers))
    return lengths, np.frombuffer(b"".join(numbers), dtype=np.int64), path


def _streams(symbols: I64, shapes: npt.NDArray[np.uint16]) -> I64:
    """Return the stream of each data access: its symbol and its position in the group.  Data accesses without
    a fetch share one stream."""
    counts = ((shapes >> 8) & 0x7F).astype(np.int64)[symbols]
    number = np.where(shapes & NO_FETCH, 0, (np.arange(shapes.size, dtype=np.int64) + 1) * GROUP_DATA)
    fetched = ((shapes & NO_FETCH) == 0).astype(np.int64)
    slots = ranges(np.zeros_like(counts), counts)
    streams: I64 = np.repeat(number[symbols], counts) + slots * np.repeat(fetched[symbols], counts)
    return streams


def _check_symbols(columns: Columns) -> tuple[I64, I64, I64]:
    """Return, per symbol, 1 if it has a fetch, its number of data accesses, and its bitmap of writes; raise
    ColumnsError if one is malformed."""
    shapes = columns.symbol_shape.astype(np.int64)
    if shapes.size != columns.symbol_address.size:
        raise ColumnsError(f"{columns.symbol_address.size} symbol addresses for {shapes.size} shapes")
    fetches = np.where(shapes & NO_FETCH, 0, 1)
    counts, writes = (shapes >> 8) & 0x7F, shapes & 0xFF
    if np.any(counts > GROUP_DATA) or np.any(writes >> counts) or np.any(fetches + counts == 0):
        raise ColumnsError("a group shape that no encoder writes")
    addresses = np.cumsum(columns.symbol_address, dtype=np.uint64)
    if addresses.size and int(addresses.max()) > ADDRESS_MASK:
        raise ColumnsError("an instruction address beyond 48 bits")
    return fetches, counts, writes


def _expand_path(columns: Columns, accesses: int) -> I64:
    """Return the symbol of each group in the order of execution."""
    lengths = columns.block_length.astype(np.int64)
    symbols = np.cumsum(columns.block_symbol, dtype=np.uint32).astype(np.int64)
    if int(lengths.sum()) != symbols.size or np.any(lengths == 0):
        raise ColumnsError(f"blocks of {int(lengths.sum())} groups, {symbols.size} stored")
    if symbols.size and int(symbols.max()) >= columns.symbol_shape.size:
        raise ColumnsError("a block with a symbol that does not exist")
    path = columns.path.astype(np.int64)
    if path.size and int(path.max()) >= lengths.size:
        raise ColumnsError("a path through a block that does not exist")
    groups = lengths[path]
    # Each group holds at least one record.  Check that before allocating: a corrupt file must not decide how
    # much memory is allocated.
    if int(groups.sum()) > accesses:
        raise ColumnsError(f"{int(groups.sum())} groups for {accesses} records")
    starts = (np.cumsum(lengths) - lengths)[path]
    return symbols[ranges(starts, groups)]
