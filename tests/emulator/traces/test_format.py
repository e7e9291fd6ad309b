"""The file format: records are read back as they were written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator import traces
from emulator.output import Unwritable
from emulator.traces import AccessType
from emulator.traces.columns import GROUP_DATA, decode, encode
from emulator.traces.container import build_image, parse_image, write_trace
from emulator.traces.record import USER_END, addresses_of, types_of, well_formed

from .build import loop_trace, metadata_of, records_of

# Addresses close to each other make loops, blocks and streams; far ones make differences that wrap.
ADDRESSES = st.one_of(
    st.integers(0x401000, 0x401030), st.integers(0x7F0000, 0x7F0100), st.integers(0, USER_END - 1)
)
ACCESSES = st.lists(st.tuples(st.sampled_from(AccessType), ADDRESSES), min_size=1, max_size=300)


@pytest.mark.slow
@settings(deadline=None)  # machines pause
@given(ACCESSES)
def test_columns_round_trip(accesses: list[tuple[AccessType, int]]) -> None:
    records = records_of(*accesses)
    assert np.array_equal(decode(encode(records), records.size), records)


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(AccessType), ADDRESSES), min_size=1, max_size=40))
def test_file_round_trip(accesses: list[tuple[AccessType, int]]) -> None:
    records = records_of(*accesses)
    trace = parse_image(build_image(records, metadata_of(records)), "image")
    assert np.array_equal(trace.records, records)
    assert trace.metadata == metadata_of(records)
    assert trace.pages.tolist() == sorted({address >> 12 for _, address in accesses})


def test_repetition_across_blocks_round_trips() -> None:
    records = np.concatenate([loop_trace(), loop_trace(3)[:7], loop_trace(80)])
    assert np.array_equal(decode(encode(records), records.size), records)


@pytest.mark.parametrize("length", [1, GROUP_DATA - 1, GROUP_DATA, GROUP_DATA + 1, 5 * GROUP_DATA])
@pytest.mark.parametrize("fetch", [False, True])
def test_long_runs_of_data(length: int, fetch: bool) -> None:
    data = [(AccessType(i % 2), 0x5000 + 64 * i) for i in range(length)]
    records = records_of(*([(AccessType.EXECUTE, 0x401000)] if fetch else []), *data, *data)
    assert np.array_equal(decode(encode(records), records.size), records)


def test_record_layout() -> None:
    records = records_of((AccessType.READ, 0x1234), (AccessType.WRITE, USER_END - 1), (AccessType.EXECUTE, 1))
    assert records.tolist() == [0x1234, 1 << 62 | 0x7FFF_FFFF_FFFF, 2 << 62 | 1]
    assert types_of(records).tolist() == [0, 1, 2]
    assert addresses_of(records).tolist() == [0x1234, 0x7FFF_FFFF_FFFF, 1]


@pytest.mark.parametrize("record", [3 << 62, 1 << 47, 1 << 48, 1 << 61, (1 << 64) - 1])
def test_malformed_records_are_not_written(record: int) -> None:
    records = np.array([0x1000, record], dtype=np.uint64)
    assert not well_formed(records)
    with pytest.raises(ValueError, match="malformed"):
        build_image(records, metadata_of(loop_trace()))


def test_loaded_from_a_file_by_path(tmp_path: Path) -> None:
    records = loop_trace()
    path = tmp_path / "loop.fltrace"
    size = write_trace(path, records, metadata_of(records, "loop"))
    trace = traces.load(path)
    assert path.stat().st_size == size
    assert list(tmp_path.iterdir()) == [path]
    assert trace.name == "loop"
    assert np.array_equal(trace.records, records)
    assert np.array_equal(traces.load(str(path)).records, records)
    assert traces.info(path).metadata == trace.metadata
    assert traces.info(path).size == size


def test_loaded_arrays_are_read_only() -> None:
    records = loop_trace()
    trace = parse_image(build_image(records, metadata_of(records)), "image")
    for array in (trace.records, trace.pages):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    records = loop_trace()
    with pytest.raises(Unwritable, match="No such file or directory; expected a"):
        write_trace(tmp_path / "missing" / "a.fltrace", records, metadata_of(records))
