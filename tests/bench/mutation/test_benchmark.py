"""The kill rate as a figure of `python -m bench --only mutation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import _chosen
from bench.benchmark import QUICK, Context
from bench.errors import BenchFailed
from bench.mutation import benchmark
from bench.mutation.generate import Mutant
from bench.mutation.judge import CAUGHT, SURVIVED, Judgement
from bench.toolchain import Toolchain

pytestmark = pytest.mark.slow

SIZES = replace(QUICK, mutants=4)


def judged_as(monkeypatch: pytest.MonkeyPatch, verdicts: Sequence[str]) -> None:
    def judge_all(results: object, chosen: Sequence[Mutant], *_: Any, **__: Any) -> Any:
        assert len(chosen) == len(verdicts)
        return [(one, Judgement(one.name, verdict)) for one, verdict in zip(chosen, verdicts, strict=True)]

    monkeypatch.setattr(benchmark, "judge_all", judge_all)
    monkeypatch.setattr(benchmark, "learn", lambda *_, **__: [])
    monkeypatch.setattr(benchmark, "prepare", lambda: None)


def test_the_figure_is_caught_of_those_that_could_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    judged_as(monkeypatch, [CAUGHT, CAUGHT, CAUGHT, SURVIVED])
    shown: list[str] = []
    context = Context(Toolchain(tmp_path), tmp_path, SIZES, lambda text: None, shown.append)
    (figure,) = benchmark.mutation(context)
    assert (figure.value, figure.reference, figure.met) == (3, 4, False)
    assert figure.what.startswith("4 of ")
    assert "3 caught, 1 survived" in figure.what
    assert "kill rate 75.0 %" in shown[0]


def test_a_suite_that_catches_nothing_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    judged_as(monkeypatch, [SURVIVED] * 4)
    with pytest.raises(BenchFailed, match="no mutant of 4 was caught"):
        list(benchmark.mutation(Context(Toolchain(tmp_path), tmp_path, SIZES, lambda text: None)))


def test_it_is_measured_on_request_only() -> None:
    assert "mutation" not in [one.name for one in _chosen(None)]
    assert [one.name for one in _chosen(["mutation"])] == ["mutation"]
