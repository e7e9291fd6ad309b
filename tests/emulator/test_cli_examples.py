"""The examples below a command's help stand there as one can type them, also in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from emulator.cli.main import app, main

COLUMNS = 80


def commands() -> Iterator[tuple[list[str], str]]:
    """Yield the words of each command that has an epilog, and the epilog."""

    def of(command: Any, words: list[str]) -> Iterator[tuple[list[str], str]]:
        if words and command.epilog:
            yield words, command.epilog
        for name, inner in getattr(command, "commands", {}).items():
            yield from of(inner, [*words, name])

    return of(typer.main.get_command(app), [])


FOUND = list(commands())


def examples(epilog: str) -> list[str]:
    """Return the lines of commands, with the lines that continue them."""
    lines: list[str] = []
    for line in epilog.splitlines():
        continued = bool(lines) and lines[-1].endswith("\\")
        if continued or line.strip().startswith(("flushlab ", "valgrind ", "trace-cmd ", "| ")):
            lines.append(line)
    return lines


def test_commands_with_examples_are_found() -> None:
    found = {" ".join(words): examples(epilog) for words, epilog in FOUND}
    for command in ("explore", "litmus", "drift", "import", "man", "replay"):
        assert any(line.split()[:2] == ["flushlab", command] for line in found[command]), command
    assert len(found["explore"]) > 8
    assert len(found["trace convert"]) == 3


@pytest.mark.parametrize(("words", "epilog"), FOUND, ids=lambda value: value[-1] if value else None)
def test_an_example_is_not_wrapped(
    words: list[str], epilog: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    assert main([*words, "--help"]) == 0
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, shown)) <= COLUMNS
    for line in examples(epilog):
        assert any(other.lstrip() == line.strip() for other in shown), line
    # Text is either laid out by hand (after a line with \b) or wrapped by the terminal's width.
    for paragraph in epilog.split("\n\n"):
        assert paragraph.startswith("\b") or "\n" not in paragraph.strip("\n"), paragraph
        assert not paragraph.startswith("\b") or max(map(len, paragraph.splitlines())) <= COLUMNS - 2
