"""Define events and states of SPTEs, in which both sides of a comparison are described."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag, StrEnum
from typing import Final


class Kind(StrEnum):
    FLUSH = "flush of the whole VM"
    FLUSH_RANGE = "flush of a range"
    FLUSH_SLOT = "flush of a slot"
    YIELD = "yield"
    LOCK = "takes mmu_lock"
    UNLOCK = "releases mmu_lock"
    CALL_RCU = "table given to RCU"
    DIRTY = "page marked dirty"


@dataclass(frozen=True, slots=True)
class Event:
    """A moment that another CPU or the host can notice, and the locks held then.

    lock: 0, 1 for read, 2 for write.  state: the SPTEs at that moment, for flushes and yields.
    """

    kind: Kind
    rcu: bool
    lock: int
    a: int = 0
    b: int = 0
    state: tuple[int, ...] | None = None

    def __str__(self) -> str:
        text = str(self.kind)
        if self.kind is Kind.FLUSH_RANGE:
            text = f"flush of {self.b:#x} pages from gfn {self.a:#x} on"
        elif self.kind is Kind.FLUSH_SLOT:
            text = f"flush of the slot of address space {self.a}"
        elif self.kind is Kind.DIRTY:
            text = f"gfn {self.b:#x} marked dirty"
        elif self.kind in (Kind.LOCK, Kind.UNLOCK):
            return f"{text} for {'write' if self.a == 2 else 'read'}"
        held = ("without mmu_lock", "mmu_lock held for read", "mmu_lock held for write")[self.lock]
        return f"{text} ({'inside' if self.rcu else 'outside of'} RCU, {held})"


class State(IntFlag):
    """An SPTE, independent of the bits of a version; as in shim/api.h.  Level and pfn stand above."""

    PRESENT = 1
    LEAF = 2
    R = 4
    W = 8
    X = 16
    A = 32
    D = 64
    HOST_WRITABLE = 128
    MMU_WRITABLE = 256
    TRACKED = 512
    FROZEN = 1024


LEVEL: Final = 4096
PFN: Final = 65536
_LETTERS: Final = (
    (State.R, "R"), (State.W, "W"), (State.X, "X"), (State.A, "A"), (State.D, "D"),
    (State.HOST_WRITABLE, "host-writable"), (State.MMU_WRITABLE, "MMU-writable"), (State.TRACKED,
    "access-tracked"),
)  # fmt: skip


def spelled(state: int) -> str:
    """Return an SPTE in words."""
    level = state // LEVEL % 16
    if state & State.FROZEN:
        return f"level {level}, frozen"
    if not state & State.PRESENT:
        return f"level {level}, not present"
    rights = " ".join(name for flag, name in _LETTERS if state & flag)
    what = f"pfn {state // PFN:#x}" if state & State.LEAF else "table"
    return f"level {level}, {what}, {rights}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """An operation's return value, its events, the SPTEs at its end, and how many
    table pages are in use.  complaints: the side's own findings."""

    returned: int
    events: tuple[Event, ...]
    state: tuple[int, ...]
    tables: int
    complaints: tuple[str, ...] = ()
