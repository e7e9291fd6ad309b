"""The diagram as text, for commit messages: a column per CPU, time downwards, plain ASCII.

The course of an execution has its steps' numbers on the left, and narrower columns if there are many CPUs.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from emulator.explain.explanation import Explanation, Row

# Columns of a commit message's line.  They suffice for three CPUs.
WIDTH = 72
_FITTING = 3
_COLUMN = 24
_LEAST = 16
# The last column's text may run on to the right.  It gets this much room even if the width is used up.
_LEAST_ROOM = 8
# A course fits a terminal's line of this width, and its last column gets the room for most of its rows.
COURSE_WIDTH = 80
_COURSE_ROOM = 40
_STEP_COLUMNS = 6


def diagram(explanation: Explanation, width: int | None = None, times: bool = False) -> str:
    """Draw the diagram, at most `width` columns wide if that is enough.  The default is 72 columns, or 24 for
    each CPU if there are more than three."""
    columns = len(explanation.columns)
    times = times and explanation.case.timed
    if explanation.case.course is not None:
        return _drawn(explanation, _CourseLayout(explanation, width or COURSE_WIDTH))
    width = width or (WIDTH if columns <= _FITTING else _COLUMN * columns + (12 if times else 0))
    return _drawn(explanation, _Layout(explanation, width, times))


def _drawn(explanation: Explanation, layout: _Layout) -> str:
    width = layout.width
    lines = _wrap(explanation.title, width)
    for sentence in explanation.opening:
        lines += _wrap(sentence, width, "", "    ")
    lines += ["", layout.header(), layout.header("-"), *layout.rows(), ""]
    for note in explanation.notes:
        lines += _wrap(note.text, width, f"[{note.mark}] ", "    ")
    for sentence in explanation.closing:
        lines += _wrap(sentence, width, "", "    ")
    return "\n".join(line.rstrip() for line in lines) + "\n"


class _Layout:
    def __init__(self, explanation: Explanation, width: int, times: bool) -> None:
        self.explanation, self.width = explanation, width
        self.left = 12 if times else 0
        share = (width - self.left) // max(len(explanation.columns), 1)
        self.column = max(_LEAST, min([share, *self._whole_words()]))

    def _whole_words(self) -> Iterator[int]:
        """Yield for each column the width of those before it that leaves room for its longest word."""
        for row in self.explanation.rows:
            before = self.explanation.columns.index(row.cpu)
            for i, text in enumerate(row.lines):
                longest = max(map(len, text.split()), default=0) + (2 if i else 0)
                if before:
                    yield (self.width - self.left - longest) // before

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


class _CourseLayout(_Layout):
    """Columns side by side as long as each is wide enough for its label; the step's number on the left."""

    def __init__(self, explanation: Explanation, width: int) -> None:
        super().__init__(explanation, width, False)
        self.left = _STEP_COLUMNS
        labels = explanation.labels()
        room = (width - self.left - _COURSE_ROOM) // max(len(labels) - 1, 1)
        self.column = max(*map(len, labels), 2, min(_COLUMN, room) - 2) + 2 if labels else 0
        # Too many CPUs for columns: each row names its CPU.
        self.narrow = self.left + self.column * (len(labels) - 1) + _LEAST > width
        if self.narrow:
            self.left += self.column
            self.column = 0

    def header(self, underline: str = "") -> str:
        if self.narrow:
            return ("-" * 4 if underline else "step").ljust(_STEP_COLUMNS) + ("-" * 3 if underline else "CPU")
        line = super().header(underline)
        return ("-" * 4 if underline else "step") + line[4:]

    def rows(self) -> list[str]:
        lines, last = [], -1
        for row in self.explanation.rows:
            step = row.step if row.step is not None else -1
            number = f"{step:>4}" if step >= 0 and step != last else ""
            last = step
            label = self.explanation.case.label(row.cpu) if self.narrow else ""
            for i, text in enumerate(self._cell(row)):
                before = (number if i == 0 else "").ljust(_STEP_COLUMNS) + (label if i == 0 else "")
                lines.append(before.ljust(self._offset(self.explanation.columns.index(row.cpu))) + text)
        return lines


def _wrap(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
