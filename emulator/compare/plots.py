"""The plots of a comparison: SVG that takes its foreground colours from the page it stands in."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from emulator.compare.bound import NAME
from emulator.compare.measure import MILLION, Measurement
from emulator.compare.rows import Spread, singular, spread_of
from emulator.compare.runner import Comparison
from emulator.report.result import Histogram
from emulator.report.summary import duration_text, short

# Placeholders for variables of the page's style sheet, so that a picture fits its light and dark themes.
_FOREGROUND, _MUTED, _GRID = "#010101", "#020202", "#030303"
_VARIABLES = {_FOREGROUND: "var(--text)", _MUTED: "var(--muted)", _GRID: "var(--grid)"}

# Okabe and Ito's palette for colour-blind readers, darkened or lightened for light and dark backgrounds.
PALETTE = ("#3b82c4", "#e08a1e", "#2a9d78", "#c9557f", "#8a6fd1", "#b8a12f", "#57a9d6", "#9a7b5f", "#7d8794")

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _FOREGROUND,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _FOREGROUND,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

# As many as fit beside each other if each is a reason for a flush.
_LEGEND_COLUMNS = 4
_PER_MILLION = "per million guest accesses"

# Groups of the cost lines of flushing, in the order in which they are stacked.
_COSTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("instructions", ("invept_", "invvpid_", "hv_", "hypercalls")),
    ("IPIs", ("IPIs ", "calls ")),
    ("interrupted guests", ("guests interrupted",)),
    ("refills", ("refill ", "shadow EPT ")),
)


@dataclass(frozen=True, slots=True)
class Plot:
    title: str
    note: str
    svg: str


def plots(comparison: Comparison) -> list[Plot]:
    """Return all plots for which this comparison has data."""
    made = [_cycles(comparison), _flushes(comparison), _interrupts(comparison)]
    made += [_per_unit(comparison), _pauses(comparison), _wall(comparison)]
    return [plot for plot in made if plot is not None]


# --- the plots ----------------------------------------------------------------------------------------------


def _cycles(comparison: Comparison) -> Plot:
    suffix, per = comparison.plan.per
    stacks = {
        name: {label: _median_cycles(runs, prefixes, suffix) for label, prefixes in _COSTS}
        for name, runs in comparison.columns
    }
    bound = comparison.bound
    if bound is not None:
        first = comparison.measurements[comparison.baseline][0]
        stacks[NAME] = {
            label: sum(line.cycles for line in bound.lines if line.item.startswith(prefixes))
            * _scale(first, suffix)
            for label, prefixes in _COSTS
        }
    return Plot(
        "Modelled cycles of flushing",
        f"per {per}; oracle-optimal: the cost with perfect knowledge in the first run",
        _stacked(stacks, f"cycles per {per}", _spreads(comparison, f"flush cycles{suffix}")),
    )


def _spreads(comparison: Comparison, key: str) -> dict[str, Spread]:
    """Return the spread of a figure over each policy's runs."""
    spreads = {name: spread_of(runs, key) for name, runs in comparison.columns}
    return {name: spread for name, spread in spreads.items() if spread is not None}


def _sum_spreads(comparison: Comparison, prefix: str) -> dict[str, Spread]:
    """Return the spread of the sum of the figures that _parts() returns."""
    spreads = {}
    for name, runs in comparison.columns:
        sums = [sum(value for key, value in m.values.items() if key.startswith(prefix)) for m in runs]
        spreads[name] = Spread(median(sums), min(sums), max(sums))
    return spreads


def _parts(comparison: Comparison, prefix: str) -> dict[str, dict[str, float]]:
    """Return, by policy, the medians per million guest accesses of the figures with keys that begin with the
    prefix, by the rest of the key."""
    names = dict.fromkeys(
        key.removeprefix(prefix).removesuffix("/M")
        for _, runs in comparison.columns
        for m in runs
        for key in m.values
        if key.startswith(prefix)
    )
    return {
        policy: {name: _median(runs, f"{prefix}{name}/M") for name in names}
        for policy, runs in comparison.columns
    }


