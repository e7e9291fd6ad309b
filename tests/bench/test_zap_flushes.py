from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.benchmark import QUICK, Context
from bench.toolchain import Toolchain
from bench.zap import SHORT, WHOLE, ZAPS, Cost, predicted, zap_flushes, zap_machine
from emulator.policy import Policy


def test_predicted() -> None:
    assert [predicted(zap, 513, 0) for zap in ZAPS] == [1, 1, 514]
    assert [predicted(zap, 511, 7) for zap in ZAPS] == [8, 8, 519]
    assert WHOLE.removed(512) == 513
    assert SHORT.removed(512) == 511


@pytest.mark.parametrize(("zap", "flushes"), list(zip(ZAPS, (1, 1, 6), strict=True)))
def test_counts(zap: str, flushes: int) -> None:
    cost = Cost()
    with zap_machine(Policy("test", zap_scope="leafs-and-tables", zap=zap), 4, contended=False) as machine:
        for _ in range(3):
            machine.zap(WHOLE.pages, cost)
    assert cost.flushes == [flushes] * 3
    assert cost.yields == [0] * 3
    assert all(time > 0 for time in cost.milliseconds)


@pytest.mark.slow
def test_contention_makes_zaps_yield() -> None:
    """Two hundred tables one by one, while another CPU wants the lock all the time."""
    cost = Cost()
    policy = Policy("test", zap_scope="leafs-and-tables", zap="flush-per-table")
    with zap_machine(policy, 200, contended=True) as machine:
        for _ in range(3):
            machine.zap(SHORT.pages, cost)
    assert max(cost.yields) > 0
    assert all(200 < flushes <= 200 + 1 + n for flushes, n in zip(cost.flushes, cost.yields, strict=True))
    assert max(cost.lock_waits) > 0


@pytest.mark.slow
def test_figures(tmp_path: Path) -> None:
    sizes = replace(QUICK, repeats=1)
    context = Context(Toolchain(tmp_path), tmp_path, sizes, lambda text: None)
    figures = list(zap_flushes(context))
    counts = [figure for figure in figures if figure.name.startswith("flushes: ")]
    assert len(counts) == 2 * (3 + 3 + 1)
    assert sum("a root with 1 GiB" in figure.name for figure in figures) == 4
    assert all(figure.met for figure in counts)
