"""A machine without VMs, and actors on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from emulator.actors.crew import Crew
from emulator.machine.runtime import Machine
from tests.support import machine_fields


def small_machine(pcpus: int = 2, housekeeping: int = 4, **changes: int) -> Machine:
    fields = {
        "vms": 1,
        "vcpus": 2,
        "root_frames": 8,
        "table_frames": 64,
        "guest_frames": 512,
        "guest_blocks": 1,
    }
    return Machine(machine_fields(pcpus=pcpus, housekeeping=housekeeping, **(fields | changes)))


@contextmanager
def crew_of(machine: Machine) -> Iterator[Crew]:
    """Stops the machine and joins its actors at the end, whatever happened; none may be late."""
    crew = Crew(machine, machine.cpus[-1])
    try:
        yield crew
    finally:
        crew.stop()
        late = crew.join()
        assert late == []
        machine.destroy()
