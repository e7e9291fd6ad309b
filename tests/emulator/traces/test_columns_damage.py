"""Columns that fit their checksum but not each other are refused before anything large is allocated."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.traces.columns import COLUMN_NAMES, NO_FETCH, ColumnsError, decode, encode

from .build import loop_trace

RECORDS = loop_trace()


def changed(name: str, values: list[int]) -> Any:
    columns = encode(RECORDS)
    return dataclasses.replace(columns, **{name: np.array(values, dtype=getattr(columns, name).dtype)})


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("symbol_address", [0x401000], "symbol addresses for 3 shapes"),
        ("symbol_address", [0x401000, 4, 1 << 63], "instruction address"),
        ("symbol_shape", [0x900, 0, 0], "group shape"),
        ("symbol_shape", [0x102, 0, 0], "group shape"),
        ("symbol_shape", [NO_FETCH, 0, 0], "group shape"),
        ("symbol_shape", [0x200, 0x101, 0], "records in the columns"),
        ("block_length", [4], "blocks of 4 groups"),
        ("block_length", [0, 3], "blocks of 3 groups"),
        ("block_symbol", [0, 1, 2], "symbol that does not exist"),
        ("path", [1] * 50, "block that does not exist"),
        ("path", [0] * 51, "records in the columns"),
        ("path", [0] * 5000, "15000 groups for 250 records"),
        ("data", [0] * 99, "99 data addresses for 100"),
        ("data", [1 << 50] * 100, "data address beyond"),
    ],
)
def test_refused(name: str, values: list[int], words: str) -> None:
    with pytest.raises(ColumnsError, match=words):
        decode(changed(name, values), RECORDS.size)


@pytest.mark.slow
@settings(deadline=None)  # machines pause
@given(st.sampled_from(COLUMN_NAMES), st.data())
def test_any_other_values_are_refused_or_decode(name: str, data: st.DataObject) -> None:
    column = getattr(encode(RECORDS), name)
    values = data.draw(
        st.lists(st.integers(0, int(np.iinfo(column.dtype).max)), min_size=column.size, max_size=column.size)
    )
    with contextlib.suppress(ColumnsError):
        assert decode(changed(name, values), RECORDS.size).size == RECORDS.size
