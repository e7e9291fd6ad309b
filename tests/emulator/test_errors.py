"""Errors are one line of bounded length, and suggest a name only if one is close."""

from __future__ import annotations

import datetime
import pickle

import pytest

from emulator.errors import BadInput, closest, did_you_mean, one_of, shown
from emulator.traces import TraceError

LONG = ("x" * 70_000, "\n" * 70_000, "\udcff" * 70_000, "\0\x1b[31m\u202e\u2028" * 10_000, "a\tb" * 70_000)

IDS = ("letters", "lines", "halves", "controls", "tabs")


@pytest.mark.parametrize("kind", [BadInput, TraceError])
@pytest.mark.parametrize("text", LONG, ids=IDS)
def test_one_line_of_bounded_length_whatever_went_in(kind: type[BadInput], text: str) -> None:
    for parts in ((text, "b", "c"), ("a", text, "c"), ("a", "b", text), (text, text, text), (text, text)):
        line = str(kind(*parts))
        assert line.isprintable()
        assert len(line) < 3500
        assert line.encode().decode() == line
        assert str(pickle.loads(pickle.dumps(kind(*parts)))) == line


def test_the_ends_of_a_long_path_are_kept() -> None:
    line = str(BadInput(f"/first/{'long/' * 1000}last.toml", "found nothing"))
    assert line.startswith("/first/long/")
    assert line.endswith("/last.toml: found nothing")


@pytest.mark.parametrize(
    "value",
    [
        *LONG,
        10**5000,
        -(10**5000),
        [[[[[[[[[0]]]]]]]]] * 1000,
        {"a" * 1000: {"b": "c" * 1000}},
        dict.fromkeys(map(str, range(1000))),
        b"x" * 70_000,
        float("nan"),
    ],
    ids=(*IDS, "number", "negative", "lists", "tables", "keys", "bytes", "nan"),
)
def test_values_are_shown_in_few_characters(value: object) -> None:
    assert len(shown(value)) <= 80
    assert shown(value).isprintable()


def test_short_values_are_shown_as_they_are() -> None:
    values: tuple[object, ...] = ("a", 3, 1.5, True, [], {"b": 1})
    assert [shown(value) for value in values] == [
        "'a'",
        "3",
        "1.5",
        "True",
        "[]",
        "{'b': 1}",
    ]
    assert shown(datetime.date(1979, 5, 27)) == "1979-05-27"


@pytest.mark.parametrize(
    ("found", "names", "meant"),
    [
        ("pcpu", ("pcpus", "vcpus"), "pcpus"),
        ("vpid", ("pcid", "vcpus", "pages"), None),
        ("migratoin-storm", ("migration-storm", "boot-storm"), "migration-storm"),
        ("Read", ("read", "write"), "read"),
        ("active-roots", ("lkml-2025-active-roots", "linux-7.3"), "lkml-2025-active-roots"),
        ("storm", ("migration-storm", "boot-storm"), None),
        ("colour", ("count", "vcpus"), None),
        ("x", ("y",), None),
        ("", ("a", "b"), None),
        ("a", (), None),
        ("x" * 70_000, ("a" * 30, "b"), None),
    ],
)
def test_guesses_are_close(found: str, names: tuple[str, ...], meant: str | None) -> None:
    assert closest(found, names) == meant
    assert (did_you_mean(found, names) == "") == (meant is None)
    assert one_of(found, names).startswith("one of ")
