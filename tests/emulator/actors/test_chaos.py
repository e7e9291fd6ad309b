"""Delays at ordering points: the same for the same seed, and as many as asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from emulator.actors.chaos import Chaos
from emulator.errors import BadInput
from emulator.scenario.config import parse_scenario
from emulator.scenario.delays import parse_delay


def delays(monkeypatch: pytest.MonkeyPatch, seed: int, cpus: int = 3) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    chaos = Chaos(10, seed, cpus)
    for i in range(1000):
        cpu: Any = SimpleNamespace(id=i % cpus)
        chaos(cpu, "spte", i, "write")
    return slept


def test_half_of_the_points_that_are_named_delay_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    chaos = Chaos(0, 1, 1, map(parse_delay, ("sptes read 2000", "unsync 300")))
    cpu: Any = SimpleNamespace(id=0)
    counts = []
    for kind, mode in (("sptes", "read"), ("unsync", "write"), ("sptes", "write"), ("spte", "write")):
        slept.clear()
        for i in range(400):
            chaos(cpu, kind, i, mode)  # type: ignore[arg-type]
        counts.append((len(slept), max(slept, default=0)))
    assert [150 < n < 250 for n, _ in counts] == [True, True, False, False]
    assert [n for n, _ in counts[2:]] == [0, 0]
    assert 0.0015 < counts[0][1] <= 0.002
    assert 0.0002 < counts[1][1] <= 0.0003


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sptes read", "POINT [read|write] MICROSECONDS"),
        ("sptes 0", "POINT [read|write] MICROSECONDS"),
        ("sptes 100001", "POINT [read|write] MICROSECONDS"),
        ("nosuchpoint 10", "one of the points call_queue"),
        ("spte read 10", "spte write: that point is never announced as a read"),
    ],
)
def test_a_delay_that_cannot_be_is_one_line(text: str, expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_scenario(f'[machine]\ndelays = ["{text}"]\n[[vm]]\n', "mine", Path())
    line = str(caught.value)
    assert "\n" not in line
    assert "machine.delays" in line
    assert expected in line


def test_a_delay_is_written_as_it_was_read() -> None:
    for text in ("sptes read 2000", "plain store write 5", "unsync 300"):
        assert str(parse_delay(text)) == text


def test_the_same_for_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (delays(monkeypatch, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert 50 < len(first) < 200
    assert len(set(first)) == 2, "short delays and long ones"
