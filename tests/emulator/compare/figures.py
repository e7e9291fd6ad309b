"""Comparisons that no machine produced."""

from __future__ import annotations

from typing import Any

from emulator.compare.measure import measure
from emulator.compare.runner import Comparison, Plan
from emulator.policy import preset
from emulator.report.receivers import Receivers
from emulator.report.result import FlushCount, Report, Result
from emulator.scenario.config import Scenario, load_scenario
from tests.emulator.canned import result, snapshot

GROUPS = (
    Receivers("noisy", 2, uninvolved=False, ipis=100, serviced=10, interruptions=80, bystanders=0),
    Receivers("tenants", 14, uninvolved=True, ipis=40, serviced=0, interruptions=30, bystanders=30),
)


def run_of(policy: str, **changes: Any) -> Result:
    given: dict[str, Any] = {"policy_name": policy, "receivers": GROUPS, "worked": 5.0, **changes}
    return result(**given)


def partitioned() -> Scenario:
    return load_scenario("partitioned")


def comparison(**changes: Any) -> Comparison:
    """linux-7.3, twice, against root-tlb-gen, which has fewer flushes, and one that violates."""
    scenario = partitioned()
    few = snapshot(flushes=(FlushCount(0, "invept_single", "migration", 10, 5),))
    report = Report("use-after-free", ("use-after-free",), "use-after-free: <vCPU 0> & more", {})
    runs = {
        "linux-7.3": [run_of("linux-7.3"), run_of("linux-7.3", now=snapshot(elapsed=3.0))],
        "root-tlb-gen": [run_of("root-tlb-gen", now=few)],
        "lkml-2025-cpu-flushed-mask": [
            run_of(
                "lkml-2025-cpu-flushed-mask",
                now=snapshot(violations={"use-after-free": 5}),
                reports=(report,),
            )
        ],
    }
    plan = Plan(
        scenario=scenario,
        policies=tuple(preset(name) for name in runs),
        repeat=2,
        duration=5.0,
        seed=1,
    )
    measured = {name: [measure(each, scenario) for each in of] for name, of in runs.items()}
    return Comparison(plan, measured, **changes)
