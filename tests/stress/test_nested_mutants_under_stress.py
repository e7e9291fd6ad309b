"""Mutants of nested VMX are caught on real threads, where L1 edits its EPTs and changes VPIDs all the time.

A run ends at its first violation.  The clean runs are in tests/emulator/test_nested_scenarios.py.
"""

from __future__ import annotations

import threading

import pytest

from emulator.job.job import Job
from emulator.policy import preset
from emulator.scenario.config import load_scenario

SECONDS = 60.0


@pytest.mark.stress
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("mutant", "kind", "precondition"),
    [
        ("nested-invept-ignored", "l1-stale", "nested_invept"),
        ("nested-eptp-switch-keeps-root", "l1-stale", "cached_roots"),
        ("nested-run-with-wrong-vpid", "cross-guest", "nested_run"),
        ("nested-table-left-writable", "missed-guest-write", "mmu_cache_miss"),
    ],
)
def test_mutant_is_caught(mutant: str, kind: str, precondition: str) -> None:
    job = Job(
        load_scenario("nested-switch"),
        preset(f"mutant:{mutant}"),
        seed=1,
        duration=SECONDS,
        stop_at_violation=True,
    )
    result = job.run(lambda snapshot: None, threading.Event())
    assert result.failure == ""
    assert result.verdict == "violations"
    assert kind in {kind for report in result.reports for kind in report.kinds}
    assert result.snapshot.kvm(precondition) > 0
