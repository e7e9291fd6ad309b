"""A comparison for a terminal: the figures of each policy, with their changes from the baseline, and the
bound.
"""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement as Measure
from rich.table import Table
from rich.text import Text

from emulator.compare.bound import NAME
from emulator.compare.measure import Measurement
from emulator.compare.rows import Row, Spread, bound_values, sections, spread_of, text_of
from emulator.compare.runner import Comparison
from emulator.compare.sensitivity import sensitivity, sentences
from emulator.report.console import letter

# Changes smaller than this are not called better or worse.
_NOTABLE = 0.02
# The host is behind with an activity below this share of its rate, if enough calls were asked for.
_BEHIND = 0.8
_ENOUGH = 20

# Columns of the labels, and the head of the bound, where names do not fit.
_LABELS = 25
_BOUND = "bound"
# Wider than any table, so that its own width can be asked for.
_ANY_WIDTH = 10_000

_BETTER = "green"
_VERDICT_STYLES = {"clean": "green", "violations": "bold red", "inconclusive": "yellow"}


def comparison_table(comparison: Comparison, console: Console) -> RenderableType:
    """Return the whole comparison as one table, with its rows in sections.

    Where the policies' names do not fit the console, letters stand for them, and a legend explains these.
    """
    parts: list[RenderableType] = [_header(comparison), Text()]
    columns = comparison.columns
    if columns:
        names = [name.replace("+", "\n+") for name, _ in columns]
        table = _table(comparison, [*names, NAME], fold_labels=False)
        if Measure.get(console, console.options.update(width=_ANY_WIDTH), table).maximum > console.width:
            parts += _legend([name for name, _ in columns])
            table = _table(comparison, [*map(letter, range(len(names))), _BOUND], fold_labels=True)
        parts.append(table)
    parts += _footnotes(comparison)
    return Group(*parts)


def _legend(names: Sequence[str]) -> list[Text]:
    lines = [*((letter(i), name) for i, name in enumerate(names)), (_BOUND, NAME)]
    return [Text(f"{short}  {name}") for short, name in lines] + [Text()]


def _table(comparison: Comparison, heads: Sequence[str], *, fold_labels: bool) -> Table:
    columns = comparison.columns
    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=True, header_style="bold")
    # Labels are folded here, because a table that is too wide would shrink them further.
    labels = _LABELS if fold_labels else _ANY_WIDTH
    table.add_column("", no_wrap=True)
    for head in heads[:-1]:
        table.add_column(head, justify="right")
    table.add_column(heads[-1], justify="right", style="dim")
    table.add_row("verdict", *(_verdict(comparison, name) for name, _ in columns), "")
    reference = _bound_column(comparison)
    for section in sections((runs for _, runs in columns), comparison.plan.scenario.unit):
        table.add_row()
        table.add_row(Text(textwrap.fill(section.title, labels), style="bold underline"))
        for row in section.rows:
            _add_row(table, row, columns, reference, labels)
    return table


def _header(comparison: Comparison) -> Text:
    plan = comparison.plan
    scenario = plan.scenario
    text = Text(f"{scenario.name}: {scenario.title}\n", style="bold")
    text.append(
        f"{scenario.machine.pcpus} pCPUs, {scenario.vms} VMs, {scenario.vcpus} vCPUs; {plan.length}, "
        f"{plan.repeat} run{'s' if plan.repeat > 1 else ''} per policy, seed {plan.seed}"
        f"{', interrupted' if comparison.interrupted else ''}",
        style="dim",
    )
    return text


def _verdict(comparison: Comparison, policy: str) -> Text:
    verdict = comparison.verdict(policy)
    return Text(verdict, style=_VERDICT_STYLES.get(verdict, ""))


def _bound_column(comparison: Comparison) -> dict[str, float]:
    bound = comparison.bound
    if bound is None:
        return {}
    first = comparison.measurements[comparison.baseline][0]
    return bound_values(bound, first.values["accesses"], first.values.get("units", 0))


