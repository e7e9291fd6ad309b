"""`flushlab new`: starting points for a policy and a litmus test of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from emulator.new import Written

app = typer.Typer(
    help="Write a starting point for a policy or a litmus test.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def policy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The policy's name: the file is NAME.py.")],
    base: Annotated[
        str, typer.Option(metavar="POLICY", help="The preset that answers the points it does not decide.")
    ] = "linux-7.3",
) -> None:
    """Write NAME.py: a policy that runs as it is, with the decision points as comments.

    An existing file is left alone.
    """
    from emulator.new import write_policy

    _report(write_policy(name, base))


@app.command()
def litmus(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The test's name: the file is NAME.toml.")],
) -> None:
    """Write NAME.toml: a litmus test that runs as it is, with its grammar as comments.

    An existing file is left alone.
    """
    from emulator.new import write_litmus

    _report(write_litmus(name))


def _report(written: Written) -> None:
    print(f"{written.path} is written. Try, then edit:\n")
    for command, purpose in written.commands:
        print(f"    # {purpose}\n    {command}")
