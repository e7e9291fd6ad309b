"""Reports an error in a file in one line: the key, the value found, the values expected."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from emulator.errors import BadInput, closest, shortened, shown

# Most bytes of a file that is read at once: many times the need of any file, and less than the machine has.
MOST_TOML: Final = 256 << 10
MOST_JSON: Final = 256 << 20
_MOST_KEY: Final = 100
# Most dots of a key, since a key of n parts costs tomllib n * n steps.  Dots are counted between equals signs
# and line breaks, which no key contains.
_MOST_DOTS: Final = 200


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit of a numeric field, for its errors: the plural of the things that it `counts` ("MiB"), or the
    thing that the number `names` ("a vCPU")."""

    counts: str = ""
    names: str = ""

    def number(self, kind: str) -> str:
        """Return the expectation for a value that is no such number; `kind`: "a number" or "a whole
        number"."""
        return f"{kind} of {self.counts}" if self.counts else f"the number of {self.names}, {kind}"

    def bound(self, word: str, value: float) -> str:
        """Return the expectation for a number that is out of bounds; `word`: "at least", for example."""
        number = f"{word} {int(value) if value == int(value) else value}"
        return f"{number} {self.counts}" if self.counts else f"the number of {self.names}, {number}"


def read_bytes(path: Path, expected: str, most: int, complain: type[BadInput] = BadInput) -> bytes:
    """Return the content of a file; raise `complain` if it cannot be read or has more than `most` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise complain(str(path), error.strerror or str(error), expected) from error
    except ValueError as error:
        raise complain(str(path), "a file name with a NUL byte", expected) from error
    if len(data) > most:
        raise complain(str(path), f"more than {most >> 10} KiB", expected)
    return data


def read_text(path: Path, expected: str, most: int = MOST_TOML) -> str:
    """Return a file's text without a byte order mark; raise BadInput if it cannot be read."""
    try:
        return read_bytes(path, expected, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(str(path), f"not UTF-8: {error.reason} at byte {error.start}", expected) from error


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Return the content of a TOML text; raise BadInput, which names `where`, if it is none."""
    if any(part.count(".") > _MOST_DOTS for line in text.splitlines() for part in line.split("=")):
        raise BadInput(where, f"not TOML: more than {_MOST_DOTS} dots in a key", "tables in tables, few deep")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(where, f"not TOML: {error}") from error
    except RecursionError as error:
        raise BadInput(where, "not TOML: nested too deeply") from error
    except ValueError as error:
        raise BadInput(where, "not TOML: a number of too many digits") from error


def read_json(path: Path, expected: str) -> Any:
    """Return the content of a JSON file; raise BadInput if it is none."""
    text = read_text(path, expected, MOST_JSON)
    try:
        # JSON can spell lone surrogates, which no output can encode: replace them.
        whole = json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8", "replace")
        return json.loads(whole)
    except json.JSONDecodeError as error:
        raise BadInput(str(path), f"not JSON: {error}", expected) from error
    except RecursionError as error:
        raise BadInput(str(path), "not JSON: nested too deeply", expected) from error
    except ValueError as error:
        # Python refuses to read a number of more than some thousand digits.
        raise BadInput(str(path), "a number of too many digits", expected) from error


def first_error(error: ValidationError, model: type[BaseModel]) -> tuple[str, str | None]:
    """Return (found, expected) of the first error, ready for `BadInput`.

    Unknown keys go first: a mistyped key is often the reason why another one is missing.
    """
    errors = sorted(error.errors(), key=_rank)
    # A list with one entry, which is wrong, is also called too short.
    errors = [errors[0], *(e for e in errors[1:] if e["type"] != "too_short")]
    details = errors[0]
    key = dotted(details["loc"])
    found, expected = _describe(details, model)
    prefix = f"{key}: " if key else ""
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return prefix + found, None if expected is None else expected + more


def _rank(details: ErrorDetails) -> int:
    return {"extra_forbidden": 0, "too_short": 2}.get(details["type"], 1)


def dotted(location: tuple[int | str, ...]) -> str:
    """Return a location as text of bounded length: ("vm", 0, "vcpus") -> "vm[0].vcpus"."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return shortened(text, _MOST_KEY)


def _describe(details: ErrorDetails, model: type[BaseModel]) -> tuple[str, str | None]:
    kind = details["type"]
    context: dict[str, Any] = details.get("ctx", {})
    if kind == "extra_forbidden":
        key = str(details["loc"][-1])
        return "found an unknown key", _known_keys(model, details["loc"], key)
    unit = _unit_at(model, details["loc"])
    if kind == "missing":
        return "found nothing", f"this key, {unit.number('a number')}" if unit else "this key to be present"
    found = f"found {shown(details['input'])}"
    if kind == "value_error":
        # The validators of this project give the expectation as their message.  An enumeration's parser
        # repeats the value found, which is in the line already: drop it.
        said = str(context.get("error", details["msg"])).rstrip(".")
        value = details["input"]
        return found, said.removeprefix(f"{value!r} is not ") if isinstance(value, str) else said
    return found, _expected(kind, context, details["msg"], unit)


def _expected(kind: str, context: dict[str, Any], message: str, unit: Unit | None) -> str:
    for bound, (name, word) in _BOUNDS.items():
        if kind == bound:
            return unit.bound(word, context[name]) if unit else f"{word} {context[name]}"
    if kind in _NUMBERS or kind.startswith(("int_", "float_")):
        number = _NUMBERS.get(kind, "a whole number" if kind.startswith("int_") else "a number")
        return unit.number(number) if unit else number
    lengths = {
        "literal_error": f"one of {context.get('expected')}",
        "too_short": f"at least {context.get('min_length')} entries",
        "too_long": f"at most {context.get('max_length')} entries",
        "string_too_short": f"at least {context.get('min_length')} characters",
        "string_too_long": f"at most {context.get('max_length')} characters",
        "model_type": "a table",
        "dict_type": "a table",
        "list_type": "a list",
        "tuple_type": "a list",
    }
    if kind in lengths:
        return lengths[kind]
    types = {"bool": "true or false", "string": "a text"}
    return types.get(kind.split("_")[0], message[0].lower() + message[1:])


# Kinds of pydantic's errors about bounds: the entry of their context that has the bound, and its words.
_BOUNDS: Final = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
_NUMBERS: Final = {"finite_number": "a finite number"}


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...], key: str) -> str:
    fields = _model_at(model, location[:-1]).model_fields
    known = sorted(field.alias or name for name, field in fields.items())
    close = closest(key, known)
    return f"one of {', '.join(known)}" if close is None else repr(close)


def _unit_at(model: type[BaseModel], location: tuple[int | str, ...]) -> Unit | None:
    """Return the unit of the field that the location is in."""
    names = [part for part in location if isinstance(part, str)]
    field = _model_at(model, tuple(names[:-1])).model_fields.get(names[-1]) if names else None
    return unit_of(field) if field is not None else None


def unit_of(field: FieldInfo) -> Unit | None:
    """Return the unit that a field is declared with."""
    return next((entry for entry in field.metadata if isinstance(entry, Unit)), None)


def _model_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            inner = _inner_model(model.model_fields[part].annotation)
            if inner is not None:
                model = inner
    return model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation such as Model or tuple[Model, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        inner = _inner_model(argument)
        if inner is not None:
            return inner
    return None
