"""The table for the terminal and the JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.figures import Figure
from bench.history import Kept, changes

FORMAT = 1


@dataclass(slots=True)
class Report:
    """The results of a run of the benchmarks."""

    quick: bool
    machine: dict[str, Any]
    figures: list[tuple[str, Figure]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def unmet(self) -> list[tuple[str, Figure]]:
        """Return the figures that are not as wanted, with the names of their benchmarks."""
        return [(name, figure) for name, figure in self.figures if figure.judged(quick=self.quick) is False]

    @property
    def wanted(self) -> int:
        """Return the number of figures that were checked against their conditions."""
        return sum(figure.judged(quick=self.quick) is not None for _, figure in self.figures)

    def document(self) -> Mapping[str, Any]:
        return {
            "bench": FORMAT,
            "quick": self.quick,
            "machine": self.machine,
            "figures": [
                {"benchmark": name, **figure.document(quick=self.quick)} for name, figure in self.figures
            ],
            "unmet": [{"benchmark": name, "name": figure.name} for name, figure in self.unmet],
            "failures": [{"benchmark": name, "text": text} for name, text in self.failures],
            "skipped": [{"benchmark": name, "text": text} for name, text in self.skipped],
        }

    def print(self, console: Console, before: Kept | None = None) -> None:
        """Print the table, the changes since `before`, and last the figures that are not as wanted."""
        console.print(_table(self))
        console.print(_footer(self))
        if before is not None:
            for line in changes(before, self.figures):
                console.print(line, markup=False, highlight=False)
        for name, text in self.skipped:
            console.print(f"{name}: skipped: {text}", style="yellow", markup=False)
        for name, text in self.failures:
            console.print(f"{name}: FAILED: {text}", style="bold red", markup=False)
        for line in _verdict(self):
            console.print(line, markup=False, highlight=False)


def _better(figure: Figure) -> str:
    if figure.ratio_of == "value/reference":
        return ""
    return " fewer" if figure.unit == "executions" else " quicker"


def _table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("figure, and its reference")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("reference", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("low … high", justify="right", no_wrap=True, style="dim")
    table.add_column("wanted", no_wrap=True)
    table.add_column("met?", no_wrap=True)
    previous = None
    for name, figure in report.figures:
        if previous not in (None, name):
            table.add_row()
        previous = name
        ratios = figure.ratios
        table.add_row(
            f"{figure.name}\n  [dim]{figure.reference_name}[/]",
            f"{short(figure.value)} {figure.unit}",
            f"{short(figure.reference)} {figure.unit}",
            f"{short(figure.ratio)}×{_better(figure)}",
            f"{short(ratios[0])} … {short(ratios[-1])}",
            figure.wanted.replace("<=", "≤").replace(">=", "≥").replace(" and ", ",\n"),
            _met(figure, report.quick),
        )
    return table


def _met(figure: Figure, quick: bool) -> str:
    met = figure.judged(quick=quick)
    if met is None:
        return ""
    return "[green]yes[/]" if met else "[bold red]no[/]"


def _verdict(report: Report) -> list[str]:
    """Return the last lines: each figure that is not as wanted, or a line that all are."""
    if not report.wanted:
        return []
    if not report.unmet:
        return [f"All {report.wanted} figures of which something is wanted are as wanted."]
    lines = [f"Not as wanted, {len(report.unmet)} of {report.wanted}:"]
    for name, figure in report.unmet:
        ratio = (
            f"{short(figure.ratio)}x{_better(figure) and f'{_better(figure)} than'} {figure.reference_name}"
        )
        found = f"{short(figure.value)} {figure.unit}, {ratio}"
        lines.append(f"  {name}: {figure.name}: {found}; wanted: {figure.wanted}")
    return lines


def _footer(report: Report) -> str:
    machine = report.machine
    line = (
        f"{machine['cpu']}, {machine['usable_cores']} of {machine['cores']} cores, "
        f"Linux {machine['kernel']}; "
        f"load {machine['load_at_start']:g} at start, {machine.get('load_at_end', 0):g} at end"
    )
    if report.quick:
        return f"{line}\n[yellow]--quick: the figures mean nothing[/]"
    if machine["load_at_start"] > 0.5:
        return f"{line}\n[yellow]the machine was not idle at start: the figures are noisy[/]"
    return line


def short(number: float) -> str:
    """Return a number with three significant digits.

    >>> short(1234.5), short(12.345), short(0.012345)
    ('1234', '12.3', '0.0123')
    """
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
