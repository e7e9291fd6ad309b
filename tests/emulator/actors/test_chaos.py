"""Delays at ordering points: the same for the same seed, and as many as asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from emulator.actors.chaos import Chaos


def delays(monkeypatch: pytest.MonkeyPatch, seed: int, cpus: int = 3) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    chaos = Chaos(10, seed, cpus)
    for i in range(1000):
        cpu: Any = SimpleNamespace(id=i % cpus)
        chaos(cpu, "spte", i, "write")
    return slept


def test_the_same_for_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (delays(monkeypatch, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert 50 < len(first) < 200
    assert len(set(first)) == 2, "short delays and long ones"
