"""Two numbers of different meaning that are swapped in a call of the core are an error of types.

mypy is asked about each pair of each call.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from mypy import api

from native import types
from native.stub import STUB

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = {"int", "bool", *types.__all__}

BOUNDS = "the bounds of a range, of which both are of the range's kind"
STATES = "two values of one SPTE"
CPUS = "the sender and its target: two CPUs"
# Pairs that mean the same, with the reason.  mypy must find nothing wrong with them.
ALIKE: Final = {
    **{
        (function, "start", "end"): BOUNDS
        for function in (
            "mm_migrate",
            "mm_present",
            "mm_protect",
            "mm_unmap",
            "mmu_invalidate_overlaps",
            "mmu_invalidate_range_add",
            "mmu_invalidate_retry_range",
            "oracle_revoke",
        )
    },
    ("csd_busy", "cpu", "target"): CPUS,
    ("event_record", "a", "b"): "two words of an event, with a meaning of each kind's own",
    ("guest_add_process", "n", "n_pages"): "two lengths of arrays",
    ("shadow_mmu_set_spte_atomic", "old_spte", "new_spte"): STATES,
    ("smp_call_function_single", "cpu", "target"): CPUS,
    ("tdp_mmu_set_spte_atomic", "old_spte", "new_spte"): STATES,
}


class Swap(NamedTuple):
    """A call with two of its arguments swapped: the text of a function that makes it, in one line."""

    function: str
    first: str
    second: str
    text: str


def swaps() -> Iterator[Swap]:
    """Yield a call for each pair of numbers that a function of the core takes."""
    classes = (node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ClassDef))
    (lib,) = (node for node in classes if node.name == "Lib")
    for node in lib.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        parameters = [
            (argument.arg, ast.unparse(argument.annotation))
            for argument in node.args.posonlyargs[1:]
            if argument.annotation is not None
        ]
        taken = ", ".join(f"{name}: {kind}" for name, kind in parameters)
        numbers = [name for name, kind in parameters if kind in NUMBERS]
        for first, second in combinations(numbers, 2):
            other = {first: second, second: first}
            given = ", ".join(other.get(name, name) for name, _ in parameters)
            yield Swap(node.name, first, second, f"def call({taken}) -> None: lib.{node.name}({given})")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_swap_is_an_error_of_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list(swaps())
    assert len(calls) > 500
    head = (
        "from __future__ import annotations\n"
        "from native import lib\n"
        "from native._native import *\n"
        f"from native.types import {', '.join(types.__all__)}\n"
    )
    # Each in a class of its own, so that no function has the name of another.
    bodies = [f"class Swap{i}:\n    @staticmethod\n    {one.text}\n" for i, one in enumerate(calls)]
    snippet = tmp_path / "swaps.py"
    snippet.write_text(head + "".join(bodies))
    monkeypatch.chdir(ROOT)
    out, err, _ = api.run(["--config-file=", "--strict", f"--cache-dir={tmp_path / 'cache'}", str(snippet)])
    assert not err
    wrong = re.findall(r"swaps\.py:(\d+): error: .*\[([\w-]+)\]$", out, re.MULTILINE)
    assert {code for _, code in wrong} == {"arg-type"}, out
    lines = {int(line) for line, _ in wrong}
    first_line = head.count("\n") + 3
    unnoticed = {one[:3] for i, one in enumerate(calls) if first_line + 3 * i not in lines}
    assert unnoticed == ALIKE.keys()
