"""Finds the kernel functions that the model cites: in names, docstrings and comments.

A function of the model mirrors kernel functions: the one of its own name, and those in the first sentence of
its docstring, or of a C comment that begins with one, as in `kvm_mmu_load(): find or allocate the root`.
Other comments and docstrings mention kernel functions, always with parentheses.  Names of the project's own
functions are among the results; only a record or a kernel tree tells which names are the kernel's.

A citation of a function that the tree's KVM does not have may say, right behind the name, where it is: in
another file of the kernel, `need_resched() (include/linux/sched.h)`; in the versions between,
`tdp_mmu_zap_root_work() (5.18 to 6.5)`; or on the list, `f() (proposed in July 2025)`.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from emulator.drift.c_source import definitions

# A name of one word, such as install(), is not taken for a kernel function.
_CITED: Final = re.compile(r"\b((?:__)?[A-Za-z][A-Za-z0-9]*_\w+)\(\)")
_ORIGIN: Final = re.compile(
    _CITED.pattern + r"[\s#*]+\((?:(?P<file>[\w./-]+\.[ch])"
    r"|(?P<first>\d+\.\d+)[\s#*]+to[\s#*]+(?P<last>\d+\.\d+)"
    r"|proposed[\s#*]+in[\s#*]+(?P<month>\w+\s+\d{4}))\)"
)
_NAME: Final = re.compile(r"(?:__)?[A-Za-z][A-Za-z0-9]*_\w+")
_SENTENCE_END: Final = re.compile(r"\n\s*\n|\.(?=\s)")
_C_COMMENT: Final = re.compile(r"/\*(.*?)\*/", re.DOTALL)


class How(StrEnum):
    """How a place cites a function: by the name of its own function, by the first sentence about it, or in
    another sentence."""

    NAMED = "named"
    MIRRORED = "mirrored"
    MENTIONED = "mentioned"


@dataclass(frozen=True, slots=True, order=True)
class Citation:
    """A place in the project that cites a kernel function."""

    file: str
    line: int
    how: How

    @property
    def mirrors(self) -> bool:
        return self.how is not How.MENTIONED


@cache
def cited() -> dict[str, list[Citation]]:
    """Return the names that the model cites, each with its citations in the order of files and lines.

    The C core is part of the model where its sources are: in a checkout, not in an installed package.
    """
    found: dict[str, set[Citation]] = defaultdict(set)
    for file, path in _sources("emulator", "kvm", (".py",)) + _sources("native", "", (".c", ".h")):
        find = in_python if path.suffix == ".py" else in_c
        for name, line, how in find(path.read_text("utf-8")):
            found[name].add(Citation(file, line, how))
    return {name: sorted(found[name]) for name in sorted(found)}


@dataclass(frozen=True, slots=True)
class Origin:
    """The place of a function that is not in the tree's KVM: a file, a range of versions, or a month in which
    it was proposed."""

    file: str = ""
    first: str = ""
    last: str = ""
    month: str = ""

    def __str__(self) -> str:
        if self.first:
            return f"{self.first} to {self.last}"
        return self.file or f"proposed in {self.month}"


@cache
def origins() -> dict[str, Origin]:
    """Return the origins that citations name."""
    return {
        name: origin
        for _, path in _sources("emulator", "kvm", (".py",)) + _sources("native", "", (".c", ".h"))
        for name, origin in origins_in(path.read_text("utf-8"))
    }


def origins_in(source: str) -> Iterator[tuple[str, Origin]]:
    for match in _ORIGIN.finditer(source):
        found = {key: " ".join((value or "").split()) for key, value in match.groupdict().items()}
        yield match[1], Origin(**found)


def _sources(package: str, folder: str, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Return the files of a package's folder, named from the top of the checkout; import nothing."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    top = Path(spec.submodule_search_locations[0])
    paths = sorted(path for path in (top / folder).rglob("*") if path.suffix in suffixes)
    return [(f"{package}/{path.relative_to(top).as_posix()}", path) for path in paths]


def in_python(source: str) -> Iterator[tuple[str, int, How]]:
    """Yield name, line and manner of each citation in Python source.

    The line of a function that is mirrored is that of the Python function.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and _NAME.fullmatch(node.name):
            yield node.name, node.lineno, How.NAMED
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node):
            yield from _in_docstring(node)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            for match in _CITED.finditer(token.string):
                yield match[1], token.start[0], How.MENTIONED


def _in_docstring(node: ast.FunctionDef | ast.ClassDef | ast.Module) -> Iterator[tuple[str, int, How]]:
    text = ast.get_docstring(node, clean=False) or ""
    head = _first_sentence(text) if isinstance(node, ast.FunctionDef) else 0
    for match in _CITED.finditer(text):
        if match.start() < head:
            yield match[1], getattr(node, "lineno", 1), How.MIRRORED
        else:
            line = node.body[0].lineno + text.count("\n", 0, match.start())
            yield match[1], line, How.MENTIONED


def in_c(source: str) -> Iterator[tuple[str, int, How]]:
    """Yield name, line and manner of each citation in C source."""
    for definition in definitions(source):
        if _NAME.fullmatch(definition.name):
            yield definition.name, definition.first, How.NAMED
    for comment in _C_COMMENT.finditer(source):
        text = comment[1].lstrip(" *\n")
        head = _first_sentence(text) if _CITED.match(text) else 0
        start = comment.end(1) - len(text)
        for match in _CITED.finditer(text):
            line = source.count("\n", 0, start + match.start()) + 1
            yield match[1], line, How.MIRRORED if match.start() < head else How.MENTIONED


def _first_sentence(text: str) -> int:
    end = _SENTENCE_END.search(text)
    return end.start() if end else len(text)
