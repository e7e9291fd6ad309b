"""The mutants: each rule makes some, each applies, and their names stay."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.mutation import names
from bench.mutation.generate import PARTS, Mutant, mutants, mutants_of, part_of, sample, sources
from bench.mutation.source import calls
from emulator.policy.patch import read_patch

TEXT = '''"""A module."""


def zap(cpu, kvm, ranges, start, end):
    """Zap."""
    flush = False
    with kvm.mmu_lock.write_lock(cpu):
        for slot in ranges:  # each of them
            flush |= zap_one(cpu, slot, start, end)
        if flush and slot.valid:
            kvm_flush_remote_tlbs(cpu, kvm)
        else:
            cpu.stat("nothing")
        cpu.point("mode", 1, "write")
        set_mode(cpu, 0)
        kvm_make_all_cpus_request(cpu, kvm, 1)
    return flush


def walk(cpu, kvm, it, start):
    while not it.done:
        if tdp_mmu_iter_cond_resched(cpu, kvm, it):
            continue
        if it.frozen:
            return
        if start < it.end:
            it.step(cpu)
    if not it.frozen:
        cpu.stat("walked")
'''


@pytest.fixture(scope="module")
def made() -> dict[str, Mutant]:
    return {one.name: one for one in mutants_of("m", "emulator/kvm/m.py", TEXT)}


@pytest.fixture(scope="module")
def every() -> tuple[Mutant, ...]:
    return mutants()


def test_each_rule_finds_its_place(made: dict[str, Mutant]) -> None:
    wanted = {
        "drop-request@zap#1": "-        kvm_make_all_cpus_request(cpu, kvm, 1)\n",
        "twice-request@zap#1": "+        kvm_make_all_cpus_request(cpu, kvm, 1)\n",
        "late-request@zap#1": "+    kvm_make_all_cpus_request(cpu, kvm, 1)\n",
        "split-request@zap#1": "+    with kvm.mmu_lock.write_lock(cpu):\n",
        "swap@zap#2": "+        kvm_make_all_cpus_request(cpu, kvm, 1)\n",
        "forget@zap#1": "+            flush = zap_one(cpu, slot, start, end)\n",
        "drop-operand@zap#1": "+        if slot.valid:\n",
        "drop-operand@zap#2": "+        if flush:\n",
        "not-returned@zap#1": "+    return False\n",
        "narrow-start@zap#1": "zap_one(cpu, slot, start + 1, end)",
        "widen-end@zap#1": "zap_one(cpu, slot, start, end + 1)",
        "drop-branch@zap#1": "-            kvm_flush_remote_tlbs(cpu, kvm)\n",
        "drop-not@walk#1": "+    while it.done:\n",
        "drop-guard@walk#2": "-        if it.frozen:\n",
        "skip-after-yield@walk#1": "+            it.chunk.next_gfn += 1\n",
        "no-yield@walk#1": "+        if False:\n",
        "off-by-one@walk#1": "+        if start <= it.end:\n",
    }
    for name, line in wanted.items():
        assert line in made[name].diff, name
    assert "drop-not@walk#2" not in made, "the condition of an account"
    # A comment, and all else, stays as it is.
    assert all("each of them" in one.text for one in made.values())


def test_a_step_takes_its_ordering_point_along(made: dict[str, Mutant]) -> None:
    swapped = made["swap@zap#2"].text
    assert swapped.index("kvm_make_all_cpus_request") < swapped.index("cpu.point") < swapped.index("set_mode")


@pytest.mark.slow
def test_mutants_of_kvm_are_many_and_distinct(every: tuple[Mutant, ...]) -> None:
    assert len(every) > 800
    assert len({one.digest for one in every}) == len({one.name for one in every}) == len(every)
    assert "late-flush@kvm_handle_hva_range#1" in {one.name for one in every}
    for one in every:
        assert one.statements


@pytest.mark.slow
def test_both_mmus_have_mutants(every: tuple[Mutant, ...]) -> None:
    parts = {one.name: part_of(one) for one in every}
    assert set(parts.values()) == set(PARTS)
    assert parts["late-flush@kvm_handle_hva_range#1"] == "tdp"
    assert parts["drop-flush@account_shadowed#1"] == parts["drop-barrier@emulate_store#1"] == "shadow"


@pytest.mark.slow
def test_mutants_are_patches(every: tuple[Mutant, ...], tmp_path: Path) -> None:
    for one in sample(every, 5, seed=2):
        path = tmp_path / "mutant.patch"
        path.write_text(one.diff)
        read_patch(str(path))


@pytest.mark.slow
def test_a_sample_is_stable(every: tuple[Mutant, ...]) -> None:
    ten = sample(every, 10, seed=7)
    assert sample(every, 30, seed=7)[:10] == ten
    assert sample(every, 10, seed=8) != ten
    gone = [one for one in every if one is not ten[0]]
    cell = (ten[0].rule, ten[0].function)
    rest = [one for one in sample(gone, 9, seed=7) if (one.rule, one.function) != cell]
    assert len(rest) >= 8
    assert rest == [one for one in ten[1:] if (one.rule, one.function) != cell][: len(rest)]


@pytest.mark.slow
def test_a_sample_has_its_share_of_each_rule_and_function(every: tuple[Mutant, ...]) -> None:
    def cells(found: Sequence[Mutant]) -> Counter[tuple[str, str]]:
        return Counter((one.rule, one.function) for one in found)

    half = cells(sample(every, len(every) // 2, seed=3))
    large = {cell: n for cell, n in cells(every).items() if n >= 4}
    assert len(large) > 20
    for cell, n in large.items():
        assert abs(half[cell] - n / 2) <= 1, cell


def test_every_name_that_a_rule_looks_for_is_called() -> None:
    called = set().union(*(calls(ast.parse(text)) for _, text in sources().values()))
    wanted = set().union(*names.EVENTS.values(), names.ORDERED, names.SECTIONS, names.ACCOUNTS, names.YIELDS)
    assert sorted(wanted - called) == []
