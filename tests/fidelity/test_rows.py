"""Each operation that was recorded without EPT is compared by one line, or left out for a reason."""

from __future__ import annotations

import pytest

from .lines import Recorded
from .rows import FIXTURE, Row, numbers, rows

ROWS = rows()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.scenario}-{row.number}")
def test_it_is_compared_or_left_out_for_a_reason(row: Row) -> None:
    assert bool(row.lines) != bool(row.left_out), f"{row}\nadd a line, or left_out to {FIXTURE.name}"
    assert len(row.lines) <= 1, f"two lines expect counts of one operation: {row}"


def test_the_list_is_complete() -> None:
    scenarios = {row.scenario: 0 for row in ROWS}
    for row in ROWS:
        scenarios[row.scenario] += 1
    assert len(scenarios) == 15
    assert scenarios["cr_toggle.v2"] == 9
    assert scenarios["nvmx_shadow_l1_ept0.v1"] == 32
    assert len(ROWS) == sum(scenarios.values()) > 170


def test_operations_are_numbered_as_the_lines_write_them() -> None:
    assert numbers(Recorded(2, "svm", "s", "0,3-5,7-11:2")) == [0, 3, 4, 5, 7, 9, 11]
