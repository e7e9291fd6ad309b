"""Seeded delays at the ordering points of KVM's code, as if the thread had been preempted there.

The core delays at its own points; these delays widen the windows between two steps of Python.
"""

from __future__ import annotations

import time
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from emulator.machine.runtime import Cpu, Mode
    from emulator.points import PointKind
    from emulator.scenario.delays import Delay

# Most delays are short; some are long enough for a grace period, an invalidation, a round of faults.
_SHORT_SECONDS = 20e-6
_LONG_SECONDS = 500e-6
_LONG_ONE_IN = 8


# The part of the points with a delay of their own that do delay their callers.
_NAMED_PART = 0.5


class Chaos:
    """A hook for `Machine.install`: one point in `one_in` delays its caller (0: none), and half of those that
    `delays` names."""

    def __init__(self, one_in: int, seed: int, cpus: int, delays: Iterable[Delay] = ()) -> None:
        self._one_in = one_in
        self._named = {(delay.point, delay.mode): delay.microseconds * 1e-6 for delay in delays}
        # One generator per CPU: threads do not share state, and each CPU's delays are its own sequence.
        self._rng = [Random(f"{seed}/{cpu}") for cpu in range(cpus)]

    def __call__(self, cpu: Cpu, kind: PointKind, obj: object, mode: Mode) -> None:
        rng = self._rng[cpu.id]
        if self._named:
            most = self._named.get((kind, mode)) or self._named.get((kind, ""))
            if most is not None and rng.random() < _NAMED_PART:
                time.sleep(rng.random() * most)
                return
        if not self._one_in or rng.random() * self._one_in >= 1:
            return
        # This is no wait: a CPU that does not run takes no interrupt.
        time.sleep(_LONG_SECONDS if rng.random() * _LONG_ONE_IN < 1 else _SHORT_SECONDS)
