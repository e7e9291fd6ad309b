"""A sweep as one self-contained page: pictures of each figure over each parameter, and the table."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from emulator.compare.html import origin
from emulator.compare.plots import drawn
from emulator.output import write_file
from emulator.report.summary import short
from emulator.sweep.table import Cell, Swept, titled

_HEIGHT: Final = 3.2
_REFUTED: Final = ("violations", "failed")


def write_page(swept: Swept, figures: Sequence[str], command: str, path: Path) -> None:
    write_file("--html", path, "\n".join(_page(swept, figures, command)) + "\n")


def _page(swept: Swept, figures: Sequence[str], command: str) -> Iterator[str]:
    style = resources.files("emulator.compare").joinpath("page.css").read_text("utf-8")
    name = escape(str(swept.records[0]["scenario"])) if swept.records else ""
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>flushlab sweep: {name}</title><style>{style}</style></head><body>"
    yield f"<h1>Sweep of {name}</h1>"
    yield f'<p class="muted">{len(swept.records)} runs; the baseline is the first policy.</p>'
    for figure in figures if swept.records else ():
        yield f'<h2>{escape(titled(figure))}</h2><div class="plots">'
        for title, cells, key in _series(list(swept.cells(figure))):
            yield f"<figure><h3>{escape(title)}</h3>{_picture(cells, key, titled(figure))}</figure>"
        yield "</div>"
        yield from _table(swept, figure)
    if not swept.records:
        yield "<p>No run was finished.</p>"
    yield f"<h2>How to run it again</h2><pre>{escape(command)}</pre>"
    data = base64.b64encode(json.dumps(swept.document(figures), allow_nan=False).encode()).decode()
    link = f'<a download="sweep.json" href="data:application/json;base64,{data}">All runs as JSON</a>'
    yield f'<p class="note">{escape(origin())} {link}</p></body></html>'


def _series(cells: Sequence[Cell]) -> Iterator[tuple[str, list[Cell], str]]:
    """Yield a title, cells and a key for each picture: over one key, while the other keys keep a value."""
    for key in dict(cells[0].point):
        groups: dict[tuple[tuple[str, Any], ...], list[Cell]] = {}
        for cell in cells:
            others = tuple((name, value) for name, value in cell.point if name != key)
            groups.setdefault(others, []).append(cell)
        for others, group in groups.items():
            if len({dict(cell.point)[key] for cell in group}) > 1:
                fixed = ", ".join(f"{name} = {value}" for name, value in others)
                yield f"Over {key}" + (f", at {fixed}" if fixed else ""), group, key


def _picture(cells: Sequence[Cell], key: str, unit: str) -> str:
    """Draw a line for each policy: medians with their intervals.  A refuted policy has a broken line."""
    values = list(dict.fromkeys(dict(cell.point)[key] for cell in cells))
    scale = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    place = {value: value if scale else number for number, value in enumerate(values)}

    def draw(axes: Axes) -> None:
        for policy in dict.fromkeys(cell.policy for cell in cells):
            own = sorted((c for c in cells if c.policy == policy), key=lambda c: place[dict(c.point)[key]])
            x = [place[dict(cell.point)[key]] for cell in own]
            y = [cell.estimate.median for cell in own]
            refuted = any(cell.verdict in _REFUTED for cell in own)
            label = f"{policy} (violations)" if refuted else policy
            (line,) = axes.plot(x, y, "--o" if refuted else "-o", ms=4, label=label)
            for at, cell in zip(x, own, strict=True):
                low, high = cell.estimate.low, cell.estimate.high
                if low is not None and high is not None and low < high:
                    axes.plot([at, at], [low, high], color=line.get_color(), lw=1.2, marker="_", ms=6)
        axes.set_xticks([place[value] for value in values], [str(value) for value in values])
        axes.set_xlabel(key)
        axes.set_ylabel(unit, fontsize=8)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y) if y else "0"))
        axes.grid(visible=True, axis="y")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, fontsize=9, borderaxespad=0.2)

    return drawn(draw, _HEIGHT)


def _table(swept: Swept, figure: str) -> Iterator[str]:
    heads = [*swept.keys, "policy", "verdict", "runs", "median", "95% interval", "ratio", "p"]
    yield '<div class="scroll"><table><thead><tr>'
    yield "".join(f"<th>{escape(head)}</th>" for head in heads)
    yield "</tr></thead><tbody>"
    for cell in swept.cells(figure):
        yield "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in _row(swept, cell)) + "</tr>"
    yield "</tbody></table></div>"


def _row(swept: Swept, cell: Cell) -> list[str]:
    found, point = cell.estimate, dict(cell.point)
    interval = "" if found.low is None or found.high is None else f"{short(found.low)} to {short(found.high)}"
    ratio = "" if found.ratio is None else f"{found.ratio:.3g} x"
    p = "" if found.p is None else f"{found.p:.2g}"
    keys = [str(point.get(key, "")) for key in swept.keys]
    return [*keys, cell.policy, cell.verdict, str(found.runs), short(found.median), interval, ratio, p]
