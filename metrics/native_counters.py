"""Reads the native counters for a scrape without stopping any CPU.

The sums are computed in C, with the GIL released, from counters that each CPU owns.  No lock is taken that a
CPU could wait for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from native import (
    COUNTER_NAMES,
    FLUSH_REASONS,
    FLUSH_SCOPES,
    VIOLATION_KINDS,
    VM_STAT_NAMES,
    ffi,
    lib,
)
from native.types import CpuId, HistogramId, VmId, VmStat

if TYPE_CHECKING:
    from native._native import MachinePtr


@dataclass(frozen=True, slots=True)
class FlushCell:
    vm: int
    scope: str
    reason: str
    count: int
    necessary: int


class NativeCounters:
    """Reads the counters of one machine. The buffers belong to the call, so calls may overlap."""

    def __init__(self, machine: MachinePtr, *, pcpus: int, vms: int) -> None:
        self._machine = machine
        self.pcpus = pcpus
        self.vms = vms

    def sums(self) -> dict[str, int]:
        values = ffi.new("uint64_t[]", len(COUNTER_NAMES))
        lib.counters_sum(self._machine, values)
        return dict(zip(COUNTER_NAMES, values, strict=True))

    def of_cpu(self, cpu: CpuId) -> dict[str, int]:
        values = ffi.new("uint64_t[]", len(COUNTER_NAMES))
        lib.counters_read(self._machine, cpu, values)
        return dict(zip(COUNTER_NAMES, values, strict=True))

    def vm_stats(self, vm: VmId) -> dict[str, int]:
        return {name: lib.vm_stat(self._machine, vm, VmStat(i)) for i, name in enumerate(VM_STAT_NAMES)}

    def violations(self) -> dict[str, int]:
        counts = ffi.new("uint64_t[]", len(VIOLATION_KINDS))
        lib.oracle_counts(self._machine, counts)
        return dict(zip(VIOLATION_KINDS, counts, strict=True))

    def rcu_pending(self) -> int:
        return int(lib.rcu_pending(self._machine))

    def histogram(self, index: HistogramId) -> tuple[list[int], int]:
        """Return (samples per bucket, sum in nanoseconds).  Bucket i counts samples of at most 2^i
        nanoseconds."""
        buckets = ffi.new("uint64_t[]", lib.HISTOGRAM_BUCKETS)
        nanoseconds = ffi.new("uint64_t *")
        lib.histogram_sum(self._machine, index, buckets, nanoseconds)
        return list(buckets), int(nanoseconds[0])

    def flushes(self) -> Iterator[FlushCell]:
        """Yield the cells that are not 0."""
        cells = self.vms * len(FLUSH_SCOPES) * len(FLUSH_REASONS)
        counts, necessary = ffi.new("uint64_t[]", cells), ffi.new("uint64_t[]", cells)
        lib.flushes_sum(self._machine, counts, necessary)
        index = 0
        for vm in range(self.vms):
            for scope in FLUSH_SCOPES:
                for reason in FLUSH_REASONS:
                    if counts[index] or necessary[index]:
                        yield FlushCell(vm, scope, reason, counts[index], necessary[index])
                    index += 1
