"""Refuses blank values of options, arguments and environment variables.

An empty `--policy` would stand for the default policy, and an empty `--report-dir` for the current directory.
So a script with an unset shell variable would test something else than it states.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from emulator.errors import BadInput


def refuse_blanks(command: Any) -> None:
    """Let the command and its commands raise BadInput for each parameter that is given and blank."""
    for parameter in command.params:
        parameter.consume_value = partial(_consumed, parameter, parameter.consume_value)
    for inner in getattr(command, "commands", {}).values():
        refuse_blanks(inner)


def _consumed(parameter: Any, consume: Any, context: Any, options: Any) -> Any:
    value, source = consume(context, options)
    if source is not None and source.name == "COMMANDLINE":
        name = parameter.opts[0]
        _check(name if name.startswith("-") else name.upper(), value)
    elif isinstance(parameter.envvar, str) and parameter.envvar in os.environ:
        # Check the variable itself: the parser takes an empty one for unset, and splits that of a list.
        _check(parameter.envvar, os.environ[parameter.envvar])
    return value, source


def _check(name: str, value: object) -> None:
    for text in value if isinstance(value, tuple | list) else (value,):
        if isinstance(text, str) and not text.strip():
            raise BadInput(name, f"found {text!r}", f"a value, or no {name}")
