"""Options that commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer

from emulator.cli.options import GeometryChoice, MachineOptions, RunOptions, duration_of, expanded
from emulator.errors import BadInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Own(MachineOptions):
    colour: Annotated[str, typer.Option(help="Of what?")] = "red"


def called(*words: str) -> dict[str, Any]:
    """Return the values that a command with these options was called with."""
    seen: dict[str, Any] = {}
    app = typer.Typer()

    @app.command()
    @expanded
    def command(name: str = "nobody", *, options: Own) -> None:
        """Says what it does."""
        seen.update(name=name, options=options)

    typer.main.get_command(app).main(args=list(words), standalone_mode=False)
    return seen


def test_fields_are_options_after_the_commands_own() -> None:
    seen = called("--name", "x", "--pcpus", "7", "--colour", "blue", "--geometry", "unbounded")
    assert seen["name"] == "x"
    assert (seen["options"].pcpus, seen["options"].colour, seen["options"].unbounded) == (7, "blue", True)


def test_defaults_are_those_of_the_fields() -> None:
    assert called() == {"name": "nobody", "options": Own()}


@pytest.mark.parametrize("words", [["--pcpus", "0"], ["--pcpus", "5000"], ["--seed", "-1"], ["--chaos", "x"]])
def test_bounds_hold(words: list[str]) -> None:
    with pytest.raises(typer.TyperException):
        called(*words)


def test_without_a_seed_every_run_has_another() -> None:
    assert RunOptions(seed=5).chosen_seed == 5
    assert len({RunOptions().chosen_seed for _ in range(20)}) > 1


def test_words_for_the_rest_of_the_program() -> None:
    options = RunOptions(geometry=GeometryChoice.DEFAULT)
    assert (options.unbounded, options.log_form) == (False, "text")


def test_durations() -> None:
    assert duration_of(None) is None
    assert duration_of("500ms") == 0.5
    for text in ("0s", "soon"):
        with pytest.raises(BadInput, match="--duration"):
            duration_of(text)
