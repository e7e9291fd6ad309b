"""Operations that were recorded with EPT only, without it: the counts that Linux 6.12's code gives them.

Above the MMUs the code is one, so that most counts are those of the recording.  The others differ by flushes
of the shadow MMU, which each entry names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest

from .compare import compared
from .driver import find_driver
from .lines import Line, load

pytestmark = pytest.mark.slow

LINES: Final = {line.id: line for line in load()}
# Lines of ground_truth.toml whose counts do not depend on EPT.
SAME: Final = (
    "memslot_create-of-either-vm",
    "unmap-other-vm-unaffected",
    "unmap-vms-share-cpus",
    "pageout-idle",
    "pageout-then-touch",
    "pageout-while-written",
    "mprotect-while-written",
    "mprotect-back-while-written",
    "fork",
    "dirty_log_disable-while-written",
    "manual-enable",
    "manual-get-initial",
    "manual-clear-all",
    "manual-clear-64",
    "manual-get-while-written",
    "manual-clear-8-of-256",
    "manual-get-8-written",
    "manual-get-idle",
    "manual-disable",
    "touch-write",
    "touch-write-concurrent",
    "touch-read-concurrent",
    "migrate-running",
    "migrate-running-first-of-two",
    "migrate-running-second-of-two",
    "migrate-idle",
    "vcpus-share-a-cpu",
    "vms-share-cpus",
    "thp-get_dirty_log",
)
# Remote flushes beyond those of the recording with EPT, and which function makes them.
MORE: Final = {
    # The first store sets the dirty flag of the guest's huge page: validate_direct_spte() drops a page.
    "touch-write-after-read": 1,
    # The log is written at 4 KiB: __link_shadow_page() replaces the two huge leafs.
    "thp-dirty_log_enable": 2,
    "thp-dirty_log_enable-lazy": 2,
    # kvm_mmu_commit_zap_page(): in the thread that deletes, and in the vCPU that drops the root last.
    "memslot_delete-other-vm-unaffected": 2,
}


def without_ept(line: Line, more: int = 0) -> Line:
    """Return the line for a host without EPT, where faults that meet flush in 6.12 (shadow.toml)."""
    expect, requests = dict(line.expect), dict(line.requests)
    for name in ("remote_tlb_flush_requests", "flush_all", "tlb_flush"):
        before = expect.get(name, 0)
        assert not isinstance(before, list) or not more
        if isinstance(before, int):
            expect[name] = before + more
    due = requests.get("TLB_FLUSH", 0)
    if more and isinstance(due, int):
        requests["TLB_FLUSH"] = due + more
    return replace(
        line,
        machine=replace(line.machine, ept=False),
        expect=expect,
        requests=requests,
        executes=None,
        refaults=True,
        merged=max(line.merged, 0.5 if more else 0.0),
    )


@pytest.mark.parametrize(("name", "more"), [*((name, 0) for name in SAME), *MORE.items()])
def test_counts_follow_from_the_kernels_code(name: str, more: int) -> None:
    driver = find_driver()
    assert driver is not None
    line = without_ept(LINES[name], more)
    assert compared(driver, line, line.vcpus[-1], "linux-6.12") == []
