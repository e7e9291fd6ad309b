"""Results that no machine produced, for tests of the code that shows results."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from emulator.policy import Policy
from emulator.report.result import FlushCount, Histogram, MachineObserver, Report, Result, Snapshot
from emulator.scenario.config import Scenario
from emulator.scenario.costs import load_costs, modelled_cycles
from native import COUNTER_NAMES, HISTOGRAM_NAMES, VM_STAT_NAMES


def snapshot(**changes: Any) -> Snapshot:
    """Two VMs, one second, counters 1, 2, 3, ... and flushes of which some were necessary."""
    whole = Snapshot(
        elapsed=1.0,
        phase="storm",
        counters={name: 1000 + number for number, name in enumerate(COUNTER_NAMES)},
        vms=tuple({name: 10 * vm + number for number, name in enumerate(VM_STAT_NAMES)} for vm in (1, 2)),
        flushes=(
            FlushCount(0, "invept_global", "migration", 100, 7),
            FlushCount(1, "invept_global", "migration", 50, 0),
            FlushCount(1, "invept_single", "root_load", 20, 1),
        ),
        histograms={name: Histogram((0,) * 10 + (5, 3, 1) + (0,) * 23, 12345) for name in HISTOGRAM_NAMES},
        violations={},
        rcu_pending=3,
    )
    return replace(whole, **changes)


def result(now: Snapshot | None = None, **changes: Any) -> Result:
    seen = now or snapshot()
    rest: dict[str, Any] = {
        "snapshot": seen,
        "cycles": modelled_cycles(load_costs(), seen.counters, seen.vms, seen.flushes),
        "scenario": "main",
        "policy": Policy().answers(),
        "policy_name": "linux-7.3",
        "seed": 1,
        "preconditions": {"migration": 12},
    }
    return Result(**{**rest, **changes})


def violated() -> Result:
    report = Report(
        "use-after-free", ("use-after-free",), "use-after-free: [bold] vCPU 0", {"cpu": 1, "vm": 0}
    )
    return result(snapshot(violations={"use-after-free": 5}), reports=(report,))


class CannedJob:
    """Takes the place of `emulator.job.job.Job`; its run is over at once, or when it is stopped."""

    ending: Callable[[], Result] = staticmethod(result)
    until_stopped = False
    # Set as soon as a job waits to be stopped.
    waits: ClassVar[threading.Event] = threading.Event()
    made: ClassVar[list[CannedJob]] = []

    def __init__(
        self,
        scenario: Scenario,
        policy: Policy,
        *,
        seed: int,
        duration: float | None,
        chaos: int,
        unbounded: bool,
    ) -> None:
        self.scenario = scenario
        self.policy = policy
        self.options = {"seed": seed, "duration": duration, "chaos": chaos, "unbounded": unbounded}
        self.observers: list[MachineObserver] = []
        CannedJob.made.append(self)

    def run(self, progress: Callable[[Snapshot], None], stop: threading.Event) -> Result:
        progress(snapshot())
        if self.until_stopped:
            self.waits.set()
            assert stop.wait(20)
        ending = type(self).ending()
        return replace(ending, policy_name=self.policy.name, interrupted=stop.is_set())
