"""What is wrong with a file in one line: which key, what was found, what is expected."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from emulator.errors import BadInput


def read_json(path: Path, expected: str) -> Any:
    """What a JSON file holds; raises BadInput."""
    try:
        document = json.loads(path.read_text("utf-8"))
        # JSON can spell halves of characters, which no output takes.
        whole = json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
        return json.loads(whole)
    except OSError as error:
        raise BadInput(str(path), error.strerror or str(error), "a readable file") from error
    except UnicodeDecodeError as error:
        raise BadInput(str(path), "not UTF-8", expected) from error
    except json.JSONDecodeError as error:
        raise BadInput(str(path), f"not JSON: {error}", expected) from error
    except RecursionError as error:
        raise BadInput(str(path), "not JSON: nested too deeply", expected) from error
    except ValueError as error:
        # Python reads no number of more than some thousand digits.
        raise BadInput(str(path), "a number of too many digits", expected) from error


def first_error(error: ValidationError, model: type[BaseModel]) -> tuple[str, str | None]:
    """(found, expected) of the first error, ready for `BadInput`.

    Unknown keys go first: a mistyped key is often why another one is missing.
    """
    errors = sorted(error.errors(), key=_rank)
    # A list whose only entry is wrong is also called too short.
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
    """("vm", 0, "vcpus") -> "vm[0].vcpus"."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _describe(details: ErrorDetails, model: type[BaseModel]) -> tuple[str, str | None]:
    kind = details["type"]
    context: dict[str, Any] = details.get("ctx", {})
    if kind == "extra_forbidden":
        key = str(details["loc"][-1])
        return "found an unknown key", _known_keys(model, details["loc"], key)
    if kind == "missing":
        return "found nothing", "this key to be present"
    if kind == "value_error":
        # Our own validators say what they expect.
        # An enumeration's parser says what was found as well, which we do ourselves.
        said = str(context.get("error", details["msg"])).rstrip(".")
        return f"found {_shown(details['input'])}", said.removeprefix(f"{details['input']!r} is not ")
    return f"found {_shown(details['input'])}", _expected(kind, context, details["msg"])


def _expected(kind: str, context: dict[str, Any], message: str) -> str:
    bounds = {
        "greater_than_equal": f"at least {context.get('ge')}",
        "greater_than": f"more than {context.get('gt')}",
        "less_than_equal": f"at most {context.get('le')}",
        "less_than": f"less than {context.get('lt')}",
        "literal_error": f"one of {context.get('expected')}",
        "too_short": f"at least {context.get('min_length')} entries",
        "string_too_short": f"at least {context.get('min_length')} characters",
        "model_type": "a table",
        "dict_type": "a table",
    }
    types = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text"}
    if kind in bounds:
        return bounds[kind]
    name = kind.split("_")[0]
    if name in types:
        return types[name]
    if kind in ("list_type", "tuple_type"):
        return "a list"
    return message[0].lower() + message[1:]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...], key: str) -> str:
    known = sorted(_model_at(model, location[:-1]).model_fields)
    close = difflib.get_close_matches(key, known, n=1)
    return f"{close[0]!r}" if close else f"one of {', '.join(known)}"


def _model_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            inner = _inner_model(model.model_fields[part].annotation)
            if inner is not None:
                model = inner
    return model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as Model or tuple[Model, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        inner = _inner_model(argument)
        if inner is not None:
            return inner
    return None
