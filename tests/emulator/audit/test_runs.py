"""The audit at the end of a run: a disagreement is a violation, and an interrupted run has no audit."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from emulator.job.job import Job
from emulator.litmus.policies import named_policy
from emulator.policy import Policy, preset
from emulator.report.result import Report, Snapshot
from emulator.report.summary import document, exit_status
from emulator.scenario.config import Scenario, load_scenario
from emulator.scenario.sections import MachineSection
from tests.emulator.policy.patch.edits import edited, written

pytestmark = pytest.mark.slow

TWICE = ("    shadow.n_mmu_pages += 1\n", "    shadow.n_mmu_pages += 2\n")


def small() -> Scenario:
    scenario = load_scenario("shadow")
    vm = scenario.vm[0].model_copy(update={"count": 1, "memory": 16, "traces": ("cc1",)})
    return scenario.changed(vm=(vm,), machine=MachineSection(pcpus=2, ept=False))


@pytest.fixture
def counts_twice(tmp_path: Path) -> Policy:
    return named_policy(written(tmp_path, edited(TWICE)))


class Kept:
    """A finder that keeps the reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[int, Report]] = []

    def wanted(self, kind: str, has_events: bool) -> bool:
        return True

    def found(self, number: int, report: Report) -> None:
        self.reports.append((number, report))

    def count(self, snapshot: Snapshot) -> None: ...


def test_a_run_ends_with_an_audit(counts_twice: Policy) -> None:
    job = Job(small(), counts_twice, seed=1, duration=1.0)
    job.finder = kept = Kept()
    result = job.run(lambda snapshot: None, threading.Event())
    assert result.failure == ""
    assert (result.verdict, exit_status(result)) == ("violations", 1)
    assert result.snapshot.violations == {"inconsistent": 1}
    assert document(result)["violations"] == {"inconsistent": 1}
    (report,) = result.reports
    assert report.kinds == ("inconsistent",)
    assert "VM 0: n_mmu_pages is " in report.text
    assert [(number, one.text) for number, one in kept.reports] == [(1, report.text)]


def test_linuxs_structures_agree_at_the_end_of_a_run() -> None:
    for scenario in (small(), load_scenario("table-churn")):
        result = Job(scenario, preset("linux-7.3"), seed=1, duration=1.0, chaos=5).run(
            lambda snapshot: None, threading.Event()
        )
        assert result.snapshot.counters["accesses"] > 0
        assert not result.reports, result.reports[0].text


def test_an_interrupted_run_is_not_audited(counts_twice: Policy) -> None:
    """It has to end at once, and its threads may end within mmu_lock."""
    stop = threading.Event()
    result = Job(small(), counts_twice).run(lambda snapshot: stop.set(), stop)
    assert result.interrupted
    assert not result.reports
