"""The counts of replays beside the counts of the recording, as text and as a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from emulator.hosttrace.memslots import RULE
from emulator.hosttrace.workload import RECORDED, Workload
from emulator.replay.machine import Replay
from emulator.report.console import letter
from emulator.report.result import Snapshot
from emulator.report.summary import short
from emulator.scenario.costs import Costs, CycleLine, modelled_cycles

VERSION: Final = 1
_NARROW: Final = 20
_TOTAL: Final = ""
_BUT_MOVES: Final = "flush_all_but_moves"
# Rows that a recording without them does not have.
_IF_RECORDED: Final = frozenset({_BUT_MOVES, "vmcs_clear_ipis"})
_COUNTED_HERE: Final = frozenset({_BUT_MOVES, "flush_current", "kick_ipis", "vmcs_clear_ipis"})
WITH_PGE: Final = "CR4.PGE is taken to be set: the recording does not show which flush RSM asked for."
RULES: Final = (
    "A replay has the recording's page faults and no other access: it counts flushes, and judges no use.",
    "A kick interrupts the vCPUs that were in guest mode, if the recording shows exits; else none.",
)


@dataclass(frozen=True, slots=True)
class Replayed:
    """A workload's counts under one policy."""

    policy: str
    snapshot: Snapshot
    cycles: tuple[CycleLine, ...]
    flush_current_calls: int
    lag: float

    @property
    def counts(self) -> dict[str, int]:
        """Return KVM's statistics and the interrupts that a recording may show, summed over the VMs.

        flush_current is the number of the function's calls, with and without a root, as a probe counts it.
        """
        counters = self.snapshot.counters
        counts = {name: self.snapshot.kvm(name) for name in RECORDED if name not in _COUNTED_HERE}
        counts["flush_current"] = self.flush_current_calls
        counts["vmcs_clear_ipis"] = counters["ipis_vmclear"]
        counts["kick_ipis"] = counters["ipis_sent"] - counters["ipis_vmclear"]
        moves = sum(
            flush.count
            for flush in self.snapshot.flushes
            if (flush.scope, flush.reason) == ("invept_global", "migration")
        )
        return counts | {_BUT_MOVES: counts["flush_all"] - moves}

    @property
    def flushes(self) -> dict[str, int]:
        """Return the flushes by scope and reason."""
        found: dict[str, int] = {}
        for flush in self.snapshot.flushes:
            name = f"{flush.scope} for {flush.reason}".replace("_", " ")
            found[name] = found.get(name, 0) + flush.count
        return {name: found[name] for name in sorted(found) if found[name]}

    @property
    def cycles_by_item(self) -> dict[str, float]:
        """Return the modelled cycles of flushing by kind of event, without kinds that cost none."""
        return {line.item: line.cycles for line in self.cycles if line.group == "flush" and line.cycles}

    @property
    def flush_cycles(self) -> float:
        return sum(line.cycles for line in self.cycles if line.group == "flush")


def replayed(policy: str, replay: Replay, snapshot: Snapshot, costs: Costs) -> Replayed:
    cycles = modelled_cycles(costs, snapshot.counters, snapshot.vms, snapshot.flushes)
    return Replayed(policy, snapshot, cycles, replay.flush_current_calls, replay.lag)


def document(workload: Workload, found: Sequence[Replayed], speed: float) -> dict[str, Any]:
    """Return the document of --json."""
    return {
        "flushlab_replay": VERSION,
        "source": workload.source,
        "seconds": workload.seconds,
        "speed": speed,
        "events": len(workload.steps),
        "vms": workload.vms,
        "pcpus": workload.pcpus,
        "recorded": workload.recorded,
        "left_out": workload.left_out,
        "memslots": [slot._asdict() for slot in workload.memslots],
        "policies": [
            {
                "name": one.policy,
                "counts": one.counts,
                "flushes": one.flushes,
                "faults": one.snapshot.kvm("faults"),
                "migrations": one.snapshot.kvm("migrations"),
                "lag_seconds": one.lag,
                "flushes_elided": one.snapshot.kvm("flushes_elided"),
                "flush_cycles": one.flush_cycles,
                "flush_cycles_by_item": one.cycles_by_item,
            }
            for one in found
        ],
    }


def memslot_notes(workload: Workload) -> list[str]:
    """Return a line for each memslot, and the rule by which some were inferred."""
    rule = [RULE] if any(slot.ranges for slot in workload.memslots) else []
    return [*(f"Memslot of {slot}." for slot in workload.memslots), *rule]


def _beside_first(found: Sequence[Replayed], item: str) -> list[str]:
    """Return the cycles under each policy, and beside them the change from the first policy."""
    cycles = [one.flush_cycles if item == _TOTAL else one.cycles_by_item.get(item, 0.0) for one in found]
    shown = [short(value) if value else "0" for value in cycles]
    changes = [f" {(value / cycles[0] - 1) * 100:+.0f}%" if cycles[0] else "" for value in cycles]
    return [shown[0], *(text + change for text, change in zip(shown[1:], changes[1:], strict=True))]


def table(workload: Workload, found: Sequence[Replayed], width: int, speed: float) -> RenderableType:
    """Return the counts as a table, and the rules to read it by."""
    vcpus = sum(workload.vms)
    head = Text(
        f"{workload.source}: {len(workload.steps):,} events in {workload.seconds:.3f} s; VMs: "
        f"{len(workload.vms)}, vCPUs: {vcpus}, pCPUs: {workload.pcpus}"
    )
    names = [one.policy for one in found]
    narrow = any(len(name) > _NARROW for name in names) or 30 + 14 * (len(names) + 1) > width
    legend = [Text(f"{letter(i)}  {name}") for i, name in enumerate(names)] if narrow else []
    rows = Table(box=None, pad_edge=False)
    rows.add_column("")
    rows.add_column("recorded", justify="right")
    for i, name in enumerate(names):
        rows.add_column(letter(i) if narrow else name, justify="right")
    for name in RECORDED:
        recorded = workload.recorded.get(name)
        if name in _IF_RECORDED and recorded is None:
            continue
        rows.add_row(
            name,
            "not shown" if recorded is None else f"{recorded:,}",
            *(f"{one.counts[name]:,}" for one in found),
        )
    if speed:
        rows.add_row("latest event, ms", "", *(f"{one.lag * 1e3:.1f}" for one in found))
    for name in sorted({name for one in found for name in one.flushes}):
        rows.add_row(f"  {name}", "", *(f"{one.flushes.get(name, 0):,}" for one in found))
    elided = [one.snapshot.kvm("flushes_elided") for one in found]
    if any(elided):
        rows.add_row("flushes elided", "", *(f"{n:,}" for n in elided))
    rows.add_row("cycles of flushing, modelled", "", *(_beside_first(found, _TOTAL)))
    for item in dict.fromkeys(item for one in found for item in one.cycles_by_item):
        rows.add_row(f"  {item.replace('_', ' ')}", "", *(_beside_first(found, item)))
    notes = [f"Not replayed: {count:,} {reason}." for reason, count in workload.left_out.items()]
    notes += memslot_notes(workload)
    if any(step.verb == "rsm" for step in workload.steps) and "flush_current" not in workload.recorded:
        notes.append(WITH_PGE)
    return Group(head, *legend, Text(), rows, Text(), *(Text(note, style="dim") for note in (*notes, *RULES)))
