"""Reduces a run to the figures that are compared: plain numbers by key."""

from __future__ import annotations

from dataclasses import dataclass

from emulator.compare.bound import Bound, oracle_optimal
from emulator.report.result import Result, Snapshot
from emulator.scenario.config import Scenario

MILLION = 1e6
# KVM's statistics of roots and of the shadow MMU that are compared.
SHADOW_STATS = (
    "mmu_load",
    "cached_roots",
    "mmu_cache_miss",
    "mmu_shadow_zapped",
    "mmu_flooded",
    "mmu_recycled",
    "mmu_pte_write",
    "mmu_unsync",
    "mmu_synced",
)
# Statistics of VMs with nested guests.
NESTED_STATS = (
    "nested_run",
    "nested_transition_flushes",
    "nested_invept",
    "nested_invvpid",
    "nested_roots",
    "nested_roots_freed",
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A run and its figures.

    `values` are keyed by the rows' names (emulator.compare.rows); those that end in `/M` are per million
    guest accesses, those that end in `/unit` per operation of the scenario's unit.
    """

    result: Result
    bound: Bound
    values: dict[str, float]


def units_of(snapshot: Snapshot, scenario: Scenario) -> int:
    """Return the number of operations of the scenario's unit in a run."""
    counts = {
        "migrations": lambda: snapshot.kvm("migrations"),
        "root allocations": lambda: snapshot.kvm("roots_allocated"),
        "pages zapped": lambda: snapshot.counters["sptes_zapped"],
        "SMIs": lambda: snapshot.kvm("smis"),
        "remote flushes": lambda: snapshot.kvm("remote_tlb_flush_requests"),
        "switches": lambda: snapshot.counters["guest_switches"],
        "role windows": lambda: snapshot.counters["guest_role_windows"],
        "round trips": lambda: snapshot.kvm("nested_run"),
        "nested roots": lambda: snapshot.kvm("nested_roots"),
    }
    return counts[scenario.unit]() if scenario.unit else 0


def measure(result: Result, scenario: Scenario) -> Measurement:
    snapshot = result.snapshot
    bound = oracle_optimal(snapshot, scenario.cost_table)
    per_million = MILLION / max(snapshot.counters["accesses"], 1)
    values = {f"{key}/M": count * per_million for key, count in _counts(result, bound).items()}
    values |= _pauses(result)
    units = units_of(snapshot, scenario)
    if scenario.unit:
        values["units"] = float(units)
        values |= {f"{key}/unit": count / max(units, 1) for key, count in _per_unit(result, bound).items()}
    flushes = sum(flush.count for flush in snapshot.flushes)
    values |= {
        "violations": float(snapshot.violated),
        "accesses": float(snapshot.counters["accesses"]),
        "necessary share": snapshot.necessary / flushes if flushes else 0.0,
        "wall seconds": snapshot.elapsed,
        "accesses per second": snapshot.counters["accesses"] / max(snapshot.elapsed, 1e-9),
        "times the bound": _flush_cycles(result) / bound.cycles if bound.cycles else 0.0,
    }
    return Measurement(result, bound, values)


def _flush_cycles(result: Result) -> float:
    return sum(line.cycles for line in result.cycles if line.group == "flush")


def _counts(result: Result, bound: Bound) -> dict[str, float]:
    """Return the counts that are shown per million guest accesses."""
    snapshot, counters = result.snapshot, result.snapshot.counters
    counts: dict[str, float] = {
        "remote_tlb_flush": snapshot.kvm("remote_tlb_flush"),
        "remote_tlb_flush_requests": snapshot.kvm("remote_tlb_flush_requests"),
        "flushes": 0.0,
        "flushes elided": snapshot.kvm("flushes_elided"),
        "necessary flushes": snapshot.necessary,
        "collateral": counters["collateral"],
        "refills": counters["refills"],
        "IPIs sent": counters["ipis_sent"],
        "IPIs for VMCLEAR": counters["ipis_vmclear"],
        "interruptions": counters["interruptions"],
        "bystanders": counters["bystander"],
        **_uninvolved(result),
        "flush cycles": _flush_cycles(result),
        "work cycles": sum(line.cycles for line in result.cycles if line.group == "work"),
        "bound cycles": bound.cycles,
    }
    for key in SHADOW_STATS + NESTED_STATS:
        counts[key] = snapshot.kvm(key)
    for flush in snapshot.flushes:
        for key in ("flushes", f"scope {flush.scope}", f"reason {flush.reason}"):
            counts[key] = counts.get(key, 0) + flush.count
    for group in result.receivers:
        counts[f"received {group.who}"] = group.ipis
    for line in result.cycles:
        if line.group == "flush":
            counts[f"cycles {line.item}"] = line.cycles
    return counts


def _per_unit(result: Result, bound: Bound) -> dict[str, float]:
    return {
        "flush cycles": _flush_cycles(result),
        "bound cycles": bound.cycles,
        "IPIs sent": result.snapshot.counters["ipis_sent"] - result.snapshot.counters["ipis_vmclear"],
        **_uninvolved(result),
        "flushes": sum(flush.count for flush in result.snapshot.flushes),
    }


def _uninvolved(result: Result) -> dict[str, float]:
    """Return the interruptions of guests on pCPUs of undisturbed VMs; nothing if there are no such VMs."""
    groups = [group.interruptions for group in result.receivers if group.uninvolved]
    return {"uninvolved": float(sum(groups))} if groups else {}


def _pauses(result: Result) -> dict[str, float]:
    pause = result.snapshot.histograms["vcpu_pause"]
    return {"p99 pause": pause.percentile(99), "longest pause": pause.longest}
