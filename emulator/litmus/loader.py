"""Litmus tests from the package or from files; errors name file, key, found and expected text."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from emulator.errors import BadInput, did_you_mean, shown
from emulator.litmus.binding import bind
from emulator.litmus.checks import SchemaError
from emulator.litmus.model import LitmusTest
from emulator.policy import canonical, check_policy
from emulator.validation import first_error, parse_toml, read_text


@cache
def shipped_texts() -> dict[str, str]:
    """Return the texts of the tests that ship with the package, by name."""
    directory = resources.files("emulator").joinpath("litmus")
    files = sorted((file.name, file) for file in directory.iterdir() if file.name.endswith(".toml"))
    return {name.removesuffix(".toml"): file.read_text("utf-8") for name, file in files}


@cache
def _shipped_tests() -> tuple[LitmusTest, ...]:
    return tuple(parse_test(text, name, None) for name, text in shipped_texts().items())


def shipped_tests() -> list[LitmusTest]:
    return list(_shipped_tests())


def parse_test(text: str, where: str, path: Path | None) -> LitmusTest:
    """Return a test from its text; errors call it `where`."""
    try:
        test = LitmusTest.model_validate(parse_toml(text, where))
        bind(test)
    except ValidationError as error:
        raise BadInput(where, *first_error(error, LitmusTest)) from error
    except SchemaError as error:
        raise BadInput(f"{where}: {error.key}", f"found {error.found}", error.expected) from error
    for key, names in test.expect.named().items():
        at = f"{where}: expect{key and '.'}{key}"
        for name in names:
            check_policy(name, at)
        twice = [name for name, n in Counter(map(canonical, names)).items() if n > 1]
        if twice:
            raise BadInput(at, f"found a verdict for {twice[0]} by its name and one by its id", "one of them")
    test._name = path.stem if path is not None else where
    test._path = path
    test._text = text
    return test


def load_test(name_or_path: str) -> LitmusTest:
    """Return a shipped test by name, or one from a file: a name with a suffix or a slash is a file."""
    if "/" not in name_or_path and "." not in name_or_path:
        shipped = shipped_texts()
        if name_or_path in shipped:
            return parse_test(shipped[name_or_path], name_or_path, None)
        raise BadInput(
            f"litmus test {shown(name_or_path)}",
            "no such test",
            "a name that `flushlab list litmus` prints, or a .toml file"
            + did_you_mean(name_or_path, shipped),
        )
    path = Path(name_or_path)
    return parse_test(read_text(path, "a readable litmus test"), str(path), path)


def load_tests(names: Iterable[str]) -> list[LitmusTest]:
    """Return tests by name, file, or directory of .toml files, each once; without names all shipped ones."""
    tests: dict[str, LitmusTest] = {}
    for name in names:
        for test in _named(name):
            known = tests.setdefault(test.name, test)
            if _origin(known) != _origin(test):
                # Results are kept by name.
                raise BadInput(
                    str(test.path or test.name),
                    f"the second test of the name {test.name!r}, after {known.path or 'the one that ships'}",
                    "each name once",
                )
    return list(tests.values()) or shipped_tests()


def _named(name: str) -> list[LitmusTest]:
    path = Path(name)
    # Path.is_dir() raises for a name that no file can have.
    if "/" not in name or not os.path.isdir(name):  # noqa: PTH112
        return [load_test(name)]
    files = sorted(path.glob("*.toml"))
    if not files:
        raise BadInput(name, "no .toml file in this directory", "litmus tests")
    return [load_test(str(file)) for file in files]


def _origin(test: LitmusTest) -> Path | None:
    return test.path.resolve() if test.path is not None else None
