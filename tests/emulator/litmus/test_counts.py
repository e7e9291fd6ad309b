"""Each shipped test makes as many requests, flushes, kicks, exits and faults as it did before.

The verdicts do not tell a flush too many, nor one too few that another flush hides.  The counts are those of
one execution under Linux 7.3, in which each thread runs until it waits.  After a change that is meant, write
them anew: `FLUSHLAB_RECORD=1 pytest tests/emulator/litmus/test_counts.py`, and read the difference.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench.mutation.counts import STEPS, counts_of, differences
from emulator.litmus.loader import shipped_tests
from emulator.litmus.policies import named_policy, suits
from emulator.policy import DEFAULT

pytestmark = pytest.mark.slow

COUNTS = Path(__file__).with_name("counts.json")


def found() -> dict[str, dict[str, int]]:
    counted = {}
    for test in shipped_tests():
        if suits(test, DEFAULT):
            counts = counts_of(test, named_policy(DEFAULT))
            counted[test.name] = {name: n for name, n in counts.items() if n and name != STEPS}
    return counted


def test_counts_are_as_recorded() -> None:
    now = found()
    if "FLUSHLAB_RECORD" in os.environ:
        lines = ",\n".join(
            f" {json.dumps(name)}: {json.dumps(counts)}" for name, counts in sorted(now.items())
        )
        COUNTS.write_text(f"{{\n{lines}\n}}\n", "utf-8")
    recorded: dict[str, dict[str, int]] = json.loads(COUNTS.read_text("utf-8"))
    assert not recorded.keys() - now.keys(), "tests that are gone"
    assert len(recorded) > len(now) / 2, "most tests have no counts: write them anew"
    changed = {name: differences(recorded[name], now[name]) for name in now.keys() & recorded.keys()}
    assert not {name: change for name, change in changed.items() if change}
