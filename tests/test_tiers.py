"""The quick tier stays whole: every package and every directory of tests has quick tests.

Read from the sources, so that it does not depend on which tests this run selects.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
_APART = {"slow", "stress"}


def _marks(node: ast.AST) -> set[str]:
    """Return the names of the marks in an expression: pytest.mark.NAME."""
    return {
        found.attr
        for found in ast.walk(node)
        if isinstance(found, ast.Attribute) and ast.unparse(found.value) == "pytest.mark"
    }


def _is_apart(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return any(_APART & _marks(decorator) for decorator in node.decorator_list)


def _tests(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            yield node
        elif isinstance(node, ast.ClassDef) and not _is_apart(node):
            yield from _tests(node.body)


@dataclass
class Module:
    tests: int
    quick: list[str]
    imports: set[str]

    @classmethod
    def of(cls, source: str) -> Module:
        tree = ast.parse(source)
        tests = list(_tests(tree.body))
        marks = [
            _marks(node)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        ]
        quick = [] if _APART & set().union(*marks) else [test.name for test in tests if not _is_apart(test)]
        imports = {
            *(n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module),
            *(alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names),
        }
        return cls(len(tests), quick, imports)


@cache
def modules() -> dict[Path, Module]:
    return {path: Module.of(path.read_text("utf-8")) for path in PATHS}


PATHS = sorted((ROOT / "tests").rglob("test_*.py"))
DIRECTORIES = sorted({path.parent.relative_to(ROOT).as_posix() for path in PATHS} - {"tests/stress"})
PACKAGES = [
    *(path.parent.relative_to(ROOT).as_posix() for path in sorted((ROOT / "emulator").glob("*/__init__.py"))),
    *("native", "metrics", "bench"),
]


@pytest.mark.slow
@pytest.mark.parametrize("directory", DIRECTORIES)
def test_every_directory_has_quick_tests(directory: str) -> None:
    assert any(path.parent == ROOT / directory and module.quick for path, module in modules().items())


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_quick_tests_import_every_package(package: str) -> None:
    name = package.replace("/", ".")
    quick = [module for module in modules().values() if module.quick]
    assert any(f"{found}.".startswith(f"{name}.") for module in quick for found in module.imports)


@pytest.mark.slow
def test_most_tests_are_quick() -> None:
    """A tier of which most tests have been taken out says little."""
    everything = sum(module.tests for module in modules().values())
    assert everything > 900
    assert sum(len(module.quick) for module in modules().values()) > 0.7 * everything


@pytest.mark.slow
def test_no_example_fails_for_the_time_it_takes() -> None:
    """A busy machine made hypothesis give up: its deadline and its health check are of wall time."""
    for path in PATHS:
        for given in _settings(ast.parse(path.read_text("utf-8"))):
            assert "HealthCheck" not in given or re.search("too_slow|list\\(HealthCheck\\)", given), (
                f"{path}: {given}"
            )
            assert "deadline=" not in given or "deadline=None" in given, f"{path}: {given}"
    assert settings.default is not None
    assert settings.default.deadline is None
    assert HealthCheck.too_slow in settings.default.suppress_health_check


def _settings(tree: ast.Module) -> Iterator[str]:
    """Yield the calls of hypothesis' settings()."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("settings", "hypothesis.settings"):
            yield ast.unparse(node)


def test_marks_are_seen() -> None:
    assert Module.of("import pytest\npytestmark = pytest.mark.slow\ndef test_a(): pass\n").quick == []
    assert Module.of("@pytest.mark.stress\ndef test_a(): pass\ndef test_b(): pass\n").quick == ["test_b"]
    assert Module.of("@pytest.mark.slow\nclass TestA:\n    def test_a(self): pass\n").quick == []
    assert Module.of("@pytest.mark.parametrize('x', [1])\ndef test_a(x): pass\n").quick == ["test_a"]
