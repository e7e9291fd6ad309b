"""Does the order of the policies depend on figures of the table of costs that are known within a range only?

The modelled cycles of flushing are linear in each figure of the table: counts times costs.  So the order
under other costs needs no further run.  This module answers two questions:

* Is one of two policies the cheaper one wherever all figures lie in their ranges?  The difference of two
  policies is greatest and least at corners of the box of ranges: there each figure is at the end of its range
  that favours one of the two.
* If one figure moves through its range and the others stay as in the table, where does the order of two
  policies turn?  They cost the same at a single value, if at any.

Policies that let stale translations be used are left out: they save nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from emulator.compare.measure import MILLION, Measurement
from emulator.compare.runner import Comparison
from emulator.report.summary import short
from emulator.scenario.costs import Cost, Costs

# Events of each entry of the table, per operation of the scenario's unit or per million guest accesses.
Events = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Turn:
    """The value of one figure at which two policies cost the same; all other figures are as in the table."""

    entry: str
    at: float
    # The policy that is cheaper where the figure is lower, and the one where it is higher.
    below: str
    above: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Two policies, the cheaper one at the table's figures first, and their difference in cycles: at these
    figures, at least, and at most."""

    cheaper: str
    dearer: str
    saved: float
    least: float
    most: float

    @property
    def always(self) -> bool:
        """Return whether this order holds wherever the figures lie in their ranges."""
        return self.least > 0


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The order of the policies, the cheapest one first, and what it depends on."""

    # The unit per which cycles are given, such as "migration".
    per: str
    cycles: Mapping[str, float]
    pairs: Sequence[Pair]
    turns: Sequence[Turn]
    # The entries that have a range, and by which the flushing of some policy is charged.
    ranged: Mapping[str, Cost]
    refuted: Sequence[str]


def sensitivity(comparison: Comparison) -> Sensitivity:
    """Return how the order of a comparison's policies depends on the costs."""
    scenario = comparison.plan.scenario
    suffix, per = comparison.plan.per
    events, refuted = {}, []
    for name, runs in comparison.columns:
        if any(m.result.snapshot.violated for m in runs):
            refuted.append(name)
            continue
        by_unit = suffix == "/unit"
        basis = (m.values["units"] if by_unit else m.values["accesses"] / MILLION for m in runs)
        events[name] = _events(runs, sum(basis))
    return order_of(events, scenario.cost_table, per, refuted)


def _events(runs: Sequence[Measurement], basis: float) -> Events:
    """Return the events that flushing is charged in all of a policy's runs."""
    total: Counter[str] = Counter()
    for measurement in runs:
        for line in measurement.result.cycles:
            if line.group == "flush":
                for entry in line.charged:
                    total[entry] += line.events
    return {entry: count / basis if basis else 0.0 for entry, count in total.items() if count}


def order_of(
    events: Mapping[str, Events], costs: Costs, per: str, refuted: Sequence[str] = ()
) -> Sensitivity:
    table: dict[str, Cost] = dict(costs)
    at_table = {
        name: sum(count * table[entry].cycles for entry, count in each.items())
        for name, each in events.items()
    }
    order = sorted(at_table, key=lambda name: at_table[name])
    charged = {entry for each in events.values() for entry in each}
    ranged = {entry: cost for entry, cost in table.items() if entry in charged and cost.range is not None}
    pairs, turns = [], []
    for cheaper, dearer in combinations(order, 2):
        more = {
            entry: events[dearer].get(entry, 0.0) - events[cheaper].get(entry, 0.0)
            for entry in table
            if entry in charged
        }
        saved = at_table[dearer] - at_table[cheaper]
        ends = [sorted((n * table[e].least, n * table[e].most)) for e, n in more.items()]
        pairs.append(Pair(cheaper, dearer, saved, sum(low for low, _ in ends), sum(high for _, high in ends)))
        turns += [
            turn
            for entry in ranged
            if (turn := _turn(entry, table[entry], more[entry], saved, (cheaper, dearer))) is not None
        ]
    return Sensitivity(per, {name: at_table[name] for name in order}, pairs, turns, ranged, refuted)


def _turn(entry: str, cost: Cost, more: float, saved: float, pair: tuple[str, str]) -> Turn | None:
    """Return where the order of a pair turns if this figure alone moves through its range."""
    cheaper, dearer = pair
    if not more or not saved:
        return None
    at = cost.cycles - saved / more
    if not cost.least <= at <= cost.most:
        return None
    return Turn(entry, at, *((dearer, cheaper) if more > 0 else (cheaper, dearer)))


def sentences(result: Sensitivity) -> list[str]:
    """Return the answers as text, a paragraph each."""
    if len(result.cycles) < 2:
        return ["Order of the policies: fewer than two of them saved anything without a violation."]
    told = [
        f"Modelled cycles of flushing per {result.per}: "
        + ", ".join(f"{name} {short(cycles)}" for name, cycles in result.cycles.items())
        + "."
    ]
    for pair in result.pairs:
        order = f"{pair.cheaper} {'is cheaper than' if pair.saved else 'costs as much as'} {pair.dearer}"
        where = "wherever the costs lie in their ranges" if pair.always else "under some costs only"
        told.append(f"{order} {where}: by {_signed(pair.least)} to {_signed(pair.most)} cycles.")
    for turn in result.turns:
        cost = result.ranged[turn.entry]
        up = turn.at > cost.cycles
        cheaper, dearer = (turn.above, turn.below) if up else (turn.below, turn.above)
        told.append(
            f"{'From' if up else 'Up to'} {turn.entry} = {turn.at:.0f} (table: {cost.cycles:g}, range: "
            f"{cost.least:g} to {cost.most:g}) {cheaper} is cheaper than {dearer}."
        )
    if not result.turns:
        told.append("No figure turns the order by itself within its range.")
    return told


def _signed(cycles: float) -> str:
    return f"-{short(-cycles)}" if cycles < 0 else short(cycles)


def as_dict(result: Sensitivity) -> dict[str, Any]:
    """Return the JSON form."""
    return {
        "per": result.per,
        "cycles": dict(result.cycles),
        "pairs": [
            {
                "cheaper": pair.cheaper,
                "dearer": pair.dearer,
                "cycles_saved": pair.saved,
                "least": pair.least,
                "most": pair.most,
                "always": pair.always,
            }
            for pair in result.pairs
        ],
        "turns": [
            {"cost": turn.entry, "at": turn.at, "cheaper_below": turn.below, "cheaper_above": turn.above}
            for turn in result.turns
        ],
        "ranges": {
            entry: {"cycles": cost.cycles, "least": cost.least, "most": cost.most}
            for entry, cost in result.ranged.items()
        },
        "refuted": list(result.refuted),
    }
