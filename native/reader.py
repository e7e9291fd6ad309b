"""Read the core's counters as plain data, for results and for scrapes, without stopping any CPU.

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
from native.types import CpuId, HistogramId

if TYPE_CHECKING:
    from native._native import MachinePtr


@dataclass(frozen=True, slots=True)
class FlushCell:
    """Flushes of one VM, scope and reason, and how many of them averted a use."""

    vm: int
    scope: str
    reason: str
    count: int
    necessary: int


class CounterReader:
    """Reads the counters of one machine with VMs 0 .. vms-1.

    `vms` must equal `machine_config.vms`, because the flush tables have that many rows.  The buffers belong
    to the call, so calls may overlap, while the machine exists.
    """

    def __init__(self, machine: MachinePtr, *, vms: int) -> None:
        self._machine = machine
        self.vms = vms

    def sums(self) -> dict[str, int]:
        values = ffi.new("uint64_t[]", len(COUNTER_NAMES))
        lib.counters_sum(self._machine, values)
        return dict(zip(COUNTER_NAMES, values, strict=True))

    def of_cpu(self, cpu: CpuId) -> dict[str, int]:
        values = ffi.new("uint64_t[]", len(COUNTER_NAMES))
        lib.counters_read(self._machine, cpu, values)
        return dict(zip(COUNTER_NAMES, values, strict=True))

    def vm_stats(self) -> tuple[dict[str, int], ...]:
        """Return the statistics of all VMs, read in one native call.  Each call releases the GIL, and with
        thousands of threads it may take long to get it back."""
        stats = len(VM_STAT_NAMES)
        values = ffi.new("uint64_t[]", max(1, self.vms * stats))
        lib.vm_stats_read(self._machine, self.vms, values)
        flat = ffi.unpack(values, self.vms * stats) if self.vms else []
        return tuple(
            dict(zip(VM_STAT_NAMES, flat[vm * stats : (vm + 1) * stats], strict=True))
            for vm in range(self.vms)
        )

    def violations(self) -> dict[str, int]:
        counts = ffi.new("uint64_t[]", len(VIOLATION_KINDS))
        lib.oracle_counts(self._machine, counts)
        return dict(zip(VIOLATION_KINDS, counts, strict=True))

    def rcu_pending(self) -> int:
        return int(lib.rcu_pending(self._machine))

    def histogram(self, index: HistogramId) -> tuple[tuple[int, ...], int]:
        """Return (samples per bucket, sum in nanoseconds).  Bucket i counts samples of at most 2^i
        nanoseconds."""
        buckets = ffi.new("uint64_t[]", lib.HISTOGRAM_BUCKETS)
        nanoseconds = ffi.new("uint64_t *")
        lib.histogram_sum(self._machine, index, buckets, nanoseconds)
        return tuple(buckets), int(nanoseconds[0])

    def flushes(self) -> Iterator[FlushCell]:
        """Yield the cells that are not 0."""
        cells = self.vms * len(FLUSH_SCOPES) * len(FLUSH_REASONS)
        counts, necessary = ffi.new("uint64_t[]", cells), ffi.new("uint64_t[]", cells)
        lib.flushes_sum(self._machine, counts, necessary)
        keys = (
            (vm, scope, reason)
            for vm in range(self.vms)
            for scope in FLUSH_SCOPES
            for reason in FLUSH_REASONS
        )
        for i, (vm, scope, reason) in enumerate(keys):
            if counts[i] or necessary[i]:
                yield FlushCell(vm, scope, reason, counts[i], necessary[i])
