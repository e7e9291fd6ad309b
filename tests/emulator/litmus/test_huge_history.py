"""The oracle judges a huge translation by the page that is used, whatever its pages' pasts have in common."""

from __future__ import annotations

import pytest

from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.litmus.loader import parse_test
from emulator.litmus.policies import named_policy

# Pages 0x200 and 0x201 are of one huge page.  Each round of the dirty log advances the tag of the second
# one's frame; then the log ends, the page is mapped huge again, and the TLB entry is filled for 0x201.
TEST = """
doc = "The host protects a page; its neighbour, of the same huge page, has filled the TLB entry."
source = "kvm_mmu_notifier_invalidate_range_start()"
init = ["v0: write 0x200", "k: host-collapse 0x200", "k: log-arm", "v0: write 0x200", "v0: write 0x201",
        {rounds}"k: log-disarm", "v0: write 0x201"]

[threads.v0]
vcpu = 0
ops = ["write 0x201", "wait k 1", "write 0x200"]

[threads.k]
ops = ["host-protect 0x200"]

[expect]
"notifier_flush=none" = ["stale-after-revoke"]
"""
ROUND = '"k: log-get", "v0: write 0x201", '


@pytest.mark.parametrize("rounds", range(6))
def test_a_stale_page_is_seen_whatever_its_neighbour_has_been_through(rounds: int) -> None:
    test = parse_test(TEST.format(rounds=ROUND * rounds), "huge-history", None)
    verdict = explore_verdict(test, named_policy("notifier_flush=none"), Plan(executions=1))
    assert verdict.kinds == ("stale-after-revoke",)
