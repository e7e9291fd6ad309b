"""Each answer of the decision points about nested guests and Hyper-V has a test that tells it apart."""

from __future__ import annotations

from typing import Final

import pytest

from emulator.explore.results.verdict import explore_verdict
from emulator.litmus.loader import load_test
from emulator.litmus.model import SAFE
from emulator.litmus.policies import named_policy
from emulator.policy.points_hyperv import HYPERV_POINTS
from emulator.policy.points_nested import NESTED_POINTS

pytestmark = pytest.mark.slow

# Point, answer, litmus test, base, and the violation; SAFE: there is none.
CASES: Final = (
    ("nested_transition", "tag-aware", "nested-no-vpid", "linux-7.3", SAFE),
    ("nested_transition", "apic-access-flush", "nested-apic-page", "linux-7.3", SAFE),
    ("nested_transition", "always", "nested-no-vpid", "linux-7.3", SAFE),
    ("nested_transition", "none", "nested-no-vpid", "linux-7.3", "guest-stale"),
    ("nested_invept", "free-roots", "nested-ept-unmap", "linux-7.3", SAFE),
    ("nested_invept", "free-roots-and-flush", "nested-ept-unmap", "linux-7.3", SAFE),
    ("nested_invept", "none", "nested-ept-unmap", "linux-7.3", "l1-stale"),
    ("nested_invvpid", "pcpu-of-vmcs02", "nested-invvpid-elsewhere", "root-tlb-gen", SAFE),
    ("nested_invvpid", "current-pcpu", "nested-invvpid-elsewhere", "linux-7.3", SAFE),
    ("nested_invvpid", "current-pcpu", "nested-invvpid-elsewhere", "root-tlb-gen", "l1-stale"),
    ("nested_invvpid", "none", "nested-invvpid", "linux-7.3", "l1-stale"),
    ("vpid02_reuse", "flush", "nested-two-guests", "linux-7.3", SAFE),
    ("vpid02_reuse", "none", "nested-two-guests", "linux-7.3", "cross-guest"),
    ("hv_remote_flush", "tracked-roots", "hyperv-two-roots", "linux-7.3", SAFE),
    ("hv_remote_flush", "requests", "hyperv-unmap", "linux-7.3", SAFE),
    ("hv_local_flush", "invept", "hyperv-root-recycled", "linux-7.3", SAFE),
    ("hv_local_flush", "invept", "hyperv-root-recycled-elsewhere", "migration=none", "foreign-root"),
    ("hv_local_flush", "hypercall", "hyperv-root-recycled-elsewhere", "migration=none", SAFE),
    # For the VMCS of L1 and of L2, and for the roots of both MMUs.
    ("migration", "all-contexts", "nested-away", "linux-7.3", SAFE),
    ("migration", "none", "nested-away", "linux-7.3", "use-after-free"),
    ("migration", "none", "nested-ept-return", "linux-7.3", "use-after-free"),
    ("migration_vpid", "invvpid", "nested-l2-away", "root-tlb-gen", SAFE),
    ("migration_vpid", "none", "nested-l2-away", "root-tlb-gen", "guest-stale"),
)


def test_no_answer_is_left_out() -> None:
    tried = {case[:2] for case in CASES}
    points = (*NESTED_POINTS, *HYPERV_POINTS)
    assert {(point.name, one) for point in points for one in point.answers()} <= tried


@pytest.mark.parametrize(("point", "answer", "test", "base", "due"), CASES)
def test_an_answer_is_told_apart(point: str, answer: str, test: str, base: str, due: str) -> None:
    name = f"{base},{point}={answer}" if "=" in base else f"{base}+{point}={answer}"
    found = explore_verdict(load_test(test), named_policy(name))
    if due == SAFE:
        assert (found.verdict, found.complete) == (SAFE, True)
    else:
        assert due in found.kinds
