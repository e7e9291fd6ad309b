"""Unified diffs: parsed by the library `unidiff`, and checked for parts that no patch of KVM can have.

`git diff`, `git format-patch` and `diff -u` write them.  Every line of a diff counts: a line that belongs to
no hunk and to no header is refused, because a hunk with a damaged header would otherwise be left out in
silence, and an idea that was never tried would be called safe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from unidiff.errors import UnidiffParseError
from unidiff.patch import Hunk, PatchedFile, PatchSet

from emulator.errors import shown
from emulator.policy.guard import UserPolicyError

ROOT: Final = "emulator/kvm/"
PROPOSALS: Final = "emulator/policy/proposals/"
_NOTHING: Final = "/dev/null"
# Directories at the top of the project; a path that begins with another one has a prefix, as git's a/ and b/.
_TOP: Final = ("emulator", "native", "metrics", "bench", "tests")
_ONLY: Final = f"changes of .py files in {ROOT} or {PROPOSALS} only"
_UNIFIED: Final = "a unified diff, as from git diff or git format-patch"
_BASE: Final = re.compile(r"^Flushlab-Base:[ \t]*(.*?)[ \t]*$", re.IGNORECASE | re.MULTILINE)
# A diff begins with one of these lines; what stands before it is a message.
_BEGINS: Final = re.compile(r"^(diff --git |--- |Index: )", re.MULTILINE)
# A format-patch ends with a line of dashes and git's version.
_SIGNATURE: Final = ("-- \n", "--\n", "-- ", "--")
_RENAMED: Final = re.compile(r"^(rename|copy) (from|to) ", re.MULTILINE)


class PatchError(UserPolicyError):
    """A patch that cannot be used, in one line: patch, hunk, file, line, finding."""


def full_path(path: str) -> str:
    """Return a file's path from the top of the project."""
    return path if path.startswith(PROPOSALS) else ROOT + path


@dataclass(frozen=True, slots=True)
class Change:
    """A hunk: lines `old` become `new`.

    start: the number of the first old line, from 1 on; of the line before it if `old` is empty.  leading,
    trailing: lines of context at its ends.  line: the header's line in the patch.
    """

    number: int
    line: int
    start: int
    old: tuple[str, ...]
    new: tuple[str, ...]
    leading: int
    trailing: int


@dataclass(frozen=True, slots=True)
class FileDiff:
    """The changes of one file, by its path within emulator/kvm, or the whole path of a proposal's file."""

    path: str
    changes: tuple[Change, ...]
    added: bool = False
    removed: bool = False

    @property
    def full(self) -> str:
        return full_path(self.path)


@dataclass(frozen=True, slots=True)
class Diff:
    """One patch file.  base: the policy that its message names, if it names one."""

    name: str
    files: tuple[FileDiff, ...]
    base: str | None = None


def parse_diff(name: str, data: bytes) -> Diff:
    """Parse one patch file, which errors call `name`; raises PatchError."""
    text = _text(name, data)
    found = _parsed(name, text)
    files = tuple(_file(name, one) for one in found)
    if not any(one.changes or one.added or one.removed for one in files):
        raise PatchError(name, "changes nothing", _UNIFIED)
    _check_all_lines(name, text, found)
    return Diff(name, files, _base(name, text))