def _flushes(comparison: Comparison) -> Plot:
    stacks = {
        name: {reason.replace("_", " "): value for reason, value in parts.items()}
        for name, parts in _parts(comparison, "reason ").items()
    }
    necessary = {name: _median(runs, "necessary flushes/M") for name, runs in comparison.columns}
    return Plot(
        "Flushes by reason",
        "per million guest accesses; the mark: how many of them averted a use of a stale translation",
        _stacked(stacks, _PER_MILLION, _sum_spreads(comparison, "reason "), marks=necessary),
    )


def _interrupts(comparison: Comparison) -> Plot | None:
    stacks = _parts(comparison, "received ")
    if not any(value for stack in stacks.values() for value in stack.values()):
        return None
    note = "per million guest accesses, by the pCPUs that received them"
    spreads = _sum_spreads(comparison, "received ")
    return Plot("Interrupts received", note, _stacked(stacks, _PER_MILLION, spreads))


def _per_unit(comparison: Comparison) -> Plot | None:
    unit = comparison.plan.scenario.unit
    if unit is None:
        return None
    uninvolved = any("uninvolved/unit" in m.values for _, runs in comparison.columns for m in runs)
    key = "uninvolved/unit" if uninvolved else "flush cycles/unit"
    what = "Interruptions of uninvolved pCPUs" if uninvolved else "Modelled cycles of flushing"
    values = {name: {what: _median(runs, key)} for name, runs in comparison.columns}
    label = f"{'interruptions' if uninvolved else 'cycles'} per {singular(unit)}"
    plot = _stacked(values, label, _spreads(comparison, key), legend=False)
    return Plot(what, f"for each of the {unit}", plot)


def _pauses(comparison: Comparison) -> Plot:
    def draw(axes: Axes) -> None:
        for name, runs in comparison.columns:
            histogram = _sum([m.result.snapshot.histograms["vcpu_pause"] for m in runs])
            seconds, shares = _exceeding(histogram)
            axes.step(seconds, shares, where="post", label=name, linewidth=1.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: duration_text(x)))
        axes.xaxis.set_major_locator(LogLocator(base=10))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(visible=True)
        axes.set_xlabel("pause of a runnable vCPU")
        axes.set_ylabel("share that lasted longer")
        axes.legend(fontsize=9)

    note = "from leaving guest mode to entering it; on this machine's clock, in powers of two"
    return Plot("Pauses", note, drawn(draw, 3.2))


def _wall(comparison: Comparison) -> Plot:
    columns = comparison.columns

    def draw(axes: Axes) -> None:
        for number, (_, runs) in enumerate(columns):
            values = [m.values["accesses per second"] for m in runs]
            axes.plot([min(values), max(values)], [number] * 2, color=PALETTE[number % len(PALETTE)], lw=2)
            axes.plot(values, [number] * len(values), "o", color=PALETTE[number % len(PALETTE)], alpha=0.7)
        _names(axes, [name for name, _ in columns])
        axes.set_xlim(0, 1.05 * max(m.values["accesses per second"] for _, runs in columns for m in runs))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x) if x else "0"))
        axes.set_xlabel("guest accesses per second")
        axes.grid(visible=True, axis="x")

    note = "guest accesses per second on this machine, a point per run; other load on it shows here only"
    return Plot("Speed of the emulation", note, drawn(draw, _height(len(columns), legend=0)))


# --- how they are drawn -------------------------------------------------------------------------------------


