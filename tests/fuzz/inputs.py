"""Inputs for parsers: shipped files with something wrong in them, and bytes without a meaning."""

from __future__ import annotations

import copy
import datetime
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from emulator.errors import BadInput

# How many times as many inputs as by default; these differ each time, the default ones do not.
FACTOR = float(os.environ.get("FLUSHLAB_FUZZ") or 1)
# A line of an error, in characters; an input, in seconds of a busy machine.
MOST_CHARACTERS = 3500
MOST_SECONDS = 20.0

# By parser: inputs that were loaded, and those that were refused.
COUNTS: defaultdict[str, Counter[str]] = defaultdict(Counter)


def examples(number: int) -> settings:
    return settings(
        max_examples=max(1, int(number * FACTOR)),
        deadline=None,
        database=None,
        derandomize=FACTOR == 1,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def judge(parser: str, load: Callable[[], object], *names: str) -> None:
    """The input is loaded, or refused in one line of bounded length that begins with one of the names."""
    began = time.monotonic()
    try:
        load()
    except BadInput as error:
        line = str(error)
        COUNTS[parser]["refused"] += 1
        assert line.isprintable(), line
        assert len(line) <= MOST_CHARACTERS, line
        assert line.startswith(names), line
    else:
        COUNTS[parser]["loaded"] += 1
    seconds = time.monotonic() - began
    if seconds > MOST_SECONDS:
        pytest.fail(f"{parser}: {seconds:.0f}s")


# --- texts and bytes ---------------------------------------------------------------------------------------

_FRAGMENTS = st.sampled_from(
    [
        *"[]{}()=.,:;+-_#\"'\\/@ \t\n\r",
        "[[vm]]",
        "[[",
        '"""',
        "'''",
        "\\u0000",
        "\\ud800",
        "\0",
        "\ufeff",
        "\u2028",
        "9" * 5000,
        "0x" + "f" * 5000,
        "[" * 2000,
        "{a=" * 1000,
        "a." * 2000,
        "1e999",
        "nan",
        "-inf",
        "1979-05-27T07:32:00Z",
        "true",
        "x" * 70_000,
        "migration=none",
        "+",
        ".py",
    ]
)


@st.composite
def edited(draw: st.DrawFn, texts: Sequence[str]) -> str:
    """One of the texts with a few cuts, repetitions and insertions."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 3))):
        a = draw(st.integers(0, len(text)))
        b = min(len(text), a + draw(st.sampled_from([0, 1, 3, 20, 200])))
        what = draw(st.sampled_from(["cut", "repeat", "insert", "replace", "splice"]))
        if what == "cut":
            text = text[:a] + text[b:]
        elif what == "repeat":
            text = text[:b] + text[a:b] * draw(st.sampled_from([1, 2, 50])) + text[b:]
        elif what == "splice":
            text = text[:a] + draw(st.sampled_from(texts))[-200:] + text[b:]
        else:
            text = (
                text[:a]
                + draw(st.one_of(_FRAGMENTS, st.text(max_size=5)))
                + text[a if what == "insert" else b :]
            )
    return text


def raw(texts: Sequence[str]) -> st.SearchStrategy[bytes]:
    """Bytes: edited texts, texts and bytes without a meaning, and damaged encodings."""
    surrogates = st.text(st.characters(), max_size=200)
    return st.one_of(
        edited(texts).map(encoded),
        edited(texts).map(encoded),
        surrogates.map(encoded),
        st.binary(max_size=300),
        st.tuples(edited(texts).map(encoded), st.integers(0), st.binary(min_size=1, max_size=2)).map(patched),
        st.sampled_from(texts).map(lambda text: text.encode("utf-16")),
    )


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def patched(parts: tuple[bytes, int, bytes]) -> bytes:
    data, at, patch = parts
    at %= len(data) + 1
    return data[:at] + patch + data[at + len(patch) :]


# --- documents ---------------------------------------------------------------------------------------------

_TOML_VALUES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        [
            0,
            -1,
            1 << 70,
            10**5000,
            10**5000 + 1,
            -(10**5000),
            0.5,
            1e300,
            float("inf"),
            float("nan"),
            True,
            "",
            "x",
            "x" * 70_000,
            "\x1b[31m\n",
            "64 MiB",
            "30s",
            "9" * 400 + "h",
            "sort",
            "a\0b.toml",
            "/dev/zero",
            "v0: read 0x10",
            "wait v0 1",
            [],
            {},
            [[[]]],
            [["x"]],
            {"a": {"b": [1]}},
            datetime.date(1979, 5, 27),
            datetime.time(7, 32),
            datetime.datetime(1979, 5, 27, 7, 32),
        ]
    ),
    st.integers(-10, 5000),
    st.floats(),
    st.text(st.characters(codec="utf-8"), max_size=10),
).map(copy.deepcopy)


@st.composite
def toml_with_something_wrong(draw: st.DrawFn, documents: Sequence[dict[str, Any]]) -> str:
    """One of the documents with values replaced, keys added, renamed and removed."""
    document = json.loads(json.dumps(draw(st.sampled_from(documents))))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            break
        where, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(["replace", "replace", "wrap", "remove", "add", "rename"]))
        if what == "replace":
            where[key] = draw(_TOML_VALUES)
        elif what == "wrap":
            value = where[key]
            twice = [value, copy.deepcopy(value)]
            where[key] = draw(st.sampled_from([[value], [[value]], {"a": value}, twice]))
        elif what == "remove":
            del where[key]
        elif isinstance(where, list):
            where.insert(key, draw(_TOML_VALUES))
        elif what == "add":
            where[draw(st.text(st.characters(codec="utf-8"), max_size=8))] = draw(_TOML_VALUES)
        else:
            name = draw(st.sampled_from([key[:-1], key + "s", key.upper(), key[::-1], "x" * 70_000]))
            where[name] = where.pop(key)
    return toml(document)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container in a document, with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def toml(document: dict[str, Any]) -> str:
    """TOML with each value on one line, tables inline."""
    return "".join(f"{_text(key)} = {_value(value)}\n" for key, value in document.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)} = {_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        if -(10**20) < value < 10**20:
            return str(value)
        # Python writes no decimal number of more than 4300 digits, and TOML no hexadecimal one with a sign.
        return hex(value) if value > 0 and value % 2 else f"{'-' * (value < 0)}1{'0' * 5000}"
    return _text(value) if isinstance(value, str) else str(value)


def _text(text: str) -> str:
    escaped = "".join(
        f"\\U{ord(c):08x}" if ord(c) < 0x20 or ord(c) == 0x7F or c in '"\\' else c for c in text
    )
    return f'"{escaped}"'
