"""The ranges that a VMM's thread zaps."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.actors.ioctl_caller import whole_range
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.litmus.loader import parse_test
from emulator.policy import preset

PARTIAL = """
doc = "A zap yields, and a fault next to its range maps a huge page that reaches into it."
source = "kvm_zap_gfn_range()"
init = ["v0: write 0x200", "k: host-collapse 0x200", "v0: read 0x205", "v0: read 0x400", "v0: migrate 1"]
final = ["v0: read 0x205"]
[[vm]]
resched_chunks = 1
chunk = 4
[threads.v0]
vcpu = 0
ops = ["read 0x204"]
[threads.k]
ops = ["zap 0x205 510"]
[expect]
needs = "nothing"
"""


@given(st.integers(0, 5000), st.integers(1, 5000), st.integers(1, 3000), st.integers())
def test_no_huge_page_lies_across_an_end_of_a_range(base: int, npages: int, pages: int, seed: int) -> None:
    slot: Any = SimpleNamespace(base_gfn=base, npages=npages, end_gfn=base + npages)
    start, end = whole_range(slot, pages, Random(seed))
    assert base <= start < end <= base + npages
    # Beyond the slot's ends KVM maps no huge page.
    assert start % 512 == 0 or start == base
    assert end % 512 == 0 or end == base + npages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "violates"),
    [(PARTIAL, True), (PARTIAL.replace("zap 0x205 510", "zap 0x200 1024"), False)],
    ids=["part of a huge page", "whole huge pages"],
)
def test_a_part_of_a_huge_page_is_mapped_again_by_a_fault_next_to_it(text: str, violates: bool) -> None:
    """So the jobs zap whole huge pages, as KVM does.  The violation is found within 31 interleavings."""
    test = parse_test(text, "partial.toml", None)
    verdict = explore_verdict(test, preset("linux-7.3"), Plan(executions=200))
    assert verdict.kinds == (("stale-after-revoke",) if violates else ())
    assert verdict.failure == ""
