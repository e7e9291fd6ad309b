"""Counts of how often each check had something to check.  Without any, a verdict proves nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.report.result import Snapshot

if TYPE_CHECKING:
    from emulator.job.emulation import Emulation


def preconditions(snapshot: Snapshot, emulation: Emulation) -> dict[str, int]:
    """Return how often a guest was exposed to each danger, by the danger's name."""
    counters = snapshot.counters
    found = {
        "migrations": snapshot.kvm("migrations"),
        "pages zapped": counters["sptes_zapped"],
        "frames freed": counters["frames_freed"],
        "faults": snapshot.kvm("faults"),
        "fault retries": snapshot.kvm("fault_retries"),
        "range zaps": snapshot.kvm("zaps"),
        "yields in zaps": snapshot.kvm("yields"),
        "invalidations that overlap": snapshot.kvm("overlaps"),
        "flushes elided": snapshot.kvm("flushes_elided"),
        "roots loaded": snapshot.kvm("mmu_load"),
        "tables freed": counters["tables_freed"],
        "pages marked in zaps": counters["pfns_set"],
        "guest invalidations": counters["guest_invalidations"],
        "legal stale uses": counters["legal_stale"],
        "uses averted": counters["averted"],
        "dead roots' entries at a flush": counters["dead_root_entries"],
    }
    for flush in snapshot.flushes:
        if flush.necessary:
            name = f"uses averted by {flush.reason}"
            found[name] = found.get(name, 0) + flush.necessary
    for actor in emulation.crew.actors:
        rounds = getattr(actor, "dirty_rounds", None)
        if rounds is not None:
            found["dirty logs compared"] = found.get("dirty logs compared", 0) + rounds
    for phase, times in emulation.workload.phases_seen.items():
        found[f"phases: {phase}"] = times
    return found
