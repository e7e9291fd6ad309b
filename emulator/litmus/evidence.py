"""Counts, in one execution, of the dangers that tests can need.

A search or a run without any of these dangers has tested nothing.  Counts cover the time from the end of
`init` to the end of `final`, without the test's preparations and without the destruction of its VMs.

With partial-order reduction one execution stands for all orders of its independent steps.  A danger that it
meets is met.  A danger that another of these orders would meet (an entry used just after its SPTE was zapped,
not just before) may be missed.  A search can therefore be called inconclusive although more executions would
not be, but never the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from emulator.kvm.structs import Kvm
from emulator.machine.runtime import Machine
from native import ffi, lib
from native.types import CounterId, VmStat

# Counters of the core, summed over all CPUs.
COUNTERS: Final[Mapping[str, CounterId]] = {
    "averted": lib.COUNT_AVERTED,
    "legal-stale": lib.COUNT_LEGAL_STALE,
    "stale-walk": lib.COUNT_STALE_WALKS,
    "dead-root": lib.COUNT_DEAD_ROOT_ENTRIES,
    "tables-freed": lib.COUNT_TABLES_FREED,
    "guest-invalidations": lib.COUNT_GUEST_INVALIDATIONS,
    "kicks": lib.COUNT_INTERRUPTIONS,
    "apic-aliases": lib.COUNT_APIC_ALIASES,
    "crossed-calls": lib.COUNT_CALLS_CROSSED,
}
# Statistics of the VMs, summed.
STATS: Final[Mapping[str, VmStat]] = {
    "yields": lib.STAT_YIELDS,
    "pending-flush": lib.STAT_YIELDS_PENDING,
    "root-gone": lib.STAT_YIELDS_INVALIDATED,
    "retries": lib.STAT_INVALIDATE_RETRIES,
    "slot-retries": lib.STAT_SLOT_RETRIES,
    "slot-waits": lib.STAT_SLOT_WAITS,
    "frozen": lib.STAT_FROZEN_RETRIES,
    "elided": lib.STAT_FLUSHES_ELIDED,
    "overlaps": lib.STAT_OVERLAPS,
    "unsync": lib.STAT_MMU_UNSYNC,
    "syncs": lib.STAT_MMU_SYNCED,
    "prefetched": lib.STAT_MMU_PREFETCHED,
    "readers": lib.STAT_READERS_AWAITED,
    "table-stores": lib.STAT_MMU_PTE_WRITE,
    "apic-withheld": lib.STAT_APIC_WITHHELD,
    "mmio-sptes": lib.STAT_PF_MMIO_SPTE_CREATED,
}


class Evidence:
    """The counts of one machine between two points in time."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._counters = ffi.new("uint64_t[]", lib.COUNTERS)
        self._before: dict[str, int] = {}

    def begin(self, kvms: Iterable[Kvm]) -> None:
        """Begin to count."""
        self._before = self._now(kvms)

    def found(self, kvms: Iterable[Kvm]) -> dict[str, int]:
        """Return the counts since `begin`, by need; `kvms` must be the VMs that it was given."""
        return {name: n - self._before[name] for name, n in self._now(kvms).items()}

    def compared(self, kvms: Iterable[Kvm]) -> dict[str, int]:
        """Return how many pages were compared when the VMs' migrations ended, after all other operations."""
        m = self._machine.m
        return {"dirty-compared": sum(lib.vm_stat(m, kvm.id, lib.STAT_DIRTY_COMPARED) for kvm in kvms)}

    def _now(self, kvms: Iterable[Kvm]) -> dict[str, int]:
        m = self._machine.m
        lib.counters_sum(m, self._counters)
        counted = {name: self._counters[counter] for name, counter in COUNTERS.items()}
        counted.update(dict.fromkeys(STATS, 0))
        for kvm in kvms:
            for name, stat in STATS.items():
                counted[name] += lib.vm_stat(m, kvm.id, stat)
        return counted


def add(total: dict[str, int], found: Mapping[str, int]) -> None:
    """Add the counts of an execution or a search to `total`."""
    for name, n in found.items():
        total[name] = total.get(name, 0) + n
