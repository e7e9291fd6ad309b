"""The table of the guide's page about nested guests, row by row."""

from __future__ import annotations

import re

import pytest

from emulator.explore.results.verdict import explore_verdict
from emulator.guide import page
from emulator.litmus.loader import load_test, parse_test
from emulator.litmus.policies import named_policy
from emulator.litmus.runner import running
from emulator.policy import Policy
from native import FLUSH_REASONS, FLUSH_SCOPES, ffi, lib

BEFORE = {"nested_transition": "apic-access-flush"}
POLICIES = ("linux-7.3", "nested_transition=apic-access-flush")
ROUND = '"l2-enter", "l2-apic 0x10", "read 0x10"]'


def rows() -> list[list[str]]:
    lines = re.findall(r"^\| `(nested-apic-.*) \|$", page("nested"), re.MULTILINE)
    return [[cell.strip(" `") for cell in line.split("|")] for line in lines]


def verdict(test: str, policy: Policy) -> str:
    found = explore_verdict(load_test(test), policy)
    assert found.complete or found.kinds
    return found.kinds[0] if found.kinds else str(found.verdict)


def flushes(test: str, rounds: int, policy: Policy) -> int:
    """INVEPT and INVVPID of an execution with so many more round trips."""
    text = load_test(test).text
    assert text.count(ROUND) == 1
    longer = text.replace(ROUND, ROUND.removesuffix("]") + rounds * f", {ROUND}".removesuffix("]") + "]")
    with running(parse_test(longer, f"{test}.toml", None)) as runner:
        runner.run(policy, 1, 0)
        size = runner.machine.config["vms"] * len(FLUSH_SCOPES) * len(FLUSH_REASONS)
        made, necessary = ffi.new("uint64_t[]", size), ffi.new("uint64_t[]", size)
        lib.flushes_sum(runner.machine.m, made, necessary)
        return sum(made)


def test_the_table_has_every_configuration() -> None:
    assert {tuple(row[1:4]) for row in rows()} >= {
        (ept, *vpids) for ept in ("yes", "no") for vpids in (("yes", "yes"), ("yes", "no"), ("no", "-"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row_of_the_table(row: list[str]) -> None:
    test, _, _, _, none, shared, merged, before = row
    shared_root = named_policy("mutant:nested-role-without-guest-mode")
    # Without EPT and VPIDs the processor drops everything, so that no policy can go wrong.
    due = load_test(test).expect.default
    assert verdict(test, named_policy("nested_transition=none")) == none
    assert verdict(test, shared_root) == shared
    for policy, each in zip(map(named_policy, POLICIES), (merged, before), strict=True):
        assert verdict(test, policy) == due
        assert flushes(test, 3, policy) - flushes(test, 1, policy) == 2 * int(each)
    # Where L1 and L2 share a root the flush of before 5.5 is needed.
    assert verdict(test, shared_root.with_settings(BEFORE, "shared root, before 5.5")) == due


def cells_below(heading: str) -> list[tuple[str, str, str]]:
    """Return test, policy and verdict of each cell of the first table below a heading."""
    text = page("nested").partition(heading)[2].partition("\n\n|")[2].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    head, _, *body = lines
    found = []
    for name, *cells in body:
        test, _, answer = name.replace("`", "").partition(" with ")
        found += [
            (test, f"{policy}+{answer}".rstrip("+"), cell)
            for policy, cell in zip(head[1:], cells, strict=True)
        ]
    return found


MIGRATIONS = cells_below("## A migration")
HYPERV = cells_below("## Hyper-V below KVM")


def test_the_tables_of_verdicts_have_every_policy() -> None:
    assert (len(MIGRATIONS), len(HYPERV)) == (30, 16)


@pytest.mark.slow
@pytest.mark.parametrize(("test", "policy", "due"), [*MIGRATIONS, *HYPERV])
def test_a_cell_of_the_tables_of_verdicts(test: str, policy: str, due: str) -> None:
    assert verdict(test, named_policy(policy)) == due
