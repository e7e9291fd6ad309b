"""The ordering points of KVM's code.  The kind of a point tells the access of the step behind it.

At a point, the order of two threads' steps matters: real threads can be delayed there, and `explore` begins a
step there.  Litmus tests name kinds in their delays, so the list is closed.
"""

from __future__ import annotations

from typing import Final, Literal

PointKind = Literal[
    "call_queue",
    "call_rcu",
    "dirty_bitmap",
    "down",
    "frames",
    "guest",
    "guest-memory",
    "indirect_shadow_pages",
    "interrupts",
    "lock",
    "memslots",
    "mm",
    "mmu_invalidate_seq",
    "mmu_lock",
    "mode",
    "plain store",
    "policy",
    "policy answers",
    "policy_state",
    "rcu",
    "requests",
    "role",
    "smp_mb",
    "spte",
    "sptes",
    "tdp_mmu_roots",
    "tlb",
    "unlock",
    "unlocking",
    "unsync",
    "up",
    "vcpu->cpu",
    "write_flooding",
    "write_track",
]

_READ: Final = ("read",)
_WRITE: Final = ("write",)
_BOTH: Final = ("read", "write")

# The access that each kind announces.
POINTS: Final[dict[PointKind, tuple[str, ...]]] = {
    "call_queue": _WRITE,
    "call_rcu": _WRITE,
    "dirty_bitmap": _BOTH,
    "down": _BOTH,
    "frames": _WRITE,
    "guest": _WRITE,
    "guest-memory": _BOTH,
    "indirect_shadow_pages": _BOTH,
    "interrupts": _BOTH,
    "lock": _WRITE,
    "memslots": _BOTH,
    "mm": _READ,
    "mmu_invalidate_seq": _BOTH,
    "mmu_lock": _BOTH,
    "mode": _BOTH,
    "plain store": _WRITE,
    "policy": _WRITE,
    "policy answers": _WRITE,
    "policy_state": _BOTH,
    "rcu": _WRITE,
    "requests": _BOTH,
    "role": _BOTH,
    "smp_mb": _WRITE,
    "spte": _WRITE,
    "sptes": _BOTH,
    "tdp_mmu_roots": _BOTH,
    "tlb": _WRITE,
    "unlock": _WRITE,
    "unlocking": _BOTH,
    "unsync": _BOTH,
    "up": _BOTH,
    "vcpu->cpu": _BOTH,
    "write_flooding": _BOTH,
    "write_track": _BOTH,
}
