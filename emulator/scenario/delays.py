"""Delays that a scenario names, at one kind of ordering point: they widen the window behind it."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, PlainSerializer

from emulator.points import POINTS

MOST_MICROSECONDS = 100_000


class Delay(NamedTuple):
    """A delay of at most so many microseconds, at points of one kind that announce this access ("": any)."""

    point: str
    mode: str
    microseconds: int

    def __str__(self) -> str:
        return " ".join(filter(None, (self.point, self.mode, str(self.microseconds))))


def parse_delay(text: object) -> Delay:
    """Return the delay in "sptes read 2000" or "smp_mb 300".

    >>> parse_delay("sptes read 2000")
    Delay(point='sptes', mode='read', microseconds=2000)
    """
    if isinstance(text, Delay):
        return text
    # Some kinds have names of two words.
    point, _, digits = str(text).rpartition(" ")
    mode = next((mode for mode in ("read", "write") if point.endswith(f" {mode}")), "")
    point = point.removesuffix(f" {mode}") if mode else point
    if len(digits) > 6 or not digits.isdecimal() or not 0 < int(digits) <= MOST_MICROSECONDS:
        raise ValueError(f'"POINT [read|write] MICROSECONDS", of at most {MOST_MICROSECONDS} microseconds')
    modes = next((modes for kind, modes in POINTS.items() if kind == point), None)
    if modes is None:
        raise ValueError(f"one of the points {', '.join(POINTS)}")
    if mode and mode not in modes:
        raise ValueError(f"{point} {modes[0]}: that point is never announced as a {mode}")
    return Delay(point, mode, int(digits))


NamedDelay = Annotated[Delay, BeforeValidator(parse_delay), PlainSerializer(str)]
