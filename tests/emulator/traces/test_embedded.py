"""The embedded traces: real, whole, small, and of the characters that the main job needs."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import numpy as np
import pytest

from emulator import traces
from emulator.traces import Trace
from emulator.traces.record import PAGE_SHIFT, page_numbers, well_formed
from emulator.traces.reuse import L1_ENTRIES, L2_ENTRIES, PageReuse, page_reuse

BUDGET = 5_000_000
DATA = Path(traces.__file__).with_name("data")
NAMES = [info.name for info in traces.embedded()]
BEYOND_L2 = ["shuf", "sort"]

load = functools.cache(traces.load)


@functools.cache
def reuse_of(name: str) -> PageReuse:
    return page_reuse(load(name).records)


def test_names_and_budget() -> None:
    files = sorted(DATA.glob("*.fltrace"))
    assert [file.name for file in files] == [f"{name}.fltrace" for name in NAMES]
    assert sum(file.stat().st_size for file in files) <= BUDGET
    assert NAMES == ["bunzip2", "cc1", "python", "shuf", "sort"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_metadata_holds(name: str) -> None:
    trace: Trace = load(name)
    meta = trace.metadata
    assert trace.name == meta.name == name
    assert 1_000_000 <= trace.records.size == meta.accesses <= 3_000_000
    assert trace.pages.size == meta.distinct_pages
    assert np.array_equal(trace.pages, np.unique(page_numbers(trace.records)))
    assert trace.records.dtype == trace.pages.dtype == np.uint64
    assert well_formed(trace.records)
    assert min(meta.reads, meta.writes, meta.executes) > 0
    assert meta.valgrind == "3.19.0"
    assert meta.window.skipped > 0, "start-up is no steady state"
    assert meta.description
    assert "/home" not in meta.command
    assert "/usr" not in meta.command
    assert f"`{name}`" in (DATA / "SOURCES.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_decodes_within_a_second_of_cpu(name: str) -> None:
    before = time.process_time()
    traces.load(name)
    assert time.process_time() - before < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fetches_look_like_a_program(name: str) -> None:
    records = load(name).records
    fetches = records[records >> np.uint64(62) == 2] & np.uint64((1 << 48) - 1)
    steps = np.diff(fetches.astype(np.int64))
    assert np.mean((steps > 0) & (steps <= 15)) > 0.6, "most instructions follow the one before"
    assert np.unique(fetches).size < fetches.size / 20, "code runs again and again"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_pages_are_used_again(name: str) -> None:
    assert reuse_of(name).cold < 0.01
    assert reuse_of(name).within_l1 > 0.5


@pytest.mark.slow
def test_characters() -> None:
    for name, misses in (("cc1", 0.005), ("bunzip2", 0.02), ("python", 0.01)):
        assert reuse_of(name).within_l2 > misses, "hits in the second level, as the first is too small"
        assert reuse_of(name).beyond_l2 == 0
        assert L1_ENTRIES < reuse_of(name).working_set < L2_ENTRIES
    code = {
        name: np.unique(load(name).records[load(name).records >> np.uint64(62) == 2]).size for name in NAMES
    }
    assert max(code, key=lambda name: code[name]) == "cc1", "the one with much code"


@pytest.mark.slow
@pytest.mark.parametrize("name", BEYOND_L2)
def test_working_set_beyond_the_second_level(name: str) -> None:
    pages, counts = np.unique(load(name).records >> np.uint64(PAGE_SHIFT), return_counts=True)
    assert pages.size > 3000
    assert np.sum(counts > 1) > 3000, "touched repeatedly"
    assert reuse_of(name).beyond_l2 > 0.0005


@pytest.mark.slow
def test_one_lives_beyond_the_second_level() -> None:
    """Most of its misses are on pages that were there before; played in a loop, its first uses are too."""
    reuse = max((reuse_of(name) for name in BEYOND_L2), key=lambda reuse: reuse.beyond_l2)
    assert reuse.beyond_l2 > 0.002
    assert reuse.beyond_l2 > 1.5 * reuse.cold
