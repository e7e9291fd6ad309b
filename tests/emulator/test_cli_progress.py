"""The line that tells how far a search is."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial

import pytest

from emulator.cli import progress as progress_module
from emulator.cli.main import main
from emulator.cli.progress import MOVING, STILL, SearchProgress
from emulator.explore.strategies.forecast import Stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_line_every_ten_seconds_without_a_terminal() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = SearchProgress(3, stream, clock)
    for _ in range(160 + 40):
        clock.now += STILL / 80  # exact in binary
        progress.told(10)
    progress.reached()
    progress.erase()
    assert stream.getvalue().splitlines() == [
        "explore: 0 of 3 verdicts, 800 executions, 10 s",
        "explore: 0 of 3 verdicts, 1,600 executions, 20 s",
    ]


def test_a_line_tells_the_stage_and_what_is_left() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = SearchProgress(3, stream, clock)
    stages = [Stage(2, 900, 0.25), Stage(None, 1000, 1e-9, 1843), Stage(None, 10**9, 0.004)]
    for stage in stages:
        clock.now += STILL
        progress.told(500, partial(replace, stage))
    clock.now += STILL
    progress.told(500)
    progress.reached()
    clock.now += STILL
    progress.told(500)
    assert stream.getvalue().splitlines() == [
        "explore: 0 of 3 verdicts, 500 executions, 10 s; bound 2: 25 %, ~2.7k left, 50/s",
        "explore: 0 of 3 verdicts, 1,000 executions, 20 s; all: below 1 %, 1,843 states",
        "explore: 0 of 3 verdicts, 1,500 executions, 30 s; all: below 1 %, ~249G left",
        "explore: 0 of 3 verdicts, 2,000 executions, 40 s; all: below 1 %, ~249G left",
        "explore: 1 of 3 verdicts, 2,500 executions, 50 s",
    ]


def test_a_stage_is_computed_for_a_line_only() -> None:
    def expensive() -> Stage:
        raise AssertionError

    SearchProgress(1, io.StringIO(), Clock()).told(1, expensive)


def test_a_line_that_moves_on_a_terminal_and_makes_way_for_a_verdict() -> None:
    stream, clock = Terminal(), Clock()
    progress = SearchProgress(1, stream, clock)
    progress.told(1)
    assert stream.getvalue() == ""
    clock.now += MOVING
    progress.told(1)
    assert stream.getvalue() == "\r\x1b[Kexplore: 2 executions, 0 s"
    progress.reached()
    assert stream.getvalue().endswith("\r\x1b[K")
    length = len(stream.getvalue())
    progress.erase()
    assert len(stream.getvalue()) == length


def test_a_line_that_cannot_be_written_is_lost() -> None:
    clock = Clock()
    progress = SearchProgress(1, Full(), clock)
    clock.now += STILL
    progress.told(1)
    assert progress.runs == 1


@pytest.mark.parametrize("planned", [1, 10**9])
def test_a_line_fits_the_terminal(planned: int) -> None:
    stream, clock = io.StringIO(), Clock()
    progress = SearchProgress(planned, stream, clock)
    progress.verdicts = planned
    clock.now = 10.0**9
    progress.told(10**18, lambda: Stage(100, 10**18, 0.5, 10**9))
    assert len(stream.getvalue()) <= 80


@pytest.mark.slow
@pytest.mark.parametrize(("command", "jobs"), [("explore", "1"), ("explore", "2"), ("litmus --explore", "1")])
def test_a_search_tells_how_far_it_is(
    command: str, jobs: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "STILL", 0.0)
    tests = ["root-load-preempted", "huge-collapse"]
    main([*command.split(), *tests, "--policy", "linux-7.3", "--jobs", jobs])
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[0].startswith("explore: 0 of 2 verdicts, ")
    # Two processes may reach their verdicts at once.
    assert jobs == "2" or any(line.startswith("explore: 1 of 2 verdicts, ") for line in lines)
    assert "explore:" not in captured.out
