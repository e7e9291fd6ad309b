"""Differences between a tree and its preset that are known and have no effect, each with the reason.

They are counted and not reported.  A preset without an entry agrees with its kernel in every event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from emulator.kernel_tree.sides import Event, Kind, Outcome


@dataclass(frozen=True, slots=True)
class Argued:
    """A difference of one event.  same: whether the tree's event (second) may stand for the model's
    (first)."""

    text: str
    same: Callable[[Event, Event], bool]


def _wider_range(ours: Event, theirs: Event) -> bool:
    """Return whether the tree flushes all that the model flushes, and more."""
    if not ours.kind is theirs.kind is Kind.FLUSH_RANGE:
        return False
    covers = theirs.a <= ours.a and ours.a + ours.b <= theirs.a + theirs.b
    return covers and replace(theirs, a=ours.a, b=ours.b) == ours


ARGUED: Final[dict[str, tuple[Argued, ...]]] = {
    "linux-6.1": (
        Argued(
            "a huge leaf over a table flushes the range of the whole table that has the leaf (before 6.2); "
            "without Hyper-V every range is the whole VM",
            _wider_range,
        ),
    ),
}


def without_argued(policy: str, ours: Outcome, theirs: Outcome) -> tuple[Outcome, list[str]]:
    """Return the tree's outcome with the model's events in place of those that may stand for them, and the
    reasons."""
    known = ARGUED.get(policy, ())
    if not known or len(ours.events) != len(theirs.events):
        return theirs, []
    events, reasons = [], []
    for our, their in zip(ours.events, theirs.events, strict=True):
        found = next((one for one in known if our != their and one.same(our, their)), None)
        events.append(their if found is None else our)
        reasons += [] if found is None else [found.text]
    return replace(theirs, events=tuple(events)), reasons
