"""The diagram as a picture: one self-contained SVG, a lifeline per CPU, arrows where a vCPU moves and where
an IPI goes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from html import escape

from emulator.explain.explanation import Explanation, Row
from emulator.explain.meanings import CULPRITS, DANGER, FILL, PROMISE, REVOKE, USE

_COLUMN = 290
# Between a column's edge and its boxes: where arrows turn.
_INSET = 18
_MARGIN = 24
_HEAD = 76
_LINE = 17
_PAD = 7
_GAP = 12
_CHARS = 32
_LEGEND_CHARS = 34

# Fill and border of a box by the meaning of its moment.  Boxes with a meaning also have stronger borders.
_PLAIN = ("#f6f7f9", "#c3c9d1")
_COLOURS = {
    FILL: ("#e3f0fc", "#2f74b5"),
    REVOKE: ("#fff1d6", "#b9770e"),
    PROMISE: ("#fff1d6", "#b9770e"),
    **dict.fromkeys(CULPRITS, ("#fde3e1", "#b3261e")),
    USE: ("#b3261e", "#7d120c"),
    DANGER: ("#e3f0fc", "#2f74b5"),
}
_STYLE = (
    "text{font:13px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#1b1f24}"
    ".t{font-weight:bold;font-size:15px}.c{font-weight:bold}.w{fill:#fff}.n{font-size:10px;fill:#5b6570}"
    ".l{stroke:#c3c9d1;stroke-dasharray:3 4}.a{stroke:#5b6570;fill:none;stroke-width:1.5}"
    ".i{stroke:#2f74b5;fill:none;stroke-width:1.5;stroke-dasharray:5 3}"
)
_MARKERS = (
    '<marker id="m" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0 0L8 4L0 8z" fill="#5b6570"/></marker>'
)


def svg(explanation: Explanation) -> str:
    return _Picture(explanation).text()


class _Picture:
    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation
        self.boxes = list(self._placed())
        self.bottom = self.boxes[-1][2] + _GAP if self.boxes else _HEAD
        legend = [
            [f"[{note.mark}]" if i == 0 else "", line]
            for note in explanation.notes
            for i, line in enumerate(textwrap.wrap(note.text, self._legend_chars()))
        ]
        around = (*explanation.opening, *explanation.closing)
        legend += [["", line] for text in around for line in textwrap.wrap(text, self._legend_chars())]
        self.legend = legend
        self.title = textwrap.wrap(explanation.title, self._legend_chars(), break_on_hyphens=False)
        self.top = (len(self.title) - 1) * 20

    def _legend_chars(self) -> int:
        return max(40, _LEGEND_CHARS * len(self.explanation.columns))

    def text(self) -> str:
        width = 2 * _MARGIN + max(_COLUMN * len(self.explanation.columns), self._legend_chars() * 8 + 40)
        height = self.top + self.bottom + _MARGIN + 20 * len(self.legend)
        body = "\n".join([*self._heads(), *self._arrows(), *self._rows(), *self._legend()])
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img">\n'
            f"<title>{escape(self.explanation.title)}</title>\n"
            f"<style>{_STYLE}</style><defs>{_MARKERS}</defs>\n"
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
            f'{self._title()}\n<g transform="translate(0 {self.top})">\n{body}\n</g>\n</svg>\n'
        )

    def _title(self) -> str:
        lines = [
            f'<tspan x="{_MARGIN}" y="{30 + 20 * i}">{escape(t)}</tspan>' for i, t in enumerate(self.title)
        ]
        return f'<text class="t">{"".join(lines)}</text>'

    # --- places ------------------------------------------------------------------------------------------

    def _x(self, cpu: int) -> int:
        return _MARGIN + self.explanation.columns.index(cpu) * _COLUMN

    def _middle(self, cpu: int) -> int:
        return self._x(cpu) + _COLUMN // 2

    def _placed(self) -> Iterator[tuple[Row, list[str], int, int]]:
        """Yield each row with the lines of its box, and the y of the box's bottom and top."""
        y = _HEAD
        for row in self.explanation.rows:
            lines = [line for text in row.lines for line in textwrap.wrap(text, _CHARS) or [""]]
            height = len(lines) * _LINE + 2 * _PAD
            yield row, lines, y + height, y
            y += height + _GAP

    # --- drawing -----------------------------------------------------------------------------------------

    def _heads(self) -> Iterator[str]:
        for cpu in self.explanation.columns:
            x = self._middle(cpu)
            label = escape(self.explanation.case.label(cpu) + self.explanation.case.levels(cpu))
            yield f'<text class="c" x="{x}" y="58" text-anchor="middle">{label}</text>'
            yield f'<line class="l" x1="{x}" y1="66" x2="{x}" y2="{self.bottom}"/>'

    def _rows(self) -> Iterator[str]:
        for row, lines, bottom, top in self.boxes:
            fill, stroke = _COLOURS.get(row.meaning, _PLAIN)
            x, width = self._x(row.cpu) + _INSET, _COLUMN - 2 * _INSET
            strength = 2 if row.meaning else 1
            yield (
                f'<rect x="{x}" y="{top}" width="{width}" height="{bottom - top}" rx="4" fill="{fill}" '
                f'stroke="{stroke}" stroke-width="{strength}"/>'
            )
            white = ' class="w"' if row.meaning == USE else ""
            for i, line in enumerate(lines):
                y = top + _PAD + (i + 1) * _LINE - 5
                yield f'<text{white} x="{x + 9}" y="{y}">{escape(line)}</text>'
            if row.step is not None and row.step >= 0:
                y = top + _PAD + _LINE - 5
                place = f'x="{_MARGIN + _INSET - 8}" y="{y}" text-anchor="end"'
                yield f'<text class="n" {place}>{row.step}</text>'
            if row.mark:
                y = top + _PAD + _LINE - 5
                yield (
                    f'<text{white} x="{x + width - 8}" y="{y}" text-anchor="end" font-weight="bold">'
                    f"[{row.mark}]</text>"
                )

    def _arrows(self) -> Iterator[str]:
        """Yield arrows: from the last action on a vCPU's old pCPU to its load on the new one, and from an IPI
        to the next action of each called pCPU."""
        on: dict[int, int] = {}
        last: dict[int, int] = {}
        for i, (row, _, bottom, top) in enumerate(self.boxes):
            event, middle = row.moment.event, (top + bottom) // 2
            if event.kind in ("load", "entry", USE, FILL):
                before = on.get(event.a, row.cpu)
                if event.kind == "load" and before != row.cpu:
                    yield self._arrow("a", before, last[before], row.cpu, middle)
                on[event.a] = row.cpu
            if event.kind == "ipi":
                for target in (cpu for cpu in event.targets if cpu in self.explanation.columns):
                    yield self._arrow("i", row.cpu, middle, target, self._next(i, target))
            last[row.cpu] = middle

    def _next(self, i: int, cpu: int) -> int:
        later = ((top + bottom) // 2 for row, _, bottom, top in self.boxes[i + 1 :] if row.cpu == cpu)
        return next(later, self.boxes[i][2] + _GAP)

    def _arrow(self, style: str, source: int, y1: int, target: int, y2: int) -> str:
        """Return an arrow from the edge of one column's boxes to the edge of another's."""
        right = self._x(target) > self._x(source)
        x1 = self._x(source) + (_COLUMN - _INSET if right else _INSET)
        x2 = self._x(target) + (_INSET if right else _COLUMN - _INSET)
        bend = x1 + _INSET if right else x1 - _INSET
        return f'<path class="{style}" marker-end="url(#m)" d="M{x1} {y1}H{bend}V{y2}H{x2}"/>'

    def _legend(self) -> Iterator[str]:
        for i, (mark, line) in enumerate(self.legend):
            y = self.bottom + _MARGIN + 20 * i
            yield f'<text x="{_MARGIN}" y="{y}">{mark}</text>'
            yield f'<text x="{_MARGIN + 36}" y="{y}">{escape(line)}</text>'
