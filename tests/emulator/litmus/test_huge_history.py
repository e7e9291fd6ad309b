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


# Without EPT the guest's own records of a huge page are judged, too.
SHADOWED = """
doc = "A guest uses two pages of one huge page, and then maps the huge page to other memory."
source = "kvm_sync_page()"
init = ["v0: map 0x200 0x200 huge", "mm: host-touch 0x200 512", "mm: host-collapse 0x200", "v0: write 0x200"]

[machine]
ept = false

[[vm]]
paging = true

[threads.v0]
vcpu = 0
ops = ["write 0x201", "map 0x200 0x400 huge", "mov-cr3 0", "write 0x201", "write 0x200"]

[threads.mm]
ops = []

[expect]
needs = "nothing"
"""


def test_each_page_of_a_guests_huge_page_may_be_used() -> None:
    verdict = explore_verdict(
        parse_test(SHADOWED, "huge-shadowed", None), named_policy("linux-7.3"), Plan(executions=20)
    )
    assert verdict.verdict == "safe"
