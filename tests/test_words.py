"""Comments, docstrings and text that users see are read once: rules of their wording that can be counted.

Relative pronouns where a noun is meant make a reader look for the actor, and a docstring that begins with
one names no action.  Text that users see is read out of order, so no item continues another.  The point is
not the count; a sentence that satisfies it can still be bad.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.litmus.loader import shipped_tests
from emulator.litmus.ops import VERBS
from emulator.policy import MUTANTS, POINTS, PRESET_DOCS

ROOT = Path(__file__).parents[1]
FOLDERS = ("emulator", "native", "metrics", "bench", "tests")
# Per 1,000 words of comments and docstrings.
MOST = 1.0

PRONOUNS = re.compile(r"\b(?:who|whoever|whose|somebody|nobody|anybody)\b", re.IGNORECASE)
WHAT = re.compile(r"\bwhat\b(?![^.?!]*\?)", re.IGNORECASE)
NO_ACTION = re.compile(r"\s*(?:What|Who|Of|Those|The same)\b")
# A version up to which something held: say "before 5.18".  Spans such as "5.18 to 6.5" are meant.
UP_TO = re.compile(r"(?<![\d.] )\bto [2-7]\.\d+\b")
# An item of a list that continues the one before it.
CONTINUES = re.compile(r"\s*(?:\.\.\. |The same\b)")
_TOML_PROSE = re.compile(r'^(?:doc|source|title) = (?:"""(.*?)"""|"(.*?)")', re.DOTALL | re.MULTILINE)
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


# --- text that users see ----------------------------------------------------------------------------------


def strings(source: str) -> Iterator[str]:
    """Yield the string literals of several words, also those inside of f-strings, without docstrings."""
    tree = ast.parse(source)
    bodies = (
        node.body
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    documented = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Constant) and id(node) not in documented else None
        if isinstance(value, str) and " " in value.strip():
            yield value


@cache
def seen_by_users(path: Path) -> tuple[str, ...]:
    """Return a file's text for users: help, lists, errors, reports, tests' subjects, pages of the guide."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        return tuple(strings(text))
    if path.suffix == ".toml":
        return (*(one or other for one, other in _TOML_PROSE.findall(text)), *re.findall(r"#(.*)", text))
    return tuple(text.splitlines())


USER_TEXT = {
    "emulator": sorted(
        path for kind in ("*.py", "*.toml", "*.md") for path in (ROOT / "emulator").rglob(kind)
    ),
    "metrics": sorted((ROOT / "metrics").glob("*.py")),
    "bench": sorted((ROOT / "bench").glob("*.py")),
    "top": [ROOT / name for name in ("README.md", "CONTRIBUTING.md")],
}


@pytest.mark.slow
@pytest.mark.parametrize("place", USER_TEXT)
@pytest.mark.parametrize("pattern", [PRONOUNS, WHAT], ids=["pronouns", "what"])
def test_users_are_told_nouns(place: str, pattern: re.Pattern[str]) -> None:
    words, found = 0, []
    for path in USER_TEXT[place]:
        for text in seen_by_users(path):
            words += len(re.findall(r"[A-Za-z']+", text))
            found += [f"{path.relative_to(ROOT)}: {text.strip()[:100]}" for _ in pattern.findall(text)]
    assert words > 200
    assert len(found) <= max(2, MOST * words / 1000), f"{len(found)} in {words} words:\n" + "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("place", USER_TEXT)
def test_times_are_before_or_since(place: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {text.strip()[:100]}"
        for path in USER_TEXT[place]
        for text in seen_by_users(path)
        if UP_TO.search(text)
    ]
    assert found == []


def items() -> dict[str, str]:
    """Return each item of `flushlab list`, by a name for it."""
    found: dict[str, str] = {}
    for point in POINTS:
        found[point.name] = point.doc
        found |= {f"{point.name}={one.name}": one.doc for one in point.alternatives}
    found |= {mutant.name: mutant.doc for mutant in MUTANTS.values()}
    found |= PRESET_DOCS
    found |= {test.name: test.doc for test in shipped_tests()}
    found |= {kind.verb: kind.doc for kind in VERBS.values()}
    return found


@pytest.mark.parametrize(("name", "text"), items().items(), ids=list(items()))
def test_each_item_of_a_list_is_complete_by_itself(name: str, text: str) -> None:
    """Its sentences are whole, and continue no other item."""
    plain = " ".join(text.split())
    assert not CONTINUES.match(plain)
    assert not NO_ACTION.match(plain) or plain.startswith("What happens"), "names no thing"
    assert plain[0].isupper() or re.match(r"[a-z_]+[-_.(]|khugepaged|kvm", plain), "begins in mid-sentence"
    assert plain.endswith((".", "?"))


@pytest.mark.slow
def test_lists_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["policies"], ["mutants"], ["points"], ["scenarios"], ["litmus"], ["litmus", "--ops"]):
        assert main(["list", *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        # The schema of test files is a page of its own.
        if words != ["litmus", "--ops"]:
            assert [line for line in lines if len(line) > 80] == [], words
        assert len(lines) > 10


def test_what_breaks_the_rules_is_found(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text('"""What whoever does."""\n# Somebody waits.  What for?\nx = f"{x}: who it is"\n')
    assert seen_by_users(path) == (": who it is",)
    assert UP_TO.search("as to 5.17")
    assert not UP_TO.search("5.12 to 5.17")
    assert CONTINUES.match("... on those of the vCPU")
    found = list(prose(path))
    assert sum(len(PRONOUNS.findall(text)) for text in found) == 2
    assert sum(len(WHAT.findall(text)) for text in found) == 1  # a question is none
    assert NO_ACTION.match(found[1])
