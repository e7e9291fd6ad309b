"""The host's memory management in a run."""

from __future__ import annotations

import threading

import pytest

from emulator.job.job import Job
from emulator.policy import preset
from emulator.report.result import Snapshot
from emulator.scenario.config import load_scenario
from emulator.scenario.sections import HostSection, KvmSection, MachineSection

pytestmark = pytest.mark.slow


def asked(policy: str, **vm: int) -> Snapshot:
    """Reclaim asks about page after page of one vCPU's memory, and takes none."""
    scenario = load_scenario("reclaim")
    one = {"count": 1, "vcpus": 1, "memory": 4, "traces": ("cc1",), **vm}
    asking = scenario.changed(
        vm=(scenario.vm[0].model_copy(update=one),),
        machine=MachineSection(pcpus=1),
        host=HostSection(actors=1, pages=32, age=50),
        kvm=KvmSection(),
    )
    job = Job(asking, preset(policy), seed=1, duration=1.0)
    snapshot = job.run(lambda now: None, threading.Event()).snapshot
    assert snapshot.kvm("faults") > 0
    assert not snapshot.violations
    return snapshot


def test_reclaim_asks_for_nothing_since_6_13() -> None:
    assert asked("linux-7.3").kvm("remote_tlb_flush_requests") == 0


@pytest.mark.parametrize(
    ("halt_every", "share"),
    [
        (0, 0.95),
        # A tenth of the time halted, and more on a busy machine: one flush for all requests until it wakes.
        (200_000, 0.5),
    ],
)
def test_before_6_13_a_vcpu_flushes_for_each_page_that_it_used(halt_every: int, share: float) -> None:
    snapshot = asked("linux-6.12", halt_every=halt_every)
    requests, flushes = snapshot.kvm("remote_tlb_flush_requests"), snapshot.kvm("flush_all")
    assert requests > 50
    assert share * requests <= flushes <= requests + 2