def _add_row(
    table: Table,
    row: Row,
    columns: Sequence[tuple[str, Sequence[Measurement]]],
    reference: dict[str, float],
    labels: int,
) -> None:
    base = spread_of(columns[0][1], row.key)
    nothing = Spread(0, 0, 0)
    cells = [
        _cell(row, runs, (base or nothing) if number else None) for number, (_, runs) in enumerate(columns)
    ]
    bound = text_of(row, reference[row.key]) if row.key in reference else ""
    style = "bold" if row.head else ""
    indent = " " * (len(row.label) - len(row.label.lstrip()))
    label = textwrap.fill(row.label, labels, subsequent_indent=indent)
    table.add_row(Text(label, style=style), *cells, bound)


def _cell(row: Row, runs: Sequence[Measurement], base: Spread | None) -> Text:
    own = spread_of(runs, row.key)
    if own is None:
        own = Spread(0, 0, 0)
    text = Text(text_of(row, own.median), style="bold" if row.head else "")
    if row.spread and len(runs) > 1 and own.least != own.most:
        text.append(f" ({text_of(row, own.least)} to {text_of(row, own.most)})", style="dim")
    if base is not None:
        style = _change_style(row, own.median, base.median)
        if style == _BETTER and any(m.result.snapshot.violated for m in runs):
            style = "dim"  # a policy that lets stale translations be used saves nothing
        text.append(f" {change(own.median, base.median):>6}", style=style)
    return text


def behind(comparison: Comparison) -> list[str]:
    """Return a sentence for each policy under which the host fell behind the scenario's rates.

    Figures per guest access are then those of less work, and not the same for each policy.
    """
    lines = []
    for name, runs in comparison.columns:
        asked: defaultdict[str, float] = defaultdict(float)
        begun: Counter[str] = Counter()
        for measurement in runs:
            for activity in measurement.result.activities:
                asked[activity.name] += activity.asked
                begun[activity.name] += activity.begun
        late = [
            f"{activity.replace('_', ' ')} {begun[activity] / number:.0%}"
            for activity, number in asked.items()
            if number >= _ENOUGH and begun[activity] < _BEHIND * number
        ]
        if late:
            lines.append(f"{name} reached less than the scenario's rates: {', '.join(late)}")
    return lines


def change(now: float, before: float) -> str:
    """Return the change as text: +12 %, -3 %, x4.2, "=" if there is none, "new" if there was nothing
    before."""
    if before == now:
        return "="
    if not before:
        return "new"
    ratio = now / before
    if abs(ratio - 1) < 0.005:
        return "="
    return f"x{ratio:.3g}" if ratio >= 2 else f"{100 * (ratio - 1):+.0f}%"


def better(row: Row, now: float, before: float) -> bool | None:
    """Return whether a figure is better than before; None if neither way is, or the change is too small."""
    if row.less is None or abs(now - before) <= _NOTABLE * max(abs(before), abs(now)):
        return None
    return (now < before) == row.less


def _change_style(row: Row, now: float, before: float) -> str:
    return {True: _BETTER, False: "red", None: "dim"}[better(row, now, before)]


def _footnotes(comparison: Comparison) -> list[RenderableType]:
    notes: list[RenderableType] = [Text()]
    for name, runs in comparison.columns:
        for measurement in runs:
            if measurement.result.failure:
                notes.append(Text(f"{name} failed: {measurement.result.failure}", style="bold red"))
        kinds = sorted({kind for m in runs for kind in m.result.snapshot.violations})
        if kinds:
            notes.append(Text(f"{name}: {', '.join(kinds)}", style="red"))
            example = next((r for m in runs for r in m.result.reports), None)
            if example is not None:
                notes.append(Text(example.text, style="dim"))
    if comparison.plan.sensitivity:
        notes += [Text(), Text("costs and the order of the policies", style="bold underline")]
        notes += [Text(line) for line in sentences(sensitivity(comparison))] + [Text()]
    notes += [Text(line, style="yellow") for line in behind(comparison)]
    notes += [
        Text(f"cut short by the time limit: {which}; its rates still hold", style="yellow")
        for which in comparison.cut_short
    ]
    notes.append(
        Text(
            f"{NAME}: the cost with perfect knowledge in the first run of {comparison.baseline}; the "
            "run's own bound is a row of each column. Percentages: against the first column.",
            style="dim",
        )
    )
    return notes
