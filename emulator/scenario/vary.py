"""Replace single values of a scenario, named by the keys of its file: `vm.count`, `host.unmap`, `pcpus`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any, Final

from pydantic import ValidationError

from emulator.errors import BadInput, shown
from emulator.scenario.config import Scenario
from emulator.validation import first_error

Value = str | int | float | bool
# Scales the scenario as --pcpus does, after the other values have been set.
SCALED: Final = "pcpus"
_WRITTEN: Final = "key=value,value as in vm.count=4,64 or host.unmap=100,1000"


def parse_vary(text: str) -> tuple[str, tuple[Value, ...]]:
    """Return the key and its values from `KEY=V1,V2,...`.  Raises BadInput."""
    key, equals, values = text.partition("=")
    key, parts = key.strip(), [part.strip() for part in values.split(",")]
    if not key or not equals or not all(parts):
        raise BadInput("--vary", f"found {shown(text)}", _WRITTEN)
    found = tuple(map(_value, parts))
    if len(set(map(repr, found))) < len(found):
        raise BadInput("--vary", f"found {shown(text)}", "each value once")
    return key, found


def _value(text: str) -> Value:
    """Return the value that TOML reads, or the text if it reads none."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, str | int | float | bool) else text


def varied(scenario: Scenario, values: Mapping[str, Value]) -> Scenario:
    """Return the scenario with these values, that of a `vm.` key in each kind of VM.  Raises BadInput."""
    contents = scenario.model_dump()
    for key, value in values.items():
        if key == SCALED:
            continue
        for section in _sections(contents, key):
            section[key.rpartition(".")[2]] = value
    try:
        changed = Scenario.model_validate(contents)
    except ValidationError as error:
        given = " ".join(f"{key}={value}" for key, value in values.items())
        raise BadInput(f"--vary {given}", *first_error(error, Scenario)) from error
    # Scenario.changed() carries over the names of the files; model_validate() cannot.
    changed = scenario.changed(**{name: getattr(changed, name) for name in Scenario.model_fields})
    return changed.scaled(_pcpus(values[SCALED])) if SCALED in values else changed


def _sections(contents: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the tables that have the key's last part."""
    tables = [contents]
    for part in key.split(".")[:-1]:
        inner = [table.get(part) for table in tables]
        every = [one for found in inner for one in (found if isinstance(found, list | tuple) else [found])]
        tables = [one for one in every if isinstance(one, dict)]
        if len(tables) < len(every):
            sections = [name for name, value in contents.items() if isinstance(value, dict | list | tuple)]
            raise BadInput("--vary", f"found {shown(key)}", f"a key of {', '.join(sections)}, or {SCALED}")
    return tables


def _pcpus(value: Value) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInput(f"--vary {SCALED}={value}", f"found {value!r}", "a number of pCPUs")
    return value
