"""Is shared state touched only where KVM's code says so?

Explored code is stopped before every native call that others could notice, named or not; real threads linger
(chaos, `stress.delays`) only at named points.  The audit lists the calls that no named point announces, and
native functions whose footprint nobody has described, which conflict with everything.

Python's own objects are watched by shared_state.py.
"""

from __future__ import annotations

import sys
from collections import Counter

# Frames between an access and the code that makes it: access(), the stand-in for the native function.
_DEPTH = 2
# Calls that follow one whose point names the same object, and what is the oracle's and not KVM's.
_QUIET = frozenset(
    {
        "kvm_check_request",
        "kvm_test_request",
        "mmu_invalidate_retry_gfn",
        "oracle_revoke",
        "oracle_revoke_mask",
        "vcpu_mode",
    }
)


class Audit:
    """Where explored code touches shared state without a point; counts by place."""

    def __init__(self) -> None:
        self.announced = ""
        self.unannounced: Counter[str] = Counter()
        self.unknown: set[str] = set()

    def access(self, name: str) -> None:
        announced, self.announced = self.announced, ""
        if announced or name in _QUIET:
            return
        frame = sys._getframe(_DEPTH)
        module = str(frame.f_globals.get("__name__", "?"))
        if not module.startswith("emulator.kvm."):
            return  # the test's own operations on the host's memory
        self.unannounced[f"{module}.{frame.f_code.co_name}: {name}"] += 1

    def undescribed(self, name: str) -> None:
        self.unknown.add(name)
