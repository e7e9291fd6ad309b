"""Options, arguments and variables that are given, and are empty or blank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from emulator.cli.main import app, main

TEXTS = ("", " ", "\t\n")


def parameters() -> Iterator[tuple[list[str], Any]]:
    """Each command's words, and each of its parameters that takes a value."""

    def of(command: Any, words: list[str]) -> Iterator[tuple[list[str], Any]]:
        before: list[str] = []
        for parameter in command.params:
            if not parameter.opts[0].startswith("-"):
                yield [*words, *before], parameter
                before.append("x")
            elif not getattr(parameter, "is_flag", False):
                yield words, parameter
        for name, inner in getattr(command, "commands", {}).items():
            yield from of(inner, [*words, name])

    return of(typer.main.get_command(app), [])


FOUND = list(parameters())


def test_there_are_parameters() -> None:
    names = {parameter.opts[0] for _, parameter in FOUND}
    assert {
        "--policy",
        "--set",
        "--report-dir",
        "--output",
        "--metrics",
        "--html",
        "scenario",
        "files",
    } <= names


@pytest.mark.slow
@pytest.mark.parametrize(("words", "parameter"), FOUND, ids=lambda value: getattr(value, "name", None))
def test_a_blank_value_is_refused(
    words: list[str],
    parameter: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    option = parameter.opts[0]
    for text in TEXTS:
        given = [option, text] if option.startswith("-") else [text]
        assert main([*words, *given]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), (words, given)
        assert option.upper().lstrip("-") in err.upper()
        assert "expected" in err or "Missing" in err, err
    assert not [*tmp_path.iterdir()]


VARIABLES = sorted(
    {(tuple(words), parameter.envvar) for words, parameter in FOUND if isinstance(parameter.envvar, str)}
)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "variable"), VARIABLES)
def test_a_blank_variable_is_refused(
    words: tuple[str, ...],
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for text in TEXTS:
        monkeypatch.setenv(variable, text)
        assert main([*words]) == 2
        out, err = capsys.readouterr()
        assert (out, err) == (
            "",
            f"flushlab: {variable}: found {text!r}; expected a value, or no {variable}\n",
        )


SPELLINGS = [
    "+",
    "x=",
    "=none",
    "linux-7.3+",
    "mutant:",
    "migration=",
    ",",
    ".py",
    "migration=none,",
    "a.py+",
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "text"), [*itertools.product(["run", "explore", "litmus"], SPELLINGS)])
def test_names_of_nothing_are_refused(command: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    test = ["return-zap"] if command != "run" else []
    assert main([command, *test, "--policy", text]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
