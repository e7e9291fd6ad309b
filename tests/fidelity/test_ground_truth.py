"""Each line of ground_truth.toml, with as many vCPUs as recorded, under each preset that must agree."""

from __future__ import annotations

from typing import Any

import pytest

from .compare import compared
from .driver import find_driver
from .lines import Line, load

pytestmark = pytest.mark.slow

LINES = load()


def _cases() -> list[Any]:
    return [
        pytest.param(line, vcpus, preset, id=f"{line.id}-n{vcpus}-{preset}")
        for line in LINES
        for vcpus in line.vcpus
        for preset in line.presets
    ]


def _scaled() -> list[Any]:
    return [
        pytest.param(line, vcpus, line.presets[0], id=f"{line.id}-n{vcpus}-{line.presets[0]}")
        for line in LINES
        for vcpus in line.scales_to
    ]


@pytest.mark.parametrize(("line", "vcpus", "preset"), _cases())
def test_counts_of_a_real_kvm(line: Line, vcpus: int, preset: str) -> None:
    check(line, vcpus, preset)


@pytest.mark.parametrize(("line", "vcpus", "preset"), _scaled())
def test_counts_are_those_per_vcpu_with_other_numbers_of_them(line: Line, vcpus: int, preset: str) -> None:
    check(line, vcpus, preset)


def check(line: Line, vcpus: int, preset: str) -> None:
    driver = find_driver()
    if driver is None:
        pytest.skip("this emulator has no emulator.job.job to run operations on")
    if missing := line.needs - driver.capabilities:
        pytest.skip(f"not modelled: {', '.join(sorted(missing))}")
    assert compared(driver, line, vcpus, preset) == []
