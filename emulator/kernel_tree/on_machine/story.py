"""Add to a violation's report which functions of the tree's code took the right away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    "STEP_MAPPED": "maps gfn {gfn:#x}",
    "STEP_QUEUED": "passes table {gfn:#x} to call_rcu()",
    "STEP_PASSED": "has walked gfns {gfn:#x} to {last:#x}, and ends",
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

    def covers(self, gfn: int) -> bool:
        return self.gfn <= gfn < self.gfn + self.pages


def _step_of(step: Any) -> _Step:
    places = tuple(place for place in step.places if place)
    return _Step(step.time, step.gfn, step.pages, step.cpu, step.vm, step.kind, places)


def _last(steps: Sequence[_Step], kinds: tuple[int, ...], wanted: Callable[[_Step], bool]) -> int:
    """Return the place of the last step of these kinds that is wanted; -1 if there is none."""
    found = (at for at in reversed(range(len(steps))) if steps[at].kind in kinds and wanted(steps[at]))
    return next(found, -1)


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
        chosen = self._about_page(steps, gfn)
        if "walk-after-free" in details.get("kinds", ()):
            chosen |= self._about_table(steps, details.get("frame"))
        return [line for at in sorted(chosen) for line in self._step(steps[at])]

    def _about_page(self, steps: Sequence[_Step], gfn: int) -> set[int]:
        """Choose the last step that took a right to the page away, and the steps after that which explain
        why a right was left."""
        code = self.tree.lib
        removals = (code.STEP_ZAPPED, code.STEP_PROTECTED, code.STEP_UNLINKED)
        removed = _last(steps, removals, lambda step: step.covers(gfn))
        mapped = _last(steps, (code.STEP_MAPPED,), lambda step: step.covers(gfn))
        chosen = set()
        if removed >= 0:
            kinds, cpu = (code.STEP_FLUSHED, code.STEP_YIELDED, code.STEP_FREED), steps[removed].cpu
            later = [at for at in range(removed + 1, len(steps)) if steps[at].kind in kinds]
            chosen = {removed, *[at for at in later if steps[at].cpu == cpu][:_MOST_LATER]}
        if mapped > removed:
            # The right is newer than the last removal; a walk over it since has left it.
            chosen.add(mapped)
            passed = _last(steps, (code.STEP_PASSED,), lambda step: step.covers(gfn))
            if passed > mapped:
                cpu = steps[passed].cpu
                yielded = _last(steps[:passed], (code.STEP_YIELDED,), lambda step: step.cpu == cpu)
                chosen |= {passed, yielded if yielded > mapped else passed}
        return chosen

    def _about_table(self, steps: Sequence[_Step], frame: int | None) -> set[int]:
        """Choose the steps by which the table in this frame was freed."""
        code = self.tree.lib
        ends = [
            _last(steps, (kind,), lambda step: step.gfn == frame)
            for kind in (code.STEP_QUEUED, code.STEP_FREED)
        ]
        return {at for at in ends if at >= 0}

    def _steps(self) -> list[_Step]:
        most = self.tree.lib.MOST_STEPS
        steps = self.tree.ffi.new("struct tree_step[]", most)
        n = self.tree.lib.tree_steps(steps, most)
        return [_step_of(steps[at]) for at in range(n)]

    def _step(self, step: _Step) -> list[str]:
        places = kernel_places(self.built, step.places)
        text = self.texts[step.kind].format(gfn=step.gfn, last=step.gfn + step.pages - 1)
        return [f"    {text}:", *(f"      {name}() {place}" for name, place in places)]


def telling_collector(teller: Storyteller) -> type[ReportCollector]:
    """Return a class of collectors: the teller adds the tree's steps to their reports."""

    class Collector(ReportCollector):
        def report(self, index: int, names: dict[int, str], mutants: Iterable[str]) -> Report:
            return teller.told(super().report(index, names, mutants))

    return Collector
