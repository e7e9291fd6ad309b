"""The guide's table of the six roots of the TDP MMU, and of all roots of one vCPU, when the vCPU moves."""

from __future__ import annotations

from typing import Final

import pytest

from emulator.explore.machine.lib import instrument
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results.verdict import explore_verdict
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.search import Limits, search
from emulator.guide import page
from emulator.kvm.mmu.roots import mmu_roots
from emulator.kvm.mmu.spte import root_to_sp
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy
from native import FLUSH_REASONS, FLUSH_SCOPES, ffi, lib

KEEP: Final = "linux-7.3+role_change=keep-roots"


def ended(test: str, policy: str) -> LitmusProgram:
    """Return the program after one execution, in which each thread runs until it waits."""
    program = LitmusProgram(load_test(test), named_policy(policy))
    with instrument(program.control):
        search(program, program.objects, Exhaustive(program.objects, bound=0), Limits(1), bool)
    return program


def migration_flushes(test: str, policy: str) -> str:
    """Return the flushes for a move of a VMCS, in the words of the table."""
    program = ended(test, policy)
    n = len(FLUSH_REASONS)
    size = program.machine.config["vms"] * len(FLUSH_SCOPES) * n
    made, necessary = ffi.new("uint64_t[]", size), ffi.new("uint64_t[]", size)
    lib.flushes_sum(program.machine.m, made, necessary)
    reason = FLUSH_REASONS.index("migration")
    counts = {scope: made[i * n + reason] for i, scope in enumerate(FLUSH_SCOPES)}
    program.close()
    names = {"invept_global": "global", "invept_single": "single", "invvpid_single": "INVVPID"}
    return ", ".join(f"{count} {names[scope]}" for scope, count in counts.items() if count)


def rows() -> list[list[str]]:
    text = page("nested").partition("## Six roots")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def test_six_roots_are_alive_at_once() -> None:
    program = ended("nested-six-roots", "linux-7.3")
    (kvm,) = program.harness.kvms
    roles = {(root.role.level, root.role.smm, root.role.guest_mode) for root in kvm.tdp_mmu_roots}
    program.close()
    assert roles == {(level, *mode) for level in (4, 5) for mode in ((0, False), (1, False), (0, True))}


@pytest.mark.parametrize(("policy", "smm"), [("linux-7.3", 0), (KEEP, 1)])
def test_a_vcpu_holds_roots_of_both_mmus(policy: str, smm: int) -> None:
    """After the last RSM the vCPU has freed all; with keep-roots each is one of its previous roots."""
    program = ended("nested-all-roots", policy)
    (vcpu,) = program.harness.kvms[0].vcpus
    found = [root_to_sp(root) for root in mmu_roots(vcpu.root_mmu)]
    guest = len(mmu_roots(vcpu.guest_mmu))
    modes = sorted((sp.role.smm, sp.role.guest_mode) for sp in found if sp is not None)
    program.close()
    assert (modes, guest) == (([(0, False), (0, True), (1, False)], 2) if smm else ([(0, False)], 0))


def test_the_table_has_every_policy_twice() -> None:
    policies = [row[0] for row in rows()]
    assert len(policies) == len(set(policies)) == 8
    assert {policy.partition("+")[0] for policy in policies} == set(policies[:5])


@pytest.mark.slow
@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row(row: list[str]) -> None:
    policy, *cells = row
    for test, verdict, flushes in zip(
        ("nested-six-roots", "nested-all-roots"), cells[::2], cells[1::2], strict=True
    ):
        found = explore_verdict(load_test(test), named_policy(policy))
        assert found.complete or found.kinds
        assert (found.kinds[0] if found.kinds else str(found.verdict)) == verdict
        assert migration_flushes(test, policy) == flushes
