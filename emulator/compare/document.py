"""A comparison for programs: one JSON document."""

from __future__ import annotations

from typing import Any

from emulator.compare.bound import NAME, Bound
from emulator.compare.rows import bound_values, sections, spread_of
from emulator.compare.runner import Comparison
from emulator.compare.sensitivity import as_dict, sensitivity
from emulator.report.summary import document as run_document

VERSION = 1


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """Return the JSON document.  Its keys are stable.  A figure is per million guest accesses if its key ends
    in `/M`, and per operation of the scenario's unit if it ends in `/unit`; durations are in seconds."""
    plan = comparison.plan
    return {
        "flushlab_comparison": VERSION,
        "scenario": plan.scenario.name,
        "title": plan.scenario.title,
        "pcpus": plan.scenario.machine.pcpus,
        "vms": plan.scenario.vms,
        "vcpus": plan.scenario.vcpus,
        "unit": plan.scenario.unit,
        "pace_accesses_per_second": plan.scenario.pace * 1e6,
        "duration_seconds": plan.duration,
        **({"units": plan.units} if plan.units is not None else {}),
        "seed": plan.seed,
        "repeat": plan.repeat,
        "baseline": comparison.baseline,
        "exit_status": comparison.exit_status,
        "interrupted": comparison.interrupted,
        "cut_short": list(comparison.cut_short),
        "policies": [_policy(comparison, name) for name, _ in comparison.columns],
        NAME: _bound(comparison),
        **({"sensitivity": as_dict(sensitivity(comparison))} if plan.sensitivity else {}),
    }


def _policy(comparison: Comparison, name: str) -> dict[str, Any]:
    runs = comparison.measurements[name]
    figures = {}
    for section in sections((r for _, r in comparison.columns), comparison.plan.scenario.unit):
        for row in section.rows:
            spread = spread_of(runs, row.key)
            if spread is not None:
                figures[row.key] = {"median": spread.median, "least": spread.least, "most": spread.most}
    return {
        "name": name,
        "verdict": comparison.verdict(name),
        "figures": figures,
        "runs": [{**run_document(m.result), NAME: _bound_lines(m.bound)} for m in runs],
    }


def _bound(comparison: Comparison) -> dict[str, Any] | None:
    """Return the bound of the baseline's first run."""
    bound = comparison.bound
    if bound is None:
        return None
    first = comparison.measurements[comparison.baseline][0]
    figures = bound_values(bound, first.values["accesses"], first.values.get("units", 0))
    return {"figures": figures, **_bound_lines(bound)}


def _bound_lines(bound: Bound) -> dict[str, Any]:
    return {
        "flushes": bound.flushes,
        "interruptions": bound.interruptions,
        "refills": bound.refills,
        "cycles": bound.cycles,
        "lines": [
            {"item": line.item, "events": line.events, "cycles": line.cycles, "source": line.source}
            for line in bound.lines
        ],
    }