def _stacked(
    stacks: Mapping[str, Mapping[str, float]],
    unit: str,
    spreads: Mapping[str, Spread],
    *,
    marks: Mapping[str, float] | None = None,
    legend: bool = True,
) -> str:
    """Draw horizontal bars, one per policy, with their parts in one order.

    A line over a bar goes from the least to the most of the policy's runs.
    """
    parts = [
        part for part in next(iter(stacks.values()), {}) if any(stack.get(part) for stack in stacks.values())
    ]

    def draw(axes: Axes) -> None:
        left = [0.0] * len(stacks)
        rows = range(len(stacks))
        for part in parts:
            widths = [stack.get(part, 0.0) for stack in stacks.values()]
            axes.barh(rows, widths, left=left, label=part, height=0.62)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        ends = [
            max(total, spreads[name].most if name in spreads else 0)
            for name, total in zip(stacks, left, strict=True)
        ]
        most = max(ends, default=0.0) or 1.0
        for row, (name, total, end) in enumerate(zip(stacks, left, ends, strict=True)):
            axes.text(end + most * 0.012, row, short(total) if total else "0", va="center", fontsize=9)
            spread = spreads.get(name)
            if spread is not None and spread.least < spread.most:
                reach = [spread.least, spread.most]
                axes.plot(reach, [row, row], color=_FOREGROUND, lw=1.2, marker="|", ms=7)
        if marks:
            axes.plot(
                [marks.get(name, 0) for name in stacks], rows, "|", color=_FOREGROUND, ms=16, mew=2,
                label="necessary",
            )  # fmt: skip
        _names(axes, list(stacks))
        axes.set_xlim(0, most * 1.14)
        axes.set_xlabel(unit)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x) if x else "0"))
        axes.grid(visible=True, axis="x")
        if entries:
            # The figure's legend, not the axes': it may stand above the policies' names, too.
            assert isinstance(axes.figure, Figure)
            axes.figure.legend(
                loc="outside upper left", ncols=min(_LEGEND_COLUMNS, entries), fontsize=9,
                borderaxespad=0.2, handlelength=1.1, columnspacing=1.2,
            )  # fmt: skip

    entries = len(parts) + bool(marks) if legend and (len(parts) > 1 or marks) else 0
    return drawn(draw, _height(len(stacks), legend=-(-entries // _LEGEND_COLUMNS)))


def _names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [name.replace("+", "\n+") for name in names])
    axes.set_ylim(len(names) - 0.45, -0.55)


def _height(bars: int, *, legend: int) -> float:
    """Return the height in inches of a picture with so many bars, and rows of the legend."""
    return 0.95 + 0.42 * bars + (0.15 + 0.2 * legend if legend else 0)


def drawn(draw: Callable[[Axes], None], height: float) -> str:
    """Return a picture as SVG that takes its colours from the page."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # Drop width and height in points, which would fix the picture's size: the page scales it.
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'^<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg


# --- figures ------------------------------------------------------------------------------------------------


def _median(runs: Sequence[Measurement], key: str) -> float:
    spread = spread_of(runs, key)
    return spread.median if spread else 0.0


def _scale(run: Measurement, suffix: str) -> float:
    """Return the factor from a run's total to the figure per million accesses or per unit."""
    return 1 / max(run.values["units"], 1) if suffix == "/unit" else MILLION / max(run.values["accesses"], 1)


def _median_cycles(runs: Sequence[Measurement], prefixes: tuple[str, ...], suffix: str) -> float:
    return median(
        sum(
            line.cycles
            for line in m.result.cycles
            if line.group == "flush" and line.item.startswith(prefixes)
        )
        * _scale(m, suffix)
        for m in runs
    )


def _sum(histograms: Sequence[Histogram]) -> Histogram:
    buckets = zip(*(histogram.buckets for histogram in histograms), strict=True)
    return Histogram(tuple(sum(bucket) for bucket in buckets), sum(h.nanoseconds for h in histograms))


def _exceeding(histogram: Histogram) -> tuple[list[float], list[float]]:
    """Return the buckets' upper bounds in seconds, and the share of samples above each."""
    seconds, shares, left = [], [], histogram.count
    for exponent, samples in enumerate(histogram.buckets):
        left -= samples
        if histogram.count and samples:
            seconds.append(2**exponent / 1e9)
            shares.append(left / histogram.count)
    return seconds[:-1], shares[:-1]
