from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.benchmark import QUICK, Context
from bench.errors import BenchFailed
from bench.reduction import BOUNDS, TESTS, Pair, _figure, reduction
from bench.toolchain import Toolchain
from emulator.explore.strategies.search import Found


@pytest.mark.slow
def test_figures(tmp_path: Path) -> None:
    context = Context(Toolchain(tmp_path), tmp_path, replace(QUICK, executions=60), lambda text: None)
    figures = {figure.name: figure for figure in reduction(context)}
    assert len(figures) == len(TESTS) * len(BOUNDS)
    assert all(figure.ratio >= 1 for figure in figures.values())
    collapse = figures["huge-collapse, up to 1 preemptions"]
    assert collapse.reference_name == "without reduction"
    assert collapse.ratio > 5


def test_outcomes_that_differ_are_no_figure() -> None:
    whole = Found(executions=5, complete=True, outcomes={"": 4, "use-after-free": 1})
    less = Found(executions=2, complete=True, outcomes={"": 2})
    with pytest.raises(BenchFailed, match="outcomes differ"):
        _figure("test", None, Pair(less, whole))
    assert not Pair(less, replace(whole, complete=False)).agree
    assert Pair(whole, replace(less, complete=False)).agree
