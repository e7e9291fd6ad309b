"""Audits that KVM's code announces its accesses to shared state.

Explored code can be preempted before every native call that touches shared state, announced or not; real
threads are delayed (chaos, `stress.delays`) only at named points.  The audit lists the calls that no named
point announces, and the native functions without a footprint, which conflict with everything.

races.py audits the accesses to Python's own objects.
"""

from __future__ import annotations

import sys
from collections import Counter

from emulator.explore.machine.described import QUIET

# Frames from here to the code that makes an access: access(), and the stand-in for the native function.
_DEPTH = 2


class Audit:
    """Accesses of explored code to shared state without a point, counted by place."""

    def __init__(self) -> None:
        self.announced = ""
        self.unannounced: Counter[str] = Counter()
        self.unknown: set[str] = set()

    def access(self, name: str) -> None:
        announced, self.announced = self.announced, ""
        if announced or name in QUIET:
            return
        frame = sys._getframe(_DEPTH)
        module = str(frame.f_globals.get("__name__", "?"))
        if not module.startswith("emulator.kvm."):
            return  # the test's own operations on the host's memory
        self.unannounced[f"{module}.{frame.f_code.co_name}: {name}"] += 1

    def undescribed(self, name: str) -> None:
        self.unknown.add(name)
