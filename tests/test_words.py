"""Comments and docstrings are read once: two rules of their wording that can be counted.

Relative pronouns where a noun is meant make a reader look for the actor, and a docstring that begins with one
names no action.  The point is not the count; a sentence that satisfies it can still be bad.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("emulator", "native", "metrics", "bench")
# Per 1,000 words of comments and docstrings.
MOST = 1.0

PRONOUNS = re.compile(r"\b(?:who|whoever|whose|somebody|nobody|anybody)\b", re.IGNORECASE)
WHAT = re.compile(r"\bwhat\b(?![^.?!]*\?)", re.IGNORECASE)
NO_ACTION = re.compile(r"\s*(?:What|Who|Of|Those|The same)\b")
_C_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                yield getattr(node, "lineno", 1), text


def prose(path: Path) -> Iterator[str]:
    """Yield the comments and docstrings of a file."""
    source = path.read_text("utf-8")
    if path.suffix != ".py":
        yield from _C_COMMENT.findall(source)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for _, text in docstrings(source):
        yield text


def sources(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".c", ".h")]


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("pattern", [PRONOUNS, WHAT], ids=["pronouns", "what"])
def test_prose_names_its_nouns(folder: str, pattern: re.Pattern[str]) -> None:
    words, found = 0, []
    for path in sources(folder):
        for text in prose(path):
            words += len(re.findall(r"[A-Za-z']+", text))
            found += [f"{path.relative_to(ROOT)}: {text.strip()[:100]}" for _ in pattern.findall(text)]
    assert words > 500
    assert 1000 * len(found) <= MOST * words, f"{len(found)} in {words} words:\n" + "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_begin_with_an_action(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text[:60]}"
        for path in sources(folder)
        if path.suffix == ".py"
        for line, text in docstrings(path.read_text("utf-8"))
        if NO_ACTION.match(text)
    ]
    assert found == []


def test_what_breaks_the_rules_is_found(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text('"""What whoever does."""\n# Somebody waits.  What for?\n')
    found = list(prose(path))
    assert sum(len(PRONOUNS.findall(text)) for text in found) == 2
    assert sum(len(WHAT.findall(text)) for text in found) == 1  # a question is none
    assert NO_ACTION.match(found[1])
