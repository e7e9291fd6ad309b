"""The custom collector, which fills new metric objects from the native counters at each scrape.

Cardinality is bounded for every scenario: VMs beyond the first `MAX_VMS` share the label value "other",
histograms have 24 buckets, pCPUs are labels only on request and then for the first `MAX_CPUS`.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from native import EXIT_REASONS, HISTOGRAM_NAMES
from native.reader import CounterReader
from native.types import CpuId, HistogramId

if TYPE_CHECKING:
    from native._native import MachinePtr

MAX_VMS = 16
MAX_CPUS = 64

# Every power of two from 256 ns to 1.07 s, as the core counts: a quantile is wrong by less than two.
_BUCKET_EXPONENTS = range(8, 31)

# Sums over the machine: counter, metric, help.
_SUMS = (
    ("accesses", "guest_accesses", "Guest accesses completed."),
    ("lookups", "tlb_lookups", "TLB lookups for guest accesses."),
    ("refills", "tlb_refills", "TLB misses that a flush caused: the entry would still have been there."),
    ("averted", "averted_uses", "Uses of stale translations that a flush averted."),
    ("legal_stale", "legal_stale_uses", "Stale translations used before their revocation completed."),
    ("collateral", "tlb_collateral_entries", "Live TLB entries of other contexts that flushes removed."),
    ("ipis_sent", "ipis_sent", "IPIs sent: calls that found the target's queue empty."),
    ("ipis_received", "ipis_received", "IPIs received: queues drained that an interrupt announced."),
    ("hypercalls", "hypercalls", "Hypercalls by which Hyper-V flushed an EPT on all pCPUs."),
    ("interruptions", "vcpu_interruptions", "Times that an IPI made a vCPU leave guest mode."),
    ("bystander", "bystander_interruptions", "Of those, on pCPUs that ran nothing of the sender's VM."),
    ("vm_entries", "vm_entries", "VM entries."),
    ("no_vpid_exits", "vm_exits_without_vpid", "VM exits without a VPID, which drop linear mappings."),
    ("sptes_zapped", "sptes_zapped", "Present leaf SPTEs removed, in pages of 4 KiB."),
    ("sptes_mapped", "sptes_mapped", "Leaf SPTEs installed, in pages of 4 KiB."),
    ("frames_freed", "frames_freed", "Guest frames freed by the host."),
    ("rcu_callbacks", "rcu_callbacks_queued", "RCU callbacks queued."),
    ("rcu_invoked", "rcu_callbacks_invoked", "RCU callbacks that have run."),
    ("guest_invalidations", "guest_invalidations", "Native TLB invalidations by guests."),
)

# By level: l1 is a vCPU's own guest, l2 a nested guest.  These are families of their own, because another
# label would split the series of flushlab_vm_entries_total and flushlab_tlb_flushes_total.
_LEVELS = (
    ("entries", "vm_entries_by_level", "VM entries into the vCPU's own guest (l1) and nested guests (l2)."),
    ("flushes", "tlb_flushes_by_level", "TLB flushes while the vCPU ran its own guest (l1) or a nested one."),
)

# Per VM: statistic, metric, help.  The first two are KVM's own, under KVM's names.
_VM_STATS = (
    ("remote_tlb_flush", "remote_tlb_flush", "KVM's statistic remote_tlb_flush."),
    ("remote_tlb_flush_requests", "remote_tlb_flush_requests", "KVM's statistic remote_tlb_flush_requests."),
    ("flushes_elided", "tlb_flushes_elided", "Flush decisions that the policy answered with no flush."),
    ("faults", "page_faults_fixed", "EPT violations that KVM fixed."),
    ("pf_fast", "pf_fast", "KVM's statistic pf_fast: page faults that needed no mmu_lock."),
    ("pf_spurious", "pf_spurious", "KVM's statistic pf_spurious: the SPTE allowed the access already."),
    ("pf_emulate", "pf_emulate", "KVM's statistic pf_emulate: page faults that ended in an emulated store."),
    ("fault_retries", "page_fault_retries", "Faults that raced an invalidation and were retried."),
    ("migrations", "vcpu_migrations", "vCPUs loaded on another pCPU than before."),
    ("mmu_load", "mmu_loads", "Calls of kvm_mmu_load."),
    ("cached_roots", "cached_roots_used", "Switches to a root that the vCPU had kept, without kvm_mmu_load."),
    ("zaps", "zaps", "Range zaps."),
    ("yields", "zap_yields", "Times that a zap yielded mmu_lock."),
    ("overlaps", "invalidations_overlapping", "Invalidations of pages that were being invalidated."),
    ("mmu_shadow_zapped", "mmu_shadow_zapped", "KVM's statistic mmu_shadow_zapped."),
    ("mmu_pte_write", "mmu_pte_write", "KVM's statistic mmu_pte_write: stores to page tables, emulated."),
    ("mmu_flooded", "mmu_flooded", "KVM's statistic mmu_flooded."),
    ("mmu_recycled", "mmu_recycled", "KVM's statistic mmu_recycled."),
    ("mmu_cache_miss", "mmu_cache_miss", "KVM's statistic mmu_cache_miss."),
    ("mmu_unsync", "mmu_unsynced_pages", "Times that a shadow page became unsync."),
    ("mmu_synced", "mmu_synced_pages", "Shadow pages compared with the guest's table."),
    ("mmu_prefetched", "mmu_prefetched_pages", "Pages mapped by a fault of the shadow MMU beside its own."),
    ("readers_awaited", "readers_awaited", "Kicks that waited for a vCPU that was reading SPTEs."),
    ("nested_run", "nested_run", "KVM's statistic nested_run: VM entries that L1 made into nested guests."),
    ("nested_transition_flushes", "nested_transition_flushes", "Flushes requested between L1 and L2."),
    ("nested_invept", "nested_invepts", "INVEPTs of L1 that KVM emulated."),
    ("nested_invvpid", "nested_invvpids", "INVVPIDs of L1 that KVM emulated."),
    ("nested_roots", "nested_roots", "Shadow pages that became roots for L1's EPTs."),
    ("nested_roots_freed", "nested_roots_freed", "Of these, freed for L1's instructions."),
)

_HISTOGRAMS = {
    "ipi_wait": ("ipi_wait_seconds", "Wait of an IPI's sender, from the first call queued to the last ack."),
    "vcpu_pause": ("vcpu_pause_seconds", "Pause of a runnable vCPU, from leaving guest mode to entering it."),
    "grace_period": ("rcu_grace_period_seconds", "RCU grace periods."),
    "remote_flush": ("remote_tlb_flush_seconds", "Duration of kvm_flush_remote_tlbs."),
    "lock_wait": ("mmu_lock_wait_seconds", "Wait for mmu_lock."),
}

_PER_CPU = (
    ("ipis_received", "pcpu_ipis_received", "IPIs received, by pCPU."),
    ("interruptions", "pcpu_interruptions", "Guests interrupted by an IPI, by pCPU."),
    ("lookups", "pcpu_tlb_lookups", "TLB lookups, by pCPU."),
    ("l2_misses", "pcpu_tlb_walks", "TLB misses at both levels, by pCPU."),
)


class BuildInfo(Collector):
    """flushlab_build_info: the version of the program that serves, and its settings."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)

    def describe(self) -> Iterable[Metric]:
        """Return nothing, as MachineCollector."""
        return ()

    def collect(self) -> Iterable[Metric]:
        text = "The version, and what it was asked to run; always 1."
        info = GaugeMetricFamily("flushlab_build_info", text, labels=list(self._labels))
        info.add_metric(list(self._labels.values()), 1)
        yield info


