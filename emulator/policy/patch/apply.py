"""Applies the changes of a diff to a text.

Each hunk's old lines must be in the file, exactly.  They may stand at another place than its header says: the
nearest one counts, as with patch(1) and git.  Lines of context that differ are never overlooked ("fuzz").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from emulator.errors import shown
from emulator.policy.patch.diff import Change, FileDiff, PatchError, lines_of

_END: Final = "the end of the file"


def applied(name: str, diff: FileDiff, text: str | None) -> str | None:
    """Return the file's text after the changes; None: there is no such file.  Raises PatchError."""
    where = f"{name}: {diff.full}"
    if diff.added and text is not None:
        raise PatchError(
            where, _already(diff, text) or "exists already", "a new file, or a change of this one"
        )
    if not diff.added and text is None:
        raise PatchError(where, "no such file", "a change of a file that exists")
    lines = lines_of(text or "")
    new = _changed(name, diff, lines)
    if diff.removed:
        if new:
            raise PatchError(where, "has more lines than the patch removes", "a diff that removes the file")
        return None
    return "".join(new)


def _changed(name: str, diff: FileDiff, lines: list[str]) -> list[str]:
    new: list[str] = []
    reached = 0  # old lines that are in `new`
    offset = 0  # between the header's place and the last hunk's own
    for change in diff.changes:
        at = _place(change, lines, reached, offset)
        if at is None:
            raise _failed(name, diff, change, lines, reached, offset)
        offset = at - _begin(change)
        new += lines[reached:at]
        new += change.new
        reached = at + len(change.old)
    return new + lines[reached:]


def _begin(change: Change) -> int:
    """Return the index of the first old line, by the header."""
    return change.start - 1 if change.old else change.start


def _place(change: Change, lines: Sequence[str], first: int, offset: int) -> int | None:
    """Return the nearest index from `first` on at which the old lines stand; None: there is none."""
    n = len(change.old)
    last = len(lines) - n
    if not n:
        # Nothing says where new lines belong, unless the file is empty.
        return 0 if not lines else None
    if not change.trailing:
        first = max(first, last)  # no context after it: the hunk is at the end of its file
    guess = _begin(change) + offset
    places = (at for at in range(first, last + 1) if tuple(lines[at : at + n]) == change.old)
    return min(places, key=lambda at: (abs(at - guess), at), default=None)


# --- saying why a hunk does not apply -----------------------------------------------------------------------


def _failed(
    name: str, diff: FileDiff, change: Change, lines: list[str], reached: int, offset: int
) -> PatchError:
    where = f"{name}: hunk {change.number} of {diff.full}"
    already = _already(diff, "".join(lines))
    if already:
        return PatchError(where, already, "a change that has not been made yet")
    if not change.old:
        return PatchError(where, "has neither context nor removed lines", "a diff with lines of context")
    at, wanted = _nearest(change, lines, reached, offset)
    there = lines[at] if at < len(lines) else _END
    found = f"line {at + 1} is {_shown(there)}"
    if there.split() == wanted.split():
        found += ", with other white space"
    return PatchError(where, found, _shown(wanted))


def _shown(line: str) -> str:
    return line if line is _END else shown(line.strip() or line)


def _nearest(change: Change, lines: Sequence[str], reached: int, offset: int) -> tuple[int, str]:
    """Return the index and the wanted text of the first line that differs, at the place where most of the old
    lines are found."""
    guess = _begin(change) + offset

    def quality(at: int) -> tuple[int, int]:
        same = sum(a == b for a, b in zip(lines[at : at + len(change.old)], change.old, strict=False))
        return same, -abs(at - guess)

    at = max(range(reached, len(lines) + 1), key=quality, default=reached)
    for i, wanted in enumerate(change.old):
        if at + i >= len(lines) or lines[at + i] != wanted:
            return at + i, wanted
    # All lines are there, but not at the end, where a hunk without context after it belongs.
    return at + len(change.old), _END


def _already(diff: FileDiff, text: str) -> str:
    """Return a finding if the file has the changes already, or the patch is reversed: both look alike."""
    lines = lines_of(text)
    if diff.added:
        new = "".join(line for change in diff.changes for line in change.new)
        return "has been applied already" if text == new else ""
    reached = offset = 0
    for change in diff.changes:
        back = replace(change, start=change.start + (not change.old), old=change.new, new=change.old)
        at = _place(back, lines, reached, offset) if change.new else None
        if at is None:
            return ""
        offset = at - _begin(back)
        reached = at + len(change.new)
    return "has been applied already, or is reversed" if diff.changes else ""
