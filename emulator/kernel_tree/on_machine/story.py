"""Add to a violation's report which functions of the tree's code took the right away."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

from emulator.kernel_tree.build import Built
from emulator.kernel_tree.on_machine.core import Tree
from emulator.kernel_tree.on_machine.places import kernel_places
from emulator.report.result import Report
from emulator.report.violation import ReportCollector

_STEPS: Final = {
    "STEP_ZAPPED": "zaps the SPTE of gfn {gfn:#x}",
    "STEP_PROTECTED": "write-protects gfn {gfn:#x}",
    "STEP_UNLINKED": "unlinks the table of gfn {gfn:#x}",
    "STEP_FLUSHED": "flushes",
    "STEP_YIELDED": "yields",
    "STEP_FREED": "frees table {gfn:#x}",
}
# The most later steps of the operation that a report lists.
_MOST_LATER: Final = 4


class _Step(NamedTuple):
    """struct tree_step"""

    time: int
    gfn: int
    pages: int
    cpu: int
    vm: int
    kind: int
    places: tuple[int, ...]


def _step_of(step: Any) -> _Step:
    places = tuple(place for place in step.places if place)
    return _Step(step.time, step.gfn, step.pages, step.cpu, step.vm, step.kind, places)


class Storyteller:
    """Adds to each report the steps of the tree's code that led to it."""

    def __init__(self, built: Built, tree: Tree) -> None:
        self.built = built
        self.tree = tree
        self.texts = {getattr(tree.lib, name): text for name, text in _STEPS.items()}

    def told(self, report: Report) -> Report:
        """Return the report with the steps at its end; unchanged if none of the last steps is about it."""
        lines = self._lines(report.details)
        if not lines:
            return report
        text = "\n".join([report.text, "  the tree's code, innermost function first:", *lines])
        details = {**report.details, "tree": [line.strip() for line in lines]}
        return replace(report, text=text, details=details)

    def _lines(self, details: Mapping[str, Any]) -> list[str]:
        gfn, vm, time = details.get("gfn"), details.get("vm"), details.get("time_ns")
        if gfn is None or time is None:
            return []
        steps = [step for step in self._steps() if step.time <= time and step.vm == vm]
        removals = (self.tree.lib.STEP_ZAPPED, self.tree.lib.STEP_PROTECTED, self.tree.lib.STEP_UNLINKED)
        about = [
            at
            for at, step in enumerate(steps)
            if step.kind in removals and step.gfn <= gfn < step.gfn + step.pages
        ]
        if not about:
            return []
        last = steps[about[-1]]
        later = [
            step for step in steps[about[-1] + 1 :] if step.cpu == last.cpu and step.kind not in removals
        ]
        return [line for step in [last, *later[:_MOST_LATER]] for line in self._step(step)]

    def _steps(self) -> list[_Step]:
        most = self.tree.lib.MOST_STEPS
        steps = self.tree.ffi.new("struct tree_step[]", most)
        n = self.tree.lib.tree_steps(steps, most)
        return [_step_of(steps[at]) for at in range(n)]

    def _step(self, step: _Step) -> list[str]:
        places = kernel_places(self.built, step.places)
        text = self.texts[step.kind].format(gfn=step.gfn)
        return [f"    {text}:", *(f"      {name}() {place}" for name, place in places)]


def telling_collector(teller: Storyteller) -> type[ReportCollector]:
    """Return a class of collectors: the teller adds the tree's steps to their reports."""

    class Collector(ReportCollector):
        def report(self, index: int, names: dict[int, str], mutants: Iterable[str]) -> Report:
            return teller.told(super().report(index, names, mutants))

    return Collector
