"""Reuse distances against the definition, computed plainly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.traces import AccessType
from emulator.traces.reuse import COLD, page_reuse, reuse_distances

from .build import records_of


def plainly(pages: list[int]) -> list[int]:
    last: dict[int, int] = {}
    distances = []
    for i, page in enumerate(pages):
        distances.append(len(set(pages[last[page] + 1 : i])) if page in last else COLD)
        last[page] = i
    return distances


@settings(deadline=None)  # machines pause
@given(st.lists(st.integers(0, 12), max_size=120))
def test_distances(pages: list[int]) -> None:
    assert reuse_distances(np.array(pages, dtype=np.uint64)).tolist() == plainly(pages)


@pytest.mark.parametrize(
    ("pages", "rounds", "expected"),
    [
        (1, 10, (0.9, 0.0, 0.0, 1)),
        (64, 10, (0.9, 0.0, 0.0, 64)),
        (65, 10, (0.0, 0.9, 0.0, 65)),
        (1536, 4, (0.0, 0.75, 0.0, 1536)),
        (1537, 4, (0.0, 0.0, 0.75, 1537)),
    ],
)
def test_profile_of_a_cyclic_walk(pages: int, rounds: int, expected: tuple[float, float, float, int]) -> None:
    records = records_of(*((AccessType.READ, 4096 * page) for _ in range(rounds) for page in range(pages)))
    reuse = page_reuse(records)
    assert (reuse.within_l1, reuse.within_l2, reuse.beyond_l2, reuse.working_set) == pytest.approx(expected)
    assert reuse.cold == pytest.approx(1 / rounds)


def test_profile_of_one_access() -> None:
    reuse = page_reuse(records_of((AccessType.WRITE, 0x5123)))
    assert (reuse.cold, reuse.within_l1, reuse.working_set) == (1.0, 0.0, 0)
