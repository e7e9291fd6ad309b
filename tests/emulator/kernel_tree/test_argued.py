"""A known difference stands for the model's event only where it has no effect."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emulator.kernel_tree.argued import without_argued
from emulator.kernel_tree.sides import Event, Kind, Outcome

OURS = Event(Kind.FLUSH_RANGE, rcu=True, lock=1, a=0x200, b=0x200, state=(1, 2))
MODEL = Outcome(4, (OURS,), (), 3)


@pytest.mark.parametrize(
    ("theirs", "argued"),
    [
        (replace(OURS, a=0, b=0x40000), True),
        (replace(OURS, a=0x200, b=0x100), False),  # narrower
        (replace(OURS, a=0, b=0x300), False),  # ends too early
        (replace(OURS, a=0, b=0x40000, rcu=False), False),  # too late
        (replace(OURS, a=0, b=0x40000, state=(1, 3)), False),  # of other SPTEs
        (replace(OURS, kind=Kind.FLUSH), False),
    ],
)
def test_a_wider_flush(theirs: Event, argued: bool) -> None:
    tree = replace(MODEL, events=(theirs,))
    found, reasons = without_argued("linux-6.1", MODEL, tree)
    assert (found == MODEL) is argued
    assert bool(reasons) is argued
    # No other preset has the excuse.
    assert without_argued("linux-6.12", MODEL, tree) == (tree, [])
