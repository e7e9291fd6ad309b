"""A hole of Linux 7.3 on Hyper-V: a remote flush leaves out the roots that a vCPU has cached.

hv_flush_remote_tlbs() makes no request, and flushes the root in the EPT_POINTER of each vCPU.  A vCPU with
nested guests returns to another root without a flush, because both have tags of their own.
"""

from __future__ import annotations

import pytest

from emulator.explore.results.verdict import explore_verdict
from emulator.litmus.loader import parse_test
from emulator.litmus.model import SAFE
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import VIOLATIONS
from emulator.policy import DEFAULT

TEST = """
doc = "The host takes a page away while a vCPU runs L2, and L1 uses the page afterwards."
source = "__hv_flush_remote_tlbs_range(), fast_pgd_switch(), Linux 7.3"
init = [
    "v0: vmxon", "v0: vmptrld 1", "v0: vmwrite-vpid 1", {ept12} "v0: map 0x10 0x20", "v0: l2-enter",
    "v0: map 0x10 0x20", "v0: l2-exit", "v0: read 0x10", "v0: l2-enter", "v0: read 0x10",
]

[machine]
hyperv = {hyperv}

[[vm]]
paging = true

[threads.v0]
vcpu = 0
ops = ["wait mm 1", "read 0x10", "l2-exit", "read 0x10"]

[threads.mm]
ops = ["host-unmap 0x20"]
"""
# L1 has no EPT for L2, so that both have roots of root_mmu; or it has, and L2's root is one of guest_mmu.
WITHOUT = ""
WITH = '"v0: ept12-map 1 0x20 0x20", "v0: vmwrite-eptp 1",'


@pytest.mark.slow
@pytest.mark.parametrize(("ept12", "kind"), [(WITHOUT, "use-after-free"), (WITH, "missed-guest-write")])
def test_a_cached_root_keeps_what_the_host_took(ept12: str, kind: str) -> None:
    """With an EPT of L1's it also keeps the right to write to the tables that KVM has write-protected."""
    test = parse_test(TEST.format(ept12=ept12, hyperv="true"), "hyperv-cached-roots.toml", None)
    found = explore_verdict(test, named_policy(DEFAULT))
    assert found.verdict == VIOLATIONS
    assert kind in found.kinds


@pytest.mark.slow
@pytest.mark.parametrize("ept12", [WITHOUT, WITH])
@pytest.mark.parametrize(
    ("hyperv", "answer"),
    [("true", "cached_root=flush-current"), ("true", "hv_remote_flush=requests"), ("false", "")],
)
def test_a_flush_of_the_root_repairs_it_and_so_do_requests(ept12: str, hyperv: str, answer: str) -> None:
    test = parse_test(TEST.format(ept12=ept12, hyperv=hyperv), "hyperv-cached-roots.toml", None)
    found = explore_verdict(test, named_policy(answer or DEFAULT))
    assert (found.verdict, found.complete) == (SAFE, True)


def test_a_transition_that_always_flushes_needs_no_repair() -> None:
    """As nested SVM does."""
    test = parse_test(TEST.format(ept12=WITHOUT, hyperv="true"), "hyperv-cached-roots.toml", None)
    found = explore_verdict(test, named_policy("nested_transition=always"))
    assert (found.verdict, found.complete) == (SAFE, True)
