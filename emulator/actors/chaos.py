"""Seeded delays at the ordering points of KVM's code, as if the thread had been preempted there.

The core delays at its own points; these delays widen the windows between two steps of Python.
"""

from __future__ import annotations

import time
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emulator.machine.runtime import Cpu, Mode
    from emulator.points import PointKind

# Most delays are short; some are long enough for a grace period, an invalidation, a round of faults.
_SHORT_SECONDS = 20e-6
_LONG_SECONDS = 500e-6
_LONG_ONE_IN = 8


class Chaos:
    """A hook for `Machine.install`: one point in `one_in` delays its caller."""

    def __init__(self, one_in: int, seed: int, cpus: int) -> None:
        self._one_in = one_in
        # One generator per CPU: threads do not share state, and each CPU's delays are its own sequence.
        self._rng = [Random(f"{seed}/{cpu}") for cpu in range(cpus)]

    def __call__(self, cpu: Cpu, kind: PointKind, obj: object, mode: Mode) -> None:
        rng = self._rng[cpu.id]
        if rng.random() * self._one_in >= 1:
            return
        # This is no wait: a CPU that does not run takes no interrupt.
        time.sleep(_LONG_SECONDS if rng.random() * _LONG_ONE_IN < 1 else _SHORT_SECONDS)
