"""The bench of a patched run: its patch applies and changes nothing, and runs are paired."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import patched
from bench.__main__ import _chosen
from bench.benchmark import QUICK, Context
from bench.toolchain import Toolchain
from emulator.policy.patch import read_patch


def context(directory: Path, repeats: int) -> Context:
    return Context(Toolchain(directory), directory, replace(QUICK, repeats=repeats), lambda text: None)


def test_figures_are_of_pairs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[tuple[str, bool]] = []

    def run(duration: str, policy: str = "linux-7.3") -> patched.Run:
        with_patch = policy.endswith(".patch")
        ran.append((duration, with_patch))
        return patched.Run(97.0 if with_patch else 100.0, 1250.0 if with_patch else 1000.0)

    monkeypatch.setattr(patched, "_run", run)
    rate, start = patched.patched(context(tmp_path, 3))
    assert (rate.value, rate.reference, rate.met) == (97.0, 100.0, True)
    assert (start.value, start.reference, start.met) == (1250.0, 1300.0, True)
    firsts = [with_patch for _, with_patch in ran[::2]]
    assert firsts == [True, False, True] * 2
    assert len(ran) == 12
    read_patch(str(tmp_path / "nothing.patch")).check()


@pytest.mark.slow
def test_a_patched_run_is_measured() -> None:
    found = patched._run("100ms")
    assert found.rate > 0
    assert found.wall > 100


def test_it_is_measured_on_request_only() -> None:
    assert "patched" not in [one.name for one in _chosen(None)]