def _text(name: str, data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise PatchError(f"{name}: byte {error.start}", "not UTF-8", _UNIFIED) from error
    if not text.strip():
        raise PatchError(name, "empty", _UNIFIED)
    if "\r\n" in text:
        line = text[: text.index("\r\n")].count("\n") + 1
        raise PatchError(f"{name}:{line}", "the line ends with CRLF", "LF, as in the files that it changes")
    return text


def _parsed(name: str, text: str) -> PatchSet:
    reached = [0]

    def lines() -> Iterator[str]:
        for number, line in enumerate(lines_of(text), 1):
            reached[0] = number
            yield line

    try:
        found = PatchSet(lines())
    except UnidiffParseError as error:
        raise PatchError(f"{name}:{reached[0]}", str(error), _UNIFIED) from error
    if not found:
        raise PatchError(name, "no diff in it", _UNIFIED)
    return found


def lines_of(text: str) -> list[str]:
    """Return the lines with their ends; only a newline ends a line, as in diffs."""
    parts = text.split("\n")
    return [*(part + "\n" for part in parts[:-1]), *([parts[-1]] if parts[-1] else [])]


def _base(name: str, text: str) -> str | None:
    begins = _BEGINS.search(text)
    found = _BASE.findall(text[: begins.start()] if begins is not None else text)
    if not found:
        return None
    if len(set(found)) > 1 or not found[0]:
        raise PatchError(f"{name}: Flushlab-Base", " and ".join(map(shown, found)), "one policy")
    return str(found[0])


# --- one file -----------------------------------------------------------------------------------------------


def _file(name: str, one: PatchedFile) -> FileDiff:
    where = f"{name}:{one.diff_line_no}"
    names = [path for path in (one.source_file, one.target_file) if path != _NOTHING]
    if not names:
        raise PatchError(where, "names no file", _UNIFIED)
    paths = {_within(where, path) for path in names}
    info = str(one.patch_info or "")
    path = sorted(paths)[0]
    if len(paths) > 1 or _RENAMED.search(info):
        raise PatchError(where, f"renames or copies {full_path(path)}", "a removed and an added file")
    if one.is_binary_file:
        raise PatchError(where, f"a binary change of {full_path(path)}", _UNIFIED)
    if one.is_symlink or one.is_submodule:
        raise PatchError(where, f"{full_path(path)} is no regular file", _ONLY)
    added, removed = one.source_file == _NOTHING, one.target_file == _NOTHING
    changes = tuple(_change(where, path, number, hunk) for number, hunk in enumerate(one, 1))
    return FileDiff(path, changes, added, removed)


def _within(where: str, path: str) -> str:
    """Return the file's path, as FileDiff has it.  One directory may stand before it, as git's a/ and b/."""
    parts = path.split("/")
    if path.startswith('"') or not path.isprintable():
        raise PatchError(where, f"touches {shown(path)}", _ONLY)
    if path.startswith("/") or {"", ".", ".."} & set(parts):
        raise PatchError(where, f"leads out of the tree with {shown(path)}", _ONLY)
    own = path if parts[0] in _TOP else "/".join(parts[1:])
    if own.startswith("native/"):
        raise PatchError(where, f"touches {own}: the core would have to be built anew", _ONLY)
    if not own.startswith((ROOT, PROPOSALS)) or not own.endswith(".py"):
        raise PatchError(where, f"touches {own or path}", _ONLY)
    if not all(part.isidentifier() for part in own.removesuffix(".py").split("/")):
        raise PatchError(where, f"touches {own}, which is no module's name", _ONLY)
    return own.removeprefix(ROOT)


def _change(where: str, path: str, number: int, hunk: Hunk) -> Change:
    old: list[str] = []
    new: list[str] = []
    kinds: list[str] = []
    for line in hunk:
        if line.line_type == "\\":
            # The line before it ends without a newline, in the file or files that it belongs to.
            for lines, marks in ((old, " -"), (new, " +")):
                if lines and kinds[-1] in marks:
                    lines[-1] = lines[-1].removesuffix("\n")
            continue
        if line.line_type not in (" ", "-", "+"):
            continue  # an empty line after the hunk
        kinds.append(line.line_type)
        if line.line_type != "+":
            old.append(line.value)
        if line.line_type != "-":
            new.append(line.value)
    at = next((line.diff_line_no for line in hunk if line.diff_line_no), 0) - 1
    text = "".join(kinds)
    changed = text.strip(" ")
    if not changed:
        raise PatchError(f"{where}: hunk {number} of {full_path(path)}", "changes nothing", _UNIFIED)
    leading, trailing = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    return Change(number, at, hunk.source_start, tuple(old), tuple(new), leading, trailing)


def _check_all_lines(name: str, text: str, found: PatchSet) -> None:
    """Raise PatchError for a line that looks like a part of a hunk and is in none."""
    lines = lines_of(text)
    within: set[int] = set()
    for one in found:
        for hunk in one:
            numbers = [line.diff_line_no for line in hunk if line.diff_line_no]
            within.update(range(numbers[0] - 1, numbers[-1] + 1))
    for number in sorted(within):
        after = number + 1
        if after in within or after > len(lines):
            continue
        line = lines[after - 1]
        if line in _SIGNATURE or line.startswith(("--- ", "\\ No newline")):
            continue
        if line.startswith(("+", "-", " ", "\t")):
            raise PatchError(f"{name}:{after}", f"{shown(line.rstrip())} after the end of a hunk", _UNIFIED)
    for number, line in enumerate(lines, 1):
        if line.startswith("@@") and number not in within:
            raise PatchError(f"{name}:{number}", f"{shown(line.rstrip())} begins no hunk", _UNIFIED)
