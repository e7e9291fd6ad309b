"""Modelled cycles: counts times a table of costs.

Wall-clock figures of an emulator on a shared machine mean little; counts are exact.  The table has a source
for each default and can be replaced entry by entry.  Lines in the group `flush` are the cost of flushing
under the policy: instructions, interrupts, interrupted guests and refilled entries.  Lines in the group
`work` are all other costs of the run.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from emulator.errors import BadInput
from emulator.validation import Unit, first_error, parse_toml, read_text

Group = Literal["flush", "work"]


_MOST = 1e9
_Cycles = Annotated[float, Unit("cycles"), Field(ge=0, le=_MOST, allow_inf_nan=False)]


class Cost(BaseModel):
    """Cycles of one event.

    `range` is the least and the most that the event plausibly costs on some host; a figure without a range
    counts as exact.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cycles: _Cycles
    range: Annotated[tuple[_Cycles, _Cycles] | None, Unit("cycles")] = None
    source: str = Field(default="the user's own figure", min_length=1)

    @field_validator("range")
    @classmethod
    def _has_cycles(cls, range_: tuple[float, float] | None, info: ValidationInfo) -> object:
        cycles = info.data.get("cycles")
        if range_ is not None and cycles is not None and not range_[0] <= cycles <= range_[1]:
            raise ValueError(f"the least and the most cycles, and {cycles:g} in between")
        return range_

    @property
    def least(self) -> float:
        return self.cycles if self.range is None else self.range[0]

    @property
    def most(self) -> float:
        return self.cycles if self.range is None else self.range[1]


class Costs(BaseModel):
    """The table.  One field per kind of event, so that a mistyped key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vm_exit_entry: Cost
    nested_round_trip: Cost
    ept_violation: Cost
    vmcs_load: Cost
    no_vpid_exit_entry: Cost
    ipi_send: Cost
    ipi_receive: Cost
    call_ride_along: Cost
    invept_global: Cost
    invept_single: Cost
    invvpid_single: Cost
    invvpid_all: Cost
    invvpid_address: Cost
    hypercall: Cost
    hv_space: Cost
    hv_list: Cost
    hv_shadow_ept_fill: Cost
    l2_hit: Cost
    walk_reference: Cost
    spte_change: Cost
    guest_invalidation: Cost


@dataclass(frozen=True, slots=True)
class CycleLine:
    """One line of the account."""

    item: str
    group: Group
    events: int
    # The entries of the table by which an event is charged.
    charged: tuple[str, ...]
    cycles_each: float
    source: str

    @property
    def cycles(self) -> float:
        return self.events * self.cycles_each


class Flush(Protocol):
    """The fields of a flush count that modelled_cycles() reads."""

    @property
    def scope(self) -> str: ...
    @property
    def count(self) -> int: ...


def load_costs(path: Path | None = None, base: Costs | None = None) -> Costs:
    """Return the embedded table, or `base`, with the entries of the user's file in the place of its own."""
    if base is None:
        base = Costs.model_validate(
            tomllib.loads(resources.files("emulator").joinpath("costs.toml").read_text("utf-8"))
        )
    if path is None:
        return base
    own = parse_toml(read_text(path, "a readable file of costs"), str(path))
    try:
        return Costs.model_validate({**dict(base), **own})
    except ValidationError as error:
        raise BadInput(str(path), *first_error(error, Costs)) from error


def charge(costs: Costs, item: str, group: Group, events: int, *charged: str) -> CycleLine:
    """Return the line of an item: each of its events costs the sum of these entries of the table."""
    entries: list[Cost] = [getattr(costs, name) for name in charged]
    source = "; ".join(dict.fromkeys(entry.source for entry in entries))
    return CycleLine(item, group, events, charged, sum(entry.cycles for entry in entries), source)


def modelled_cycles(
    costs: Costs,
    counters: Mapping[str, int],
    vms: Iterable[Mapping[str, int]],
    flushes: Iterable[Flush],
) -> tuple[CycleLine, ...]:
    """Return the account of a run.  Every event is charged once.

    An interruption of guest mode is an exit and an entry that the flush caused, so it is charged to the group
    `flush` and not among the other exits.  So are the walk references of refills that flushes caused, at the
    run's mean length of a walk.  The IPI of a VMCLEAR is charged to the group `work`: a migration needs it,
    whatever the policy flushes.  So are the mappings that an exit and an entry without a VPID drop.

    On Hyper-V a refill after a flush of an EPT is also an entry that Hyper-V makes anew in its shadow
    of that EPT.  This is a lower bound, because a shadow EPT has more entries than a TLB.
    """
    stats = list(vms)
    faults = sum(vm["faults"] for vm in stats)
    migrations = sum(vm["migrations"] for vm in stats)
    round_trips = sum(vm["nested_run"] for vm in stats)
    by_scope: dict[str, int] = {}
    for flush in flushes:
        by_scope[flush.scope] = by_scope.get(flush.scope, 0) + flush.count

    walks = counters["l2_misses"]
    refill_references = counters["walk_references"] * min(counters["refills"], walks) // max(walks, 1)
    vmclears = counters["ipis_vmclear"]
    interruptions = counters["interruptions"] - counters["interruptions_vmclear"]
    ride_along = max(counters["csd_queued"] - counters["ipis_sent"], 0)

    def line(item: str, group: Group, events: int, *charged: str) -> CycleLine:
        return charge(costs, item, group, max(events, 0), *charged)

    flush_lines = [line(scope, "flush", n, scope) for scope, n in sorted(by_scope.items())]
    return (
        *flush_lines,
        line("IPIs sent", "flush", counters["ipis_sent"] - vmclears, "ipi_send"),
        line("IPIs received", "flush", counters["ipis_received"] - vmclears, "ipi_receive"),
        line("calls that rode along", "flush", ride_along, "call_ride_along"),
        line("guests interrupted", "flush", interruptions, "vm_exit_entry"),
        line("refill walk references", "flush", refill_references, "walk_reference"),
        line("hypercalls", "flush", counters["hypercalls"], "hypercall"),
        line("shadow EPT entries", "flush", counters["shadow_ept_fills"], "hv_shadow_ept_fill"),
        line("other exits", "work", counters["vm_entries"] - interruptions, "vm_exit_entry"),
        line("round trips of nested guests", "work", round_trips, "nested_round_trip"),
        line("exits without a VPID", "work", counters["no_vpid_exits"], "no_vpid_exit_entry"),
        line("IPIs for VMCLEAR", "work", vmclears, "ipi_send", "ipi_receive"),
        line("EPT violations", "work", faults, "ept_violation"),
        line("VMCS loads elsewhere", "work", migrations, "vmcs_load"),
        line("SPTEs zapped", "work", counters["sptes_zapped"], "spte_change"),
        line("SPTEs mapped", "work", counters["sptes_mapped"], "spte_change"),
        line("second-level hits", "work", counters["l1_misses"] - walks, "l2_hit"),
        line(
            "other walk references",
            "work",
            counters["walk_references"] - refill_references,
            "walk_reference",
        ),
        line("guest invalidations", "work", counters["guest_invalidations"], "guest_invalidation"),
    )
