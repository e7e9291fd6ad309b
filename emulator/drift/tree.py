"""Reads the parts of a Linux source tree that the model follows: KVM for x86, and its headers."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Final, NoReturn

from emulator.drift.c_source import definitions
from emulator.errors import BadInput, shown
from emulator.validation import read_bytes

# Directories, the names of their files, and whether folders in them count.
PARTS: Final = (
    ("arch/x86/kvm", "*.[ch]", True),
    ("virt/kvm", "*.[ch]", False),
    ("include/linux", "kvm*.h", False),
    ("arch/x86/include/asm", "kvm*.h", False),
)
_EXPECTED: Final = "the top directory of a Linux source tree"
# The largest file of KVM has half a MiB.
_MOST_SOURCE: Final = 8 << 20
_NUMBERS: Final = re.compile(r"(VERSION|PATCHLEVEL|SUBLEVEL|EXTRAVERSION)[ \t]*=[ \t]*([\w.+-]{0,60})[ \t]*")


@dataclass(frozen=True, slots=True)
class Place:
    """A definition in a tree: its file, its lines, and the fingerprint of its tokens."""

    file: str
    first: int
    last: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class LinuxTree:
    top: Path
    version: str
    # All functions and function-like macros, by name, in the order of files and lines.  FNAME(fetch), which
    # stands for a function for each format of guests' tables, is under `fetch`.
    functions: dict[str, list[Place]]

    def fingerprints(self, name: str) -> frozenset[str]:
        return frozenset(place.fingerprint for place in self.functions.get(name, ()))

    def has_word(self, file: str, word: str) -> bool:
        """Return whether a file of the tree, which need not be one of KVM's, has this word."""
        path = self.top / file
        return path.is_file() and re.search(rf"\b{word}\b", _read(path)) is not None

    def text(self, place: Place) -> list[str]:
        """Return the lines of a definition."""
        return _read(self.top / place.file).split("\n")[place.first - 1 : place.last]


def read_tree(top: Path) -> LinuxTree:
    """Read a tree; raise BadInput if the directory is none."""
    version = tree_version(top)
    functions: dict[str, list[Place]] = defaultdict(list)
    for file in _files(top):
        for one in definitions(_read(top / file)):
            name = one.name.removeprefix("FNAME(").removesuffix(")")
            functions[name].append(Place(file, one.first, one.last, one.fingerprint))
    if not functions:
        raise BadInput(str(top), "no C function in arch/x86/kvm and virt/kvm", _EXPECTED)
    return LinuxTree(top, version, dict(functions))


def _files(top: Path) -> Iterator[str]:
    """Yield the files; raise BadInput for a directory that is missing or cannot be read, because a function
    in it would look as if it were gone."""
    for directory, names, folders in PARTS:
        found: list[Path] = []
        for path, inside, files in os.walk(top / directory, onerror=_refuse):
            found += [Path(path, file) for file in files if fnmatch(file, names)]
            if not folders:
                inside.clear()
        yield from sorted(file.relative_to(top).as_posix() for file in found if file.is_file())


def _refuse(error: OSError) -> NoReturn:
    raise BadInput(str(error.filename), error.strerror or str(error), _EXPECTED) from error


def tree_version(top: Path) -> str:
    """Return the version in the Makefile, such as 6.12.117 or 7.4.0-rc1."""
    try:
        file = top.is_file()
    except (OSError, ValueError) as error:
        raise BadInput(str(top), getattr(error, "strerror", None) or str(error), _EXPECTED) from error
    if file:
        raise BadInput(str(top), "a file", f"{_EXPECTED}, unpacked")
    makefile = top / "Makefile"
    if makefile.exists() and not makefile.is_file():
        raise BadInput(str(makefile), "no regular file", _EXPECTED)
    text = read_bytes(makefile, _EXPECTED, _MOST_SOURCE).decode("utf-8", "replace")
    numbers: dict[str, str] = {}
    # They stand before everything else.
    for line in text.splitlines()[:40]:
        if match := _NUMBERS.fullmatch(line):
            numbers.setdefault(match[1], match[2])
    try:
        version = ".".join(str(int(numbers[key])) for key in ("VERSION", "PATCHLEVEL", "SUBLEVEL"))
    except (KeyError, ValueError):
        found = f"no Linux version in its first lines, but {shown(text[:60])}"
        raise BadInput(str(makefile), found, _EXPECTED) from None
    return version + numbers.get("EXTRAVERSION", "")


def _read(path: Path) -> str:
    # Any byte that is no UTF-8 stays what it is.
    return read_bytes(path, _EXPECTED, _MOST_SOURCE).decode("utf-8", "surrogateescape")
