"""Read the core's C files: the parts that Python sees, and each declaration and definition.

This is no parser of C: it relies on files without conditional declarations and without functions in macros.

native/build.py loads this module by its path, because pip's build cannot import the package `native`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

HERE: Final = Path(__file__).resolve().parent

_API: Final = re.compile(r"/\* api \*/(.*?)/\* end api \*/", re.DOTALL)
_INCLUDE: Final = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
# Comments, strings, and lines of the preprocessor.
_UNREAD: Final = re.compile(
    r'/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*', re.DOTALL | re.MULTILINE
)
_ATTRIBUTE: Final = re.compile(r"__attribute__\s*\(\(.*?\)\)+")
_FUNCTION: Final = re.compile(r"(?P<type>[\w\s*]*?[\s*])(?P<name>\w+)\s*\((?P<arguments>.*)\)", re.DOTALL)


class Statement(NamedTuple):
    """A statement of the top level.  `before`: the text from the last one to this one, comments included."""

    text: str
    line: int
    body: bool  # with braces: a definition
    before: str

    def function(self) -> tuple[str, tuple[str, ...]] | None:
        """Return name and arguments of the function that it declares or defines; None: it is no function."""
        if self.text.startswith("typedef"):
            return None
        match = _FUNCTION.fullmatch(_ATTRIBUTE.sub("", self.text).strip())
        if match is None:
            return None
        arguments = [re.findall(r"\w+", argument) for argument in match["arguments"].split(",")]
        return match["name"], tuple(words[-1] for words in arguments if words and words != ["void"])

    @property
    def static(self) -> bool:
        return self.text.startswith("static")


@cache
def statements(text: str) -> tuple[Statement, ...]:
    """Return the statements of the top level of a C file."""
    return tuple(_statements(text))


def _statements(text: str) -> Iterator[Statement]:
    code = _UNREAD.sub(lambda unread: re.sub(r"[^\n]", " ", unread[0]), text)
    depth = start = 0
    for match in re.finditer(r"[{};]", code):
        if match[0] == "}":
            depth -= 1
            start = match.end() if depth == 0 else start
        elif match[0] == "{" or depth == 0:
            if depth == 0:
                head = code[start : match.start()]
                begin = start + len(head) - len(head.lstrip())
                if head.strip():
                    line = text.count("\n", 0, begin) + 1
                    yield Statement(head.strip(), line, match[0] == "{", text[start:begin])
                start = match.end()
            depth += match[0] == "{"


def includes(text: str) -> list[tuple[str, int]]:
    """Return the core's own headers that a file includes, each with its line."""
    return [(match[1], text.count("\n", 0, match.start()) + 1) for match in _INCLUDE.finditer(text)]


def sources() -> list[Path]:
    """Return the C files of the core."""
    return sorted(HERE.glob("*/*.c"))


def headers() -> list[Path]:
    """Return the headers, each after the headers that it includes."""
    ordered: list[Path] = []
    entered: set[Path] = set()

    def visit(header: Path) -> None:
        if header in entered:
            return
        entered.add(header)
        for name, _ in includes(header.read_text()):
            if (HERE / name).exists():
                visit(HERE / name)
        ordered.append(header)

    for header in sorted(HERE.glob("*/*.h")):
        visit(header)
    return ordered


def public_headers() -> list[Path]:
    """Return the headers with declarations that Python sees, in dependency order."""
    return [header for header in headers() if _API.search(header.read_text())]


def api_parts(header: Path) -> Iterator[tuple[str, int]]:
    """Yield the parts of a header that Python sees, each with the line that it begins in."""
    text = header.read_text()
    for match in _API.finditer(text):
        yield match[1], text.count("\n", 0, match.start(1)) + 1


def declarations() -> str:
    """Return the declarations that cffi parses: the api parts of all headers, in dependency order."""
    return "\n".join(part for header in headers() for part, _ in api_parts(header))
