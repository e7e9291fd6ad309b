"""Very many actors end about as quickly as threads that do nothing else."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from emulator.actors.crew import STOP_ACTORS, Crew, stop_seconds
from emulator.actors.pcpu import PCpu
from emulator.job.emulation import SWITCH_INTERVAL
from native import lib
from native.types import CpuId
from tests.emulator.actors.crews import small_machine
from tests.support import wait_until

PCPUS = 1024
VMS = 1024


def _plain_seconds() -> float:
    """CPU seconds that as many threads need to end."""
    end = threading.Event()
    threads = [threading.Thread(target=end.wait, daemon=True) for _ in range(PCPUS)]
    for thread in threads:
        thread.start()
    before = time.process_time()
    end.set()
    for thread in threads:
        thread.join()
    return time.process_time() - before


@pytest.mark.stress
def test_a_thousand_actors_with_a_thousand_vms_end_like_plain_threads() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    machine = small_machine(PCPUS, 1, vms=VMS, vcpus=VMS, root_frames=VMS)
    crew = Crew(machine, machine.cpus[-1])

    def all_halt() -> bool:
        return all(lib.cpu_power(machine.m, cpu) == lib.CPU_HALTED for cpu in map(CpuId, range(PCPUS)))

    try:
        for cpu in machine.cpus[:PCPUS]:
            PCpu.start(crew, cpu)
        wait_until(all_halt, "all halt", 60)
        started = time.process_time()
        crew.stop()
        late = crew.join(60)
        took = time.process_time() - started
        assert sys.getswitchinterval() == SWITCH_INTERVAL, "as it was"
    finally:
        sys.setswitchinterval(before)
    assert late == []
    machine.destroy()
    plain = _plain_seconds()
    print(f"stop of {PCPUS}: {took:.2f} s of CPU time, plain threads {plain:.2f} s")
    assert took < 4 * plain + 0.3


def test_the_time_to_stop_grows_with_the_actors() -> None:
    assert stop_seconds(1) == stop_seconds(STOP_ACTORS)
    assert 30 < stop_seconds(4096) < 60
