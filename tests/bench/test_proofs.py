"""The benchmark of proofs counts the searches that are complete, and refuses a violation."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import BENCHMARKS
from bench.benchmark import QUICK, Context
from bench.errors import BenchFailed
from bench.proofs import Searched, figure, proofs, table
from bench.toolchain import Toolchain
from emulator.explore.strategies.search import Found


@pytest.mark.slow
def test_a_small_test_is_proved_and_a_large_one_is_not(tmp_path: Path) -> None:
    shown: list[str] = []
    context = Context(Toolchain(tmp_path), tmp_path, QUICK, lambda _: None, shown.append)
    without, with_states = proofs(context)
    for found, text, states in ((without, shown[0], False), (with_states, shown[1], True)):
        assert (found.value, found.reference) == (1.0, 2.0)
        rows = [line.split() for line in text.splitlines()[1:]]
        assert [row[:2] for row in rows] == [["root-load-preempted", "proved"], ["slot-delete", "open"]]
        assert (rows[1][4] != "0") == states


def test_a_violation_is_no_proof() -> None:
    bad = Found(executions=3, complete=False, schedule=(0,), outcome="use-after-free")
    with pytest.raises(BenchFailed, match="violates some-test"):
        figure([Searched("some-test", bad, 0.1)], "all")
    with pytest.raises(BenchFailed, match="no test is proved"):
        figure([Searched("open", Found(executions=3), 5.0)], "all")


def test_the_table_has_a_row_for_each() -> None:
    rows = table([Searched("one", Found(executions=1234, depth=99, complete=True), 0.5, 7)]).splitlines()
    assert rows[1].split() == ["one", "proved", "1,234", "0", "7", "99", "0.50"]


def test_it_is_measured_on_request_only() -> None:
    assert next(one for one in BENCHMARKS if one.name == "proofs").on_request
