"""The rows of a comparison: the figures in order, their labels and formats, and which way is better."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from emulator.compare.bound import Bound
from emulator.compare.measure import MILLION, Measurement
from emulator.report.summary import duration_text, short

Kind = Literal["count", "share", "duration", "times", "plain"]


@dataclass(frozen=True, slots=True)
class Row:
    """A row.  `key` is its key in the measurements' values; `less` states whether less is better, if
    either."""

    key: str
    label: str
    kind: Kind = "count"
    less: bool | None = True
    # Show the spread over repetitions, for figures that depend on the machine at hand.
    spread: bool = False
    head: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the repetitions."""

    median: float
    least: float
    most: float


def spread_of(measurements: Sequence[Measurement], key: str) -> Spread | None:
    """Return a figure's spread; None if no repetition has the figure."""
    values = [m.values[key] for m in measurements if key in m.values]
    return Spread(median(values), min(values), max(values)) if values else None


def sections(columns: Iterable[Sequence[Measurement]], unit: str | None) -> list[Section]:
    """Return the sections for these measurements, with the scopes, reasons and receivers that occurred."""
    values = [m.values for column in columns for m in column]
    seen = list(dict.fromkeys(key for each in values for key, value in each.items() if value))
    # Show the line of uninvolved guests even if its value is 0: it tells that none was interrupted.
    if any("uninvolved/M" in each for each in values):
        seen += ["uninvolved/M", "uninvolved/unit"]
    found = [
        Section("work", _work(unit)),
        Section("flushes, per million guest accesses", _flushes(seen)),
        Section("interrupts, per million guest accesses", _interrupts(seen)),
        Section("shadow paging, per million guest accesses", _shadow_paging(seen)),
        Section("nested guests, per million guest accesses", _nested(seen)),
        *([Section(f"per {singular(unit)}", _per_unit(seen))] if unit else []),
        Section("pauses of a vCPU, at most", _PAUSES),
        Section("modelled cycles, per million guest accesses", _cycles(seen)),
        Section("on this machine's clock", _WALL),
    ]
    return [section for section in found if section.rows]


def bound_values(bound: Bound, accesses: float, units: float) -> dict[str, float]:
    """Return the figures of the omniscient policy's column, by row."""
    million = MILLION / max(accesses, 1)
    values = {
        "violations": 0.0,
        "flushes/M": bound.flushes * million,
        "necessary flushes/M": bound.flushes * million,
        "necessary share": 1.0 if bound.flushes else 0.0,
        "scope invept_single/M": bound.invept_single * million,
        "scope invvpid_address/M": bound.invvpid_address * million,
        "collateral/M": 0.0,
        "bystanders/M": 0.0,
        "refills/M": bound.refills * million,
        "IPIs sent/M": bound.interruptions * million,
        "interruptions/M": bound.interruptions * million,
        "uninvolved/M": 0.0,
        "flush cycles/M": bound.cycles * million,
        "times the bound": 1.0,
    }
    values |= {f"cycles {line.item}/M": line.cycles * million for line in bound.lines}
    if units:
        values |= {
            "flush cycles/unit": bound.cycles / units,
            "IPIs sent/unit": bound.interruptions / units,
            "uninvolved/unit": 0.0,
            "flushes/unit": bound.flushes / units,
        }
    return values


def text_of(row: Row, value: float) -> str:
    if row.kind == "share":
        return f"{100 * value:.3g} %"
    if row.kind == "duration":
        return duration_text(value) if value else "-"
    if row.kind == "times":
        return f"{value:.3g} x" if value else "-"
    return short(value) if value else "0"


