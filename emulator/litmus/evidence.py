"""How often the dangers came about that tests can need, in one execution.

A search or a run in which none of them did has tested nothing.  Counted is what happens from the end of
`init` to the end of `final`: neither what a test prepares, nor that its VMs are destroyed in the end.

With partial-order reduction one execution stands for all orders of its independent steps.  A danger that it
meets is met.  One that another of these orders would meet (an entry used just after its SPTE has gone, not
just before) may be missed, so a search can be called inconclusive where more executions would not be, never
the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from emulator.kvm.structs import Kvm
from emulator.machine.runtime import Machine
from native import ffi, lib
from native.types import CounterId, VmStat

# Counters of the core, summed over all CPUs.
_COUNTERS: Final[Mapping[str, CounterId]] = {
    "averted": lib.COUNT_AVERTED,
    "legal-stale": lib.COUNT_LEGAL_STALE,
    "stale-walk": lib.COUNT_STALE_WALKS,
    "dead-root": lib.COUNT_DEAD_ROOT_ENTRIES,
    "tables-freed": lib.COUNT_TABLES_FREED,
    "guest-invalidations": lib.COUNT_GUEST_INVALIDATIONS,
    "kicks": lib.COUNT_INTERRUPTIONS,
    "crossed-calls": lib.COUNT_CALLS_CROSSED,
}
# Statistics of the VMs, summed.
_STATS: Final[Mapping[str, VmStat]] = {
    "yields": lib.STAT_YIELDS,
    "pending-flush": lib.STAT_YIELDS_PENDING,
    "root-gone": lib.STAT_YIELDS_INVALIDATED,
    "retries": lib.STAT_INVALIDATE_RETRIES,
    "slot-retries": lib.STAT_SLOT_RETRIES,
    "frozen": lib.STAT_FROZEN_RETRIES,
    "elided": lib.STAT_FLUSHES_ELIDED,
    "overlaps": lib.STAT_OVERLAPS,
}


class Evidence:
    """Counts between two moments of one machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._counters = ffi.new("uint64_t[]", lib.COUNTERS)
        self._before: dict[str, int] = {}

    def begin(self, kvms: Iterable[Kvm]) -> None:
        """Count from here on."""
        self._before = self._now(kvms)

    def found(self, kvms: Iterable[Kvm]) -> dict[str, int]:
        """Return what came about since `begin`, by need; the VMs are those of then."""
        return {name: n - self._before[name] for name, n in self._now(kvms).items()}

    def compared(self, kvms: Iterable[Kvm]) -> dict[str, int]:
        """Return how many pages were compared when the VMs' migrations ended, which comes after all else."""
        m = self._machine.m
        return {"dirty-compared": sum(lib.vm_stat(m, kvm.id, lib.STAT_DIRTY_COMPARED) for kvm in kvms)}

    def _now(self, kvms: Iterable[Kvm]) -> dict[str, int]:
        m = self._machine.m
        lib.counters_sum(m, self._counters)
        counted = {name: int(self._counters[counter]) for name, counter in _COUNTERS.items()}
        vms = [kvm.id for kvm in kvms]
        return counted | {name: sum(lib.vm_stat(m, vm, stat) for vm in vms) for name, stat in _STATS.items()}


def add(total: dict[str, int], found: Mapping[str, int]) -> None:
    """Add one execution's counts, or one search's, to others."""
    for name, n in found.items():
        total[name] = total.get(name, 0) + n
