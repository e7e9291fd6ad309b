"""The job: a run's report, its end, and its account of deaths."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from emulator.actors.host import Host
from emulator.host.memory import UserMemory
from emulator.job.job import Job
from emulator.policy import preset
from emulator.report.result import Snapshot
from emulator.report.summary import exit_status
from emulator.scenario.config import MachineSection, Scenario, load_scenario

LINUX = preset("linux-7.3")


def small() -> Scenario:
    scenario = load_scenario()
    vm = scenario.vm[0].model_copy(update={"count": 1, "memory": 16, "traces": ("cc1",)})
    return scenario.changed(vm=(vm,), machine=MachineSection(pcpus=2))


class Observer:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def machine_up(self, machine: Any, *, pcpus: int, vms: int) -> None:
        self.seen.append(f"up {pcpus} {vms}")

    def machine_down(self) -> None:
        self.seen.append("down")


@pytest.mark.slow
def test_a_run_ends_after_its_duration() -> None:
    job = Job(small(), LINUX, seed=1, duration=1.0)
    observer = Observer()
    job.observers.append(observer)
    progress: list[Snapshot] = []
    result = job.run(progress.append, threading.Event())
    assert result.failure == ""
    assert 1.0 <= result.snapshot.elapsed < 3.0
    assert result.snapshot.counters["accesses"] > 0
    assert result.verdict != "violations", [report.text for report in result.reports[:1]]
    assert observer.seen == ["up 2 1", "down"]
    assert progress
    assert result.preconditions["faults"] > 0
    assert result.cycles


@pytest.mark.slow
def test_stop_ends_an_endless_run() -> None:
    stop = threading.Event()
    job = Job(small(), LINUX, duration=None)
    result = job.run(lambda snapshot: stop.set(), stop)
    assert result.interrupted
    assert result.failure == ""


@pytest.mark.slow
def test_a_violation_is_told_with_its_story() -> None:
    policy = LINUX.with_settings({"notifier_flush": "none"})
    result = Job(small(), policy, seed=1, duration=20.0, stop_at_violation=True).run(
        lambda snapshot: None, threading.Event()
    )
    assert exit_status(result) == 1
    text = result.reports[0].text
    assert result.reports[0].kinds
    assert "filled by: vCPU" in text
    assert "revoked: an mmu_notifier's invalidate_range_start returned" in text
    assert "notifier_flush=none" in text
    assert result.reports[0].details["entry"]["page"] >= 0


@pytest.mark.slow
def test_a_death_is_the_result_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmap(self: Host, memory: UserMemory) -> None:
        with memory.kvm.mmu_lock.write_lock(self.cpu):
            self.cpu.mmu_lock_held = 0  # the guard forgets it: the death really holds the lock
            raise KeyError("a bug")

    monkeypatch.setattr(Host, "unmap", unmap)
    result = Job(small(), LINUX, duration=20.0).run(lambda snapshot: None, threading.Event())
    assert exit_status(result) == 3
    assert "KeyError: 'a bug'" in result.failure
    assert "mmu_lock of VM 0 for write" in result.failure
    assert result.verdict != "clean"
