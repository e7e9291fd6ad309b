"""The diagram as text, for commit messages: a column per CPU, time downwards, plain ASCII."""

from __future__ import annotations

import textwrap

from emulator.explain.explanation import Explanation, Row

# Columns of a commit message's line.  They suffice for three CPUs.
WIDTH = 72
_FITTING = 3
_COLUMN = 24
_LEAST = 16
# The last column's text may run on to the right.  It gets this much room even if the width is used up.
_LEAST_ROOM = 8


def diagram(explanation: Explanation, width: int | None = None, times: bool = False) -> str:
    """Draw the diagram, at most `width` columns wide if that is enough.  The default is 72 columns, or 24 for
    each CPU if there are more than three."""
    columns = len(explanation.columns)
    times = times and explanation.case.timed
    width = width or (WIDTH if columns <= _FITTING else _COLUMN * columns + (12 if times else 0))
    layout = _Layout(explanation, width, times)
    lines = _wrap(explanation.title, width)
    lines += ["", layout.header(), layout.header("-"), *layout.rows(), ""]
    for note in explanation.notes:
        lines += _wrap(note.text, width, f"[{note.mark}] ", "    ")
    return "\n".join(line.rstrip() for line in lines) + "\n"


class _Layout:
    def __init__(self, explanation: Explanation, width: int, times: bool) -> None:
        self.explanation, self.width = explanation, width
        self.left = 12 if times else 0
        self.column = max(_LEAST, (width - self.left) // max(len(explanation.columns), 1))

    def header(self, underline: str = "") -> str:
        line = " " * self.left
        for i, label in enumerate(self.explanation.labels()):
            line = line.ljust(self._offset(i)) + (underline * len(label) if underline else label)
        return line

    def rows(self) -> list[str]:
        last = self.explanation.rows[-1].moment.time if self.explanation.rows else 0
        lines = []
        for row in self.explanation.rows:
            time = f"{(row.moment.time - last) / 1000:+.1f}us" if self.left and row.moment.time else ""
            for i, text in enumerate(self._cell(row)):
                offset = self._offset(self.explanation.columns.index(row.cpu))
                lines.append((time if i == 0 else "").ljust(offset) + text)
        return lines

    def _offset(self, column: int) -> int:
        return self.left + column * self.column

    def _cell(self, row: Row) -> list[str]:
        """Return the lines of a row.  A row has one entry only, so text that its column cannot hold runs on
        across the columns to the right."""
        mark = f" [{row.mark}]" if row.mark else ""
        room = max(_LEAST_ROOM, self.width - self._offset(self.explanation.columns.index(row.cpu)))
        lines: list[str] = []
        for i, text in enumerate(row.lines):
            indent = "" if i == 0 else "  "
            last = i == len(row.lines) - 1
            whole = text + (mark if last else "")
            lines += _wrap(whole, room, indent, "  ") or [""]
        return lines


def _wrap(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
