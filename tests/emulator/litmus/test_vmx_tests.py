"""The guide's table of the cases of kvm-unit-tests: each is proved, and finds the mutant beside it."""

from __future__ import annotations

import re

import pytest

from emulator.explore.results.verdict import explore_verdict
from emulator.guide import page
from emulator.litmus.loader import load_test
from emulator.litmus.model import SAFE
from emulator.litmus.policies import named_policy
from emulator.policy import MUTANTS

CASE = re.compile(r"^\| (.+) \| `(nested-[\w-]+)` \| `([\w-]+)` \|$", re.MULTILINE)
TABLE: list[tuple[str, str, str]] = CASE.findall(
    page("nested").partition("## The cases of kvm-unit-tests")[2].partition("\n## ")[0]
)


def test_the_table_has_its_cases() -> None:
    assert len(TABLE) == len({case for case, _, _ in TABLE}) == 15


@pytest.mark.slow
@pytest.mark.parametrize(("test", "mutant"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_case(test: str, mutant: str) -> None:
    loaded = load_test(test)
    found = explore_verdict(loaded, named_policy("linux-7.3"))
    assert (found.verdict, found.complete) == (SAFE, True)
    kinds = explore_verdict(loaded, named_policy(f"mutant:{mutant}")).kinds
    assert kinds
    assert set(kinds) <= set(MUTANTS[mutant].expected)