_PAUSES = (
    Row("p99 pause", "99th percentile", "duration", spread=True),
    Row("longest pause", "longest", "duration", spread=True),
)
_SHADOW_PAGING = (
    Row("mmu_pte_write/M", "write faults: stores to tables emulated", head=True),
    Row("mmu_synced/M", "shadow pages synced", head=True),
    Row("mmu_unsync/M", "  made unsync", less=None),
    Row("mmu_cache_miss/M", "shadow pages made"),
    Row("mmu_shadow_zapped/M", "shadow pages zapped", head=True),
    Row("mmu_flooded/M", "  flooded with stores"),
    Row("mmu_recycled/M", "  recycled, the oldest first"),
    Row("mmu_load/M", "roots loaded"),
    Row("cached_roots/M", "cached roots used", less=False),
)
_NESTED = (
    Row("nested_run/M", "round trips between L1 and L2", less=None, head=True),
    Row("nested_transition_flushes/M", "  flushes that they request"),
    Row("nested_invept/M", "INVEPTs of L1 emulated", less=None),
    Row("nested_invvpid/M", "INVVPIDs of L1 emulated", less=None),
    Row("nested_roots/M", "roots for L1's EPTs"),
    Row("nested_roots_freed/M", "  freed for L1's instructions"),
)
_WALL = (
    Row("wall seconds", "seconds for the run", "duration", spread=True),
    Row("accesses per second", "guest accesses per second", less=False, spread=True),
)


def _work(unit: str | None) -> tuple[Row, ...]:
    rows = [
        Row("violations", "violations", head=True),
        Row("accesses", "guest accesses", less=None),
    ]
    if unit:
        rows.append(Row("units", unit, less=None))
    return tuple(rows)


def _flushes(seen: Sequence[str]) -> tuple[Row, ...]:
    return (
        # Under the names that kvm_stat has for them.
        Row("remote_tlb_flush/M", "remote_tlb_flush"),
        Row("remote_tlb_flush_requests/M", "remote_tlb_flush_requests"),
        Row("flushes/M", "flushes", head=True),
        *_each(seen, "scope ", "  "),
        *_each(seen, "reason ", "  for "),
        Row("flushes elided/M", "elided", less=None),
        Row("necessary flushes/M", "necessary", less=None),
        Row("necessary share", "necessary / total", "share", less=False),
        Row("collateral/M", "entries of others dropped"),
        Row("refills/M", "refills that flushes caused"),
    )


def _interrupts(seen: Sequence[str]) -> tuple[Row, ...]:
    rows = [
        Row("IPIs sent/M", "IPIs sent", head=True),
        Row("IPIs for VMCLEAR/M", "  for a migration's VMCLEAR"),
        *_each(seen, "received ", "  received by "),
        Row("interruptions/M", "guests interrupted"),
        Row("bystanders/M", "of those, of another VM"),
    ]
    if "uninvolved/M" in seen:
        rows.append(Row("uninvolved/M", "of those, on uninvolved pCPUs"))
    return tuple(rows)


def _shadow_paging(seen: Sequence[str]) -> tuple[Row, ...]:
    """Return the rows of hosts without EPT, those of which some policy had any."""
    if "mmu_cache_miss/M" not in seen:
        return ()
    return tuple(row for row in _SHADOW_PAGING if row.key in seen)


def _nested(seen: Sequence[str]) -> tuple[Row, ...]:
    """Return the rows about nested guests that are not zero for every policy."""
    if "nested_run/M" not in seen:
        return ()
    return tuple(row for row in _NESTED if row.key in seen)


def _per_unit(seen: Sequence[str]) -> tuple[Row, ...]:
    rows = [
        Row("flushes/unit", "flushes"),
        Row("IPIs sent/unit", "IPIs sent, VMCLEARs aside"),
        Row("flush cycles/unit", "modelled cycles of flushing", head=True),
    ]
    if "uninvolved/unit" in seen:
        rows.insert(2, Row("uninvolved/unit", "interruptions of uninvolved pCPUs", head=True))
    return tuple(rows)


def _cycles(seen: Sequence[str]) -> tuple[Row, ...]:
    return (
        Row("flush cycles/M", "of flushing", head=True),
        *_each(seen, "cycles ", "  "),
        Row("bound cycles/M", "the run's own oracle-optimal", less=None),
        Row("times the bound", "flushing / oracle-optimal", "times", head=True),
        Row("work cycles/M", "of everything else", less=None),
    )


def _each(seen: Sequence[str], prefix: str, indent: str) -> tuple[Row, ...]:
    keys = [key for key in seen if key.startswith(prefix) and key.endswith("/M")]
    return tuple(Row(key, indent + key[len(prefix) : -2].replace("_", " ")) for key in keys)


def singular(unit: str | None) -> str:
    """Return the singular of a scenario's unit."""
    irregular = {"pages zapped": "page zapped", "remote flushes": "remote flush", "switches": "switch"}
    return irregular.get(unit or "", (unit or "").removesuffix("s"))
