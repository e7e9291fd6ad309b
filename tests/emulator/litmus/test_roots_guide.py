"""The tables of the guide's page about role changes, cell by cell."""

from __future__ import annotations

import re

import pytest

from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.guide import page
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy
from emulator.policy import DEFAULT
from emulator.policy.points import BY_NAME

POLICIES = {
    "7.3": DEFAULT,
    "merged": "lkml-2022-merged",
    "`unload-all`": "role_change=unload-all",
    "as posted": "lkml-2022-keep-roots",
    "`keep-roots`": "role_change=keep-roots",
    "`-synced`": "role_change=keep-roots-synced",
}
# The decision points of the thread, and of what shadow paging needs besides.
STEPS = ("paging_off", "pcide_on", "smep_on", "noflush_root", "commit_zap", "spte_replace", "table_protect")
MOST = 300


def table(first: str) -> list[list[str]]:
    """Return the rows, the header included, of the table with that first cell."""
    found = re.search(rf"^\| {first} \|.*\n(?:\|.*\n?)+", page("roots"), re.MULTILINE)
    assert found, first
    lines = [line for line in found[0].splitlines() if not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]


def changes() -> list[tuple[str, str, str]]:
    header, *rows = table("change")
    cells = []
    for _, test, *verdicts in rows:
        cells += [
            (test.strip("`"), POLICIES[name], verdict)
            for name, verdict in zip(header[2:], verdicts, strict=True)
        ]
    return cells


def steps() -> list[tuple[str, str, str]]:
    return [
        (test, answer.strip("`"), verdict)
        for _, answer, verdict, tests in table("step")[1:]
        for test in re.findall(r"`(.*?)`", tests)
    ]


def test_the_tables_have_every_change_and_every_answer() -> None:
    assert len(changes()) == 10 * len(POLICIES)
    answers = {part for _, answer, _ in steps() for part in answer.split(",")}
    assert {f"{point}={name}" for point in STEPS for name in BY_NAME[point].names()} <= answers


@pytest.mark.slow
@pytest.mark.parametrize(("test", "policy", "verdict"), [*changes(), *steps()])
def test_a_cell(test: str, policy: str, verdict: str) -> None:
    found = explore_verdict(load_test(test), named_policy(policy), Plan(executions=MOST, minimize=False))
    if verdict == "**refuted**":
        assert found.kinds, f"flushlab explore {test} --policy {policy}"
    else:
        assert verdict.partition(":")[0] == "proved"
        assert found.complete, f"flushlab explore {test} --policy {policy}: {found.verdict}"
        assert found.verdict == "safe"
