"""The native calls as the core's headers describe them (native/description.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from emulator.points import POINTS, PointKind
from native._calls import CALLS as _TEXTS
from native.description import Call, read

CALLS: Final[Mapping[str, Call]] = {name: read(one) for name, one in _TEXTS.items()}


def calls_of(*roles: str) -> frozenset[str]:
    """Return the names of the calls with one of these roles."""
    return frozenset(name for name, call in CALLS.items() if call.role in roles)


# Local calls use only their arguments, or memory that the point right before them names.  Calls aside touch
# state on which no later step depends.
LOCAL: Final = calls_of("local")
NO_STEPS: Final = calls_of("local", "aside")
# Calls that need no point of KVM's code.
QUIET: Final = frozenset(name for name, call in CALLS.items() if call.quiet)
# Calls for which plain stores do not wait in store buffers, in addition to those that write.
FENCED: Final = frozenset(name for name, call in CALLS.items() if call.fence)

_ANNOUNCED: Final = {call.kind for call in CALLS.values()}.union(*(call.points for call in CALLS.values()))
# Points that announce the native call right behind them, which is a step itself.
ANNOUNCED: Final[frozenset[PointKind]] = frozenset(kind for kind in POINTS if kind in _ANNOUNCED)
