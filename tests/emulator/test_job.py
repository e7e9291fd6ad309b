"""The job: a run's report, its end, and its account of deaths."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from rich.console import Console

from emulator.actors.host import Host
from emulator.host.memory import UserMemory
from emulator.job.job import Job
from emulator.policy import preset
from emulator.report.result import Snapshot
from emulator.report.summary import exit_status, summary
from emulator.scenario.config import Scenario, load_scenario
from emulator.scenario.sections import KvmSection, MachineSection, SchedulerSection
from native import ffi, lib
from native.types import VcpuId

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


class Breaker(Observer):
    """Have the guest of vCPU 0 read a page that its OS does not know, which ends in a triple fault."""

    def machine_up(self, machine: Any, *, pcpus: int, vms: int) -> None:
        ops = ffi.new("struct guest_op[]", [{"kind": lib.GUEST_OP_READ, "linear": 0x7FFF_0000_0000}])
        assert lib.guest_set_program(machine, VcpuId(0), ops, 1) == 0


@pytest.mark.slow
@pytest.mark.parametrize("ept", [True, False])
def test_a_guest_that_dies_without_a_violation_makes_the_run_fail(ept: bool) -> None:
    scenario = small().changed(
        machine=MachineSection(pcpus=2, ept=ept), kvm=KvmSection(), scheduler=SchedulerSection(mode="pin")
    )
    job = Job(scenario, LINUX, seed=1, duration=30.0)
    job.observers.append(Breaker())
    stop = threading.Event()
    result = job.run(lambda now: stop.set() if now.counters["exit_triple_fault"] else None, stop)
    assert not result.snapshot.violated
    assert "triple fault of vCPU 0 although no use of a stale translation was seen" in result.failure
    assert result.verdict == "inconclusive"
    assert exit_status(result) == 3
    console = Console(width=80)
    with console.capture() as text:
        console.print(summary(result))
    words = " ".join(text.get().split())
    assert "the run failed and proves nothing: triple fault of vCPU 0" in words
    assert "no flush averted a use" not in words
