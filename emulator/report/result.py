"""The figures of a run: a snapshot while it runs, a result when it is over.

Both are plain data.  `read_snapshot` sums the native counters; it takes no lock, so any thread may call it
as often as it likes while the machine exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from emulator.report.receivers import Receivers
from emulator.scenario.costs import CycleLine
from emulator.scenario.workload import Activity
from native import HISTOGRAM_NAMES
from native.reader import CounterReader
from native.types import HistogramId

if TYPE_CHECKING:
    from native._native import MachinePtr

Verdict = Literal["clean", "violations", "inconclusive"]


class MachineObserver(Protocol):
    """Reads a machine from another thread; the scrape endpoint is one.

    `Job` calls `machine_up` once the machine exists and before any actor starts, and `machine_down` when all
    actors are gone and before `machine_destroy`.  The observer must not touch the machine once `machine_down`
    has returned, because the machine may be freed from then on.
    """

    def machine_up(self, machine: MachinePtr, *, pcpus: int, vms: int) -> None: ...

    def machine_down(self) -> None: ...


class Finder(Protocol):
    """Keeps violations at the moment they are found: the first of each kind, and some that can be drawn."""

    def wanted(self, kind: str, has_events: bool) -> bool: ...

    def found(self, number: int, report: Report) -> None: ...

    def count(self, snapshot: Snapshot) -> None: ...


@dataclass(frozen=True, slots=True)
class Histogram:
    """Durations in buckets of powers of two: bucket i counts durations of at most 2^i nanoseconds."""

    buckets: tuple[int, ...]
    nanoseconds: int

    @property
    def count(self) -> int:
        return sum(self.buckets)

    def less(self, before: Histogram) -> Histogram:
        """Return the samples since an earlier reading."""
        buckets = zip(self.buckets, before.buckets, strict=True)
        return Histogram(tuple(now - then for now, then in buckets), self.nanoseconds - before.nanoseconds)

    @property
    def mean(self) -> float:
        """Return the mean in seconds; 0 without samples."""
        return self.nanoseconds / self.count / 1e9 if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """Return the seconds that `percent` of the samples do not exceed: an upper bound, at most twice the
        true value."""
        wanted = self.count * percent / 100
        seen = 0
        for exponent, samples in enumerate(self.buckets):
            seen += samples
            if samples and seen >= wanted:
                return float(2**exponent) / 1e9
        return 0.0

    @property
    def longest(self) -> float:
        """Return an upper bound of the longest sample in seconds."""
        return self.percentile(100)


@dataclass(frozen=True, slots=True)
class FlushCount:
    """Flushes of one VM, scope and reason, and how many of them averted a use."""

    vm: int
    scope: str
    reason: str
    count: int
    necessary: int

    def less(self, before: FlushCount | None) -> FlushCount:
        """Return the counts since an earlier reading."""
        if before is None:
            return self
        # A flush counts as necessary once a guest misses the entry that it dropped.  That may be after the
        # earlier reading although the flush was before it, so cap the number at the flushes made since.
        count = self.count - before.count
        return replace(self, count=count, necessary=min(self.necessary - before.necessary, count))


@dataclass(frozen=True, slots=True)
class Report:
    """One violation. `text` is for people and has several lines; `details` goes into the JSON document."""

    kind: str
    kinds: tuple[str, ...]
    text: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Sums so far, over all CPUs."""

    elapsed: float
    phase: str
    counters: Mapping[str, int]
    vms: tuple[Mapping[str, int], ...]
    flushes: tuple[FlushCount, ...]
    histograms: Mapping[str, Histogram]
    violations: Mapping[str, int]
    rcu_pending: int

    @property
    def violated(self) -> int:
        return sum(self.violations.values())

    @property
    def necessary(self) -> int:
        """Return the number of flushes that averted a use."""
        return sum(flush.necessary for flush in self.flushes)

    def kvm(self, stat: str) -> int:
        """Return one of KVM's statistics, summed over the VMs."""
        return sum(vm[stat] for vm in self.vms)

    def since(self, before: Snapshot) -> Snapshot:
        """Return the counts since an earlier snapshot of this machine.  Violations count from the start."""
        flushed = {(f.vm, f.scope, f.reason): f for f in before.flushes}
        return replace(
            self,
            elapsed=self.elapsed - before.elapsed,
            counters=_less(self.counters, before.counters),
            vms=tuple(_less(now, then) for now, then in zip(self.vms, before.vms, strict=True)),
            flushes=tuple(f.less(flushed.get((f.vm, f.scope, f.reason))) for f in self.flushes),
            histograms={name: h.less(before.histograms[name]) for name, h in self.histograms.items()},
        )


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run.

    `preconditions` counts how often each check had something to check.  `failure` is empty, or names the
    actor that died and the reason; such a run proves nothing, whatever its counts.
    """

    snapshot: Snapshot
    scenario: str
    policy: Mapping[str, str]
    policy_name: str
    seed: int
    reports: tuple[Report, ...] = ()
    preconditions: Mapping[str, int] = field(default_factory=dict)
    cycles: tuple[CycleLine, ...] = ()
    failure: str = ""
    interrupted: bool = False
    receivers: tuple[Receivers, ...] = ()
    # Rounds of frames' tags; without one no old translation can be taken for a fresh one (frames_tag_rounds).
    tag_rounds: int = 0
    # Seconds by the workload's clock; with a pace, the counted guest accesses divided by the pace.
    worked: float = 0
    activities: tuple[Activity, ...] = ()
    # For a user's policy, by decision point: where its class decides it, and how often each answer was given.
    policy_overrides: Mapping[str, str] = field(default_factory=dict)
    policy_given: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Return the verdict.  A run in which no flush averted a use is inconclusive: no guest was in danger
        of using a stale translation, so the policy was not put to the test."""
        if self.snapshot.violated:
            return "violations"
        return "clean" if self.snapshot.necessary and not self.failure else "inconclusive"


def _less(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {name: value - before[name] for name, value in now.items()}


def read_snapshot(machine: MachinePtr, *, vms: int, elapsed: float, phase: str = "") -> Snapshot:
    """Sum the native counters of a machine with VMs 0 .. vms-1; `vms` must equal `machine_config.vms`."""
    reader = CounterReader(machine, vms=vms)
    return Snapshot(
        elapsed=elapsed,
        phase=phase,
        counters=reader.sums(),
        vms=reader.vm_stats(),
        flushes=tuple(FlushCount(c.vm, c.scope, c.reason, c.count, c.necessary) for c in reader.flushes()),
        histograms={
            name: Histogram(*reader.histogram(HistogramId(i))) for i, name in enumerate(HISTOGRAM_NAMES)
        },
        violations={kind: n for kind, n in reader.violations().items() if n},
        rcu_pending=reader.rcu_pending(),
    )
