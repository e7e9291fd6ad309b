"""The tables of a sweep: medians for people, a row for each run for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from emulator.errors import BadInput
from emulator.output import write_file
from emulator.report.console import letter
from emulator.report.summary import short
from emulator.sweep.stats import CONFIDENCE, LEAST_RUNS, SIGNIFICANT, Estimate, estimate, has_scipy
from emulator.sweep.store import VERSION, Record

FIGURES: Final = ("flush cycles/M", "interruptions/M")
TABLES: Final = (".csv", ".parquet")
_HEAD: Final = ("scenario", "policy", "seed", "duration_seconds", "verdict", "wall_seconds", "version")
_PER: Final = {"/M": ", per million guest accesses", "/unit": ", per operation of the scenario's unit"}
_WORST: Final = ("failed", "violations", "inconclusive", "clean")


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure of one policy at one point."""

    point: tuple[tuple[str, Any], ...]
    policy: str
    verdict: str
    estimate: Estimate


@dataclass(frozen=True)
class Swept:
    """The records of a sweep, in the grid's order; the first policy is the baseline."""

    records: Sequence[Record]

    @property
    def policies(self) -> list[str]:
        return list(dict.fromkeys(record["policy"] for record in self.records))

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for record in self.records for key in record["point"]))

    @property
    def figures(self) -> list[str]:
        return sorted({figure for record in self.records for figure in record["values"]})

    @property
    def status(self) -> int:
        verdicts = {record["verdict"] for record in self.records}
        return 3 if "failed" in verdicts else 1 if "violations" in verdicts else 0

    def cells(self, figure: str) -> Iterator[Cell]:
        """Yield a figure's cells, point by point and policy by policy, without those that have no run."""
        groups: dict[tuple[tuple[str, Any], ...], dict[str, list[Record]]] = {}
        for record in self.records:
            point = tuple(record["point"].items())
            groups.setdefault(point, {}).setdefault(record["policy"], []).append(record)
        for point, policies in groups.items():
            # If a run lacks a figure, nothing was counted for it: it is zero.
            values = {
                name: [float(run["values"].get(figure, 0.0)) for run in runs]
                for name, runs in policies.items()
            }
            baseline = self.policies[0]
            for name in (name for name in self.policies if name in policies):
                against = None if name == baseline else values.get(baseline)
                yield Cell(point, name, _verdict(policies[name]), estimate(values[name], against))

    def document(self, figures: Sequence[str]) -> dict[str, Any]:
        """Return the document of --json."""
        return {
            "flushlab_sweep": VERSION,
            "baseline": self.policies[0] if self.records else None,
            "policies": self.policies,
            "exit_status": self.status,
            "figures": {
                figure: [
                    {
                        "point": dict(cell.point),
                        "policy": cell.policy,
                        "verdict": cell.verdict,
                        **asdict(cell.estimate),
                    }
                    for cell in self.cells(figure)
                ]
                for figure in figures
            },
            "units": list(self.records),
        }

    # --- files ------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each run; all rows have the same columns."""
        figures, keys = self.figures, self.keys
        return [
            {
                **{name: record.get(name) for name in _HEAD},
                **{key: record["point"].get(key) for key in keys},
                **{figure: float(record["values"].get(figure, 0.0)) for figure in figures},
            }
            for record in self.records
        ]

    def write(self, path: Path) -> None:
        """Write the rows as CSV or Parquet, by the file's suffix."""
        rows = self.rows()
        file = io.StringIO(newline="")
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, list(rows[0]) if rows else list(_HEAD))
            writer.writeheader()
            writer.writerows(rows)
            write_file("--table", path, file.getvalue())
            return
        import pyarrow
        from pyarrow import parquet

        data = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), data)
        write_file("--table", path, data.getvalue())


def check_table(path: Path) -> None:
    """Raise BadInput if no table can be written to such a file."""
    if path.suffix not in TABLES:
        raise BadInput("--table", f"found {path.name}", f"a file that ends in {' or '.join(TABLES)}")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            found = "pyarrow is not installed"
            raise BadInput("--table", found, "it: pip install 'flushlab[data]', or a .csv file") from None


def sweep_table(swept: Swept, figures: Sequence[str], width: int) -> RenderableType:
    """Return a table for each figure, and the notes that say how to read them."""
    names = swept.policies
    narrow = max(map(len, names), default=0) > width // 4
    parts: list[RenderableType] = []
    if narrow:
        parts += [Text(f"{letter(i)}  {name}") for i, name in enumerate(names)] + [Text()]
    called = {name: letter(i) if narrow else name for i, name in enumerate(names)}
    for figure in figures:
        parts += [_figure_table(swept, figure, called), Text()]
    return Group(*parts, *(Text(note, style="dim") for note in _notes(swept, figures)))


def titled(figure: str) -> str:
    """Return a figure's name with its unit in words."""
    per = next((text for suffix, text in _PER.items() if figure.endswith(suffix)), "")
    return figure.removesuffix("/M").removesuffix("/unit") + per


def _figure_table(swept: Swept, figure: str, called: dict[str, str]) -> Table:
    table = Table(title=titled(figure), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for key in swept.keys:
        table.add_column(key, overflow="fold")
    table.add_column("policy", overflow="fold")
    for head in ("verdict", "runs", "median", "95% interval", "ratio", "p"):
        table.add_column(head, justify="left" if head == "verdict" else "right")
    for cell in swept.cells(figure):
        point = dict(cell.point)
        table.add_row(
            *(str(point.get(key, "")) for key in swept.keys),
            called[cell.policy],
            cell.verdict,
            *_columns(cell),
        )
    return table


def _columns(cell: Cell) -> tuple[str | Text, ...]:
    found = cell.estimate
    interval = "" if found.low is None or found.high is None else f"{short(found.low)} to {short(found.high)}"
    # A refuted policy has no gain.
    safe = cell.verdict in ("clean", "inconclusive")
    style = "" if not found.differs or not safe or found.ratio is None else _style(found.ratio)
    ratio = Text("" if found.ratio is None else f"{found.ratio:.3g} x", style=style)
    p = "" if found.p is None else f"{found.p:.2g}" if found.p >= 0.001 else "<0.001"
    return str(found.runs), short(found.median), interval, ratio, p


def _style(ratio: float) -> str:
    return "green" if ratio < 1 else "red"


def _notes(swept: Swept, figures: Sequence[str]) -> Iterator[str]:
    known = set(swept.figures)
    for figure in figures:
        if figure not in known and swept.records:
            yield f"no run has the figure {figure}; there are: {', '.join(swept.figures)}"
    if not swept.records:
        yield "there are no runs"
        return
    yield (
        f"Median over the runs, its {CONFIDENCE:.0%} bootstrap interval, the ratio to {swept.policies[0]}, "
        f"and the p-value of a Mann-Whitney test: above {SIGNIFICANT} the ratio may be noise."
    )
    if not has_scipy():
        yield "No intervals and tests: scipy is not installed (pip install 'flushlab[data]')."
    elif any(cell.estimate.runs < LEAST_RUNS for cell in swept.cells(figures[0])):
        yield f"With fewer than {LEAST_RUNS} runs every ratio may be noise: use --repeat {LEAST_RUNS}."


def _verdict(records: Sequence[Record]) -> str:
    verdicts = {record["verdict"] for record in records}
    return next((one for one in _WORST if one in verdicts), "not run")
