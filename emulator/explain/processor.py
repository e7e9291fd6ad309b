"""Actions of the processor itself: speculative fills, evictions, and stores that become visible late."""

from __future__ import annotations

from collections.abc import Sequence

from emulator.explain.events import NO_VM, Event
from emulator.explain.facts import Facts

# Prefix in explore's recordings of a store that leaves its CPU's buffer (explore/machine/store_buffers.py).
VISIBLE = "becomes visible:"


def processor_moves(
    facts: Facts, events: Sequence[Event], start: int | None, revoked: int | None
) -> list[int]:
    """Return the indices of the events that the race needs.  `start` is the index of the VM entry before the
    fill, `revoked` that of the revocation."""
    here = [i for i, e in enumerate(events) if e.cpu == facts.pcpu and e.vm in (facts.vm, NO_VM)]
    found: list[int] = []
    if facts.about_table:
        found += [i for i in here if events[i].kind == "evict" and events[i].a == facts.gfn][-1:]
    elif start is not None:
        filled = (i for i in here if events[i].kind == "speculate" and events[i].b == facts.page)
        found += [i for i in filled if i > start][-1:]
    if revoked is not None:
        found += [i for i in range(revoked + 1, len(events)) if _matters(facts, events[i])]
    return found


def _matters(facts: Facts, e: Event) -> bool:
    """Return whether this is a store that the other side of the race has not seen in time."""
    if not e.said.startswith(VISIBLE):
        return False
    mode = e.cpu == facts.pcpu and f"v{facts.vcpu}'s mode = IN_GUEST_MODE" in e.said
    return mode or f"request to v{facts.vcpu}" in e.said or "generation" in e.said
