"""Files that are no TOML, no text, or too much of it; and the units of numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from emulator.errors import BadInput
from emulator.litmus.loader import load_test
from emulator.litmus.model import LitmusTest
from emulator.scenario.config import Scenario, load_scenario
from emulator.scenario.costs import Costs, load_costs
from emulator.validation import MOST_TOML, Unit, unit_of

Loader = Callable[[str], object]
LOADERS: dict[str, Loader] = {
    "scenario": load_scenario,
    "litmus": load_test,
    "costs": lambda name: load_costs(Path(name)),
}
DEEP = ".".join("a" * 200)
BYTES = {
    "not UTF-8": b"doc = '\xff'",
    "UTF-16": "doc = 'a'".encode("utf-16"),
    "NUL": b'doc = "a\0"',
    "a number of too many digits": b"doc = " + b"9" * 5000,
    "nested lists": b"doc = " + b"[" * 100_000,
    "nested tables": b"doc = " + b"{a=" * 50_000,
    "a key of many parts": b"a." * 100_000 + b"a = 1",
    "a deep table with many keys": f"[{DEEP}]\n".encode() + b"".join(b"x%d=1\n" % i for i in range(26_000)),
    "deep keys": b"".join(b"x%d.%s=1\n" % (i, DEEP.encode()) for i in range(600)),
    "many tables": b"".join(b"[a%d]\n" % i for i in range(26_000)),
    "too large": b"#" * (MOST_TOML + 1),
    "a key of control characters": b'"\\u001b[31m\\n' + b"k" * 70_000 + b'" = 1',
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("name", BYTES)
def test_what_is_no_file_of_its_kind_is_one_line(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(BYTES[name])
    began = time.process_time()
    with pytest.raises(BadInput) as caught:
        LOADERS[kind](str(path))
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert line.isprintable()
    assert len(line) < 1000
    assert time.process_time() - began < 20  # a second on an idle machine


@pytest.mark.parametrize("kind", LOADERS)
def test_endless_files_and_names_that_no_file_has(kind: str) -> None:
    for name in ("/dev/zero", "/proc/self/mem", "./nul\0.toml", "./" + "x" * 300 + ".toml"):
        with pytest.raises(BadInput):
            LOADERS[kind](name)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_bytes(b"\xef\xbb\xbf[[vm]]\n")
    assert load_scenario(str(tmp_path / "own.toml")).vms == 1


@pytest.mark.parametrize("name", ["a\\u0000b.toml", "/dev/zero", "\\u001b[31m.toml"])
def test_files_that_a_scenario_names(name: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(f'costs = "{name}"\n[[vm]]\n')
    with pytest.raises(BadInput) as caught:
        load_scenario(str(tmp_path / "own.toml"))
    assert str(caught.value).isprintable()


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for inner in leaves(field.annotation):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from models(inner)


def leaves(annotation: Any) -> Iterator[Any]:
    arguments = get_args(annotation)
    yield from [annotation] if not arguments else (leaf for part in arguments for leaf in leaves(part))


def numeric(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {
        f"{inner.__name__}.{name}": field
        for inner in models(model)
        for name, field in inner.model_fields.items()
        if {int, float} & set(leaves(field.annotation))
    }


@pytest.mark.parametrize("model", [Scenario, LitmusTest, Costs])
def test_each_number_says_what_it_counts(model: type[BaseModel]) -> None:
    fields = numeric(model)
    assert fields
    assert {name for name, field in fields.items() if unit_of(field) is None} == set()


def test_units_in_words() -> None:
    assert Unit("MiB").number("a whole number") == "a whole number of MiB"
    assert Unit("MiB").bound("at least", 2) == "at least 2 MiB"
    assert Unit(names="a VM").number("a whole number") == "the number of a VM, a whole number"
    assert Unit(names="a VM").bound("at most", 0.5) == "the number of a VM, at most 0.5"
