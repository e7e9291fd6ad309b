"""Steps that do not conflict by their footprints are swapped, and it makes no difference."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from emulator.explore.choices import NONE, Choices
from emulator.explore.commuting import Commuting
from emulator.explore.controlled import installed
from emulator.explore.footprints import FOOTPRINTS
from emulator.explore.remains import Remains
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy

EVERYTHING = Choices(evict=1, speculate=1, store_buffers=True)


def swapped(test: str, policy: str = "linux-7.3", choices: Choices = NONE) -> tuple[int, Counter[str]]:
    program = Remains(load_test(test), named_policy(policy), choices)
    commuting = Commuting(program, seed=1)
    try:
        with installed(program.control):
            commuting.run(60, 10)
    finally:
        program.close()
    return commuting.swaps, commuting.findings


@pytest.mark.parametrize("choices", [NONE, EVERYTHING])
@pytest.mark.parametrize(
    ("test", "policy"),
    [
        ("entry-races-request", "linux-7.3"),
        ("fault-races-two", "linux-5.14"),
        ("root-replaced-walk", "root-tlb-gen"),
        ("log-huge", "linux-6.12"),
    ],
)
def test_they_commute(test: str, policy: str, choices: Choices) -> None:
    swaps, findings = swapped(test, policy, choices)
    assert swaps > 20
    assert not findings


@pytest.mark.parametrize(
    ("call", "forgotten", "test", "who"),
    [
        ("kvm_make_request", {"writes": ()}, "entry-races-request", "requests"),
        ("vcpu_set_mode", {"writes": ()}, "entry-races-request", "mode"),
        ("tdp_mmu_set_spte_atomic", {"outcome": None}, "fault-races-two", "spte"),
        ("mmu_invalidate_end", {"writes": ()}, "fault-races-unmap", "mmu_invalidate_seq"),
    ],
)
def test_a_footprint_that_does_not_say_all_is_found(
    monkeypatch: pytest.MonkeyPatch, call: str, forgotten: dict[str, Any], test: str, who: str
) -> None:
    monkeypatch.setitem(FOOTPRINTS, call, replace(FOOTPRINTS[call], **forgotten))
    _, findings = swapped(test)
    assert any(f"'s {who}" in sentence for sentence in findings), findings


def test_the_same_each_time() -> None:
    assert swapped("return-zap") == swapped("return-zap")