# The costs of all that a machine has done so far: the group (flush or work), the item, and the cycles.
CyclesOf = Callable[[CounterReader], Iterable[tuple[str, str, float]]]


class MachineCollector(Collector):
    """Metrics of the machine that is up, if any.  Without `cycles`, modelled cycles have no series.

    The lock orders scrapes and the machine's end: `machine_down` waits for a scrape in progress, so that the
    machine is not freed under it.  No CPU ever takes the lock.
    """

    def __init__(
        self,
        labels: Mapping[str, str] | None = None,
        *,
        per_cpu: bool = False,
        cycles: CyclesOf | None = None,
    ) -> None:
        self._labels = dict(labels or {})
        self._cycles_of = cycles
        self._cycles: dict[tuple[str, str], float] = {}
        self._per_cpu = per_cpu
        self._lock = threading.Lock()
        self._counters: CounterReader | None = None
        self._pcpus = 0

    def machine_up(self, machine: MachinePtr, *, pcpus: int, vms: int) -> None:
        with self._lock:
            self._counters, self._pcpus = CounterReader(machine, vms=vms), pcpus
            self._cycles.clear()

    def machine_down(self) -> None:
        with self._lock:
            self._counters = None

    def is_up(self) -> bool:
        """Return whether there is a machine."""
        return self._counters is not None

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that the registry does not scrape at registration."""
        return ()

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            if self._counters is None:
                return
            # Complete the list before the lock is released: a consumer may pause between two metrics.
            families = list(self._families(self._counters))
        yield from families

    def _families(self, counters: CounterReader) -> Iterator[Metric]:
        yield self._info(counters)
        sums = counters.sums()
        for counter, name, text in _SUMS:
            yield _counter(name, text, sums[counter])
        misses = CounterMetricFamily("flushlab_tlb_misses", "TLB misses of guest accesses.", labels=["level"])
        misses.add_metric(["1"], sums["l1_misses"])
        misses.add_metric(["2"], sums["l2_misses"])
        yield misses
        for counter, name, text in _LEVELS:
            levels = {f"l{level}": sums[f"level{level}_{counter}"] for level in (1, 2)}
            yield _labelled(name, text, "level", levels)
        exits = {reason: sums[f"exit_{reason}"] for reason in EXIT_REASONS}
        yield _labelled("vm_exits", "VM exits, by reason.", "reason", exits)
        yield _gauge("rcu_callbacks_pending", "RCU callbacks that wait.", counters.rcu_pending())
        yield _labelled("violations", "Violations found, by kind.", "kind", counters.violations())
        yield from _flush_families(counters)
        yield from _vm_families(counters)
        for index, histogram in enumerate(HISTOGRAM_NAMES):
            yield _histogram(*_HISTOGRAMS[histogram], *counters.histogram(HistogramId(index)))
        if self._cycles_of is not None:
            yield self._modelled(self._cycles_of(counters))
        if self._per_cpu:
            yield from _cpu_families(counters, self._pcpus)

    def _modelled(self, cycles: Iterable[tuple[str, str, float]]) -> Metric:
        """Return the modelled cycles.  Costs by means may shrink a little, which a counter must not."""
        text = "Modelled cycles by the table of costs: group flush is due to flushing, work to all else."
        family = CounterMetricFamily("flushlab_modelled_cycles", text, labels=["group", "item"])
        for group, item, value in cycles:
            known = self._cycles.get((group, item), 0.0)
            self._cycles[group, item] = max(known, value)
        for labels, value in self._cycles.items():
            family.add_metric(labels, value)
        return family

    def _info(self, counters: CounterReader) -> Metric:
        labels = {**self._labels, "pcpus": str(self._pcpus), "vms": str(counters.vms)}
        text = "The scenario and the policy that run; always 1."
        info = GaugeMetricFamily("flushlab_run_info", text, labels=list(labels))
        info.add_metric(list(labels.values()), 1)
        return info


def _vm_label(vm: int) -> str:
    return str(vm) if vm < MAX_VMS else "other"


def _flush_families(counters: CounterReader) -> Iterator[Metric]:
    counts: dict[tuple[str, str, str], int] = defaultdict(int)
    necessary: dict[tuple[str, str, str], int] = defaultdict(int)
    for cell in counters.flushes():
        key = (_vm_label(cell.vm), cell.scope, cell.reason)
        counts[key] += cell.count
        necessary[key] += cell.necessary
    labels = ["vm", "scope", "reason"]
    for name, text, cells in (
        ("tlb_flushes", "TLB flushes executed, by VM, scope and reason.", counts),
        ("tlb_flushes_necessary", "Of flushlab_tlb_flushes_total, those that averted a use.", necessary),
    ):
        family = CounterMetricFamily(f"flushlab_{name}", text, labels=labels)
        for key, number in cells.items():
            family.add_metric(key, number)
        yield family


def _vm_families(counters: CounterReader) -> Iterator[Metric]:
    sums: dict[str, dict[str, int]] = {stat: defaultdict(int) for stat, _, _ in _VM_STATS}
    for vm, stats in enumerate(counters.vm_stats()):
        for stat, by_vm in sums.items():
            by_vm[_vm_label(vm)] += stats[stat]
    for stat, name, text in _VM_STATS:
        yield _labelled(name, text, "vm", sums[stat])


def _cpu_families(counters: CounterReader, pcpus: int) -> Iterator[Metric]:
    values = {str(cpu): counters.of_cpu(cpu) for cpu in map(CpuId, range(min(pcpus, MAX_CPUS)))}
    for counter, name, text in _PER_CPU:
        yield _labelled(name, text, "cpu", {cpu: value[counter] for cpu, value in values.items()})


def _counter(name: str, text: str, value: int) -> Metric:
    return CounterMetricFamily(f"flushlab_{name}", text, value=value)


def _gauge(name: str, text: str, value: int) -> Metric:
    return GaugeMetricFamily(f"flushlab_{name}", text, value=value)


def _labelled(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"flushlab_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _histogram(name: str, text: str, buckets: Sequence[int], nanoseconds: int) -> Metric:
    cumulative = [
        (repr(2**exponent / 1e9), float(sum(buckets[: exponent + 1]))) for exponent in _BUCKET_EXPONENTS
    ]
    cumulative.append(("+Inf", float(sum(buckets))))
    return HistogramMetricFamily(f"flushlab_{name}", text, buckets=cumulative, sum_value=nanoseconds / 1e9)
