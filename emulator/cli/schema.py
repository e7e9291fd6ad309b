"""`flushlab schema`: the JSON Schemas of the documents."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from emulator.output import saying


def schema(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A document, such as run or compare. Without it, the names."),
    ] = None,
) -> None:
    """Print the JSON Schema of a document that --json prints."""
    from emulator.schemas import SCHEMAS
    from emulator.schemas import schema as schema_of

    text = "\n".join(SCHEMAS) if name is None else json.dumps(schema_of(name), indent=1)
    with saying(0):
        print(text)
