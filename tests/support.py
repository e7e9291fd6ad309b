"""Helpers of many tests. Not in conftest.py: several directories have one, and all of them that name."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from native import ffi, lib
from native.types import CounterId, CpuId, VcpuId, VmId

if TYPE_CHECKING:
    from emulator.report.result import MachineObserver
    from native._native import MachinePtr

# Numbers that tests give by hand.
CPU0, CPU1, CPU2, CPU3 = map(CpuId, range(4))
VM0, VM1 = map(VmId, range(2))
VCPU0, VCPU1 = map(VcpuId, range(2))


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Return as soon as the condition holds; fail the test if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds:g}s")
        time.sleep(0.01)


def machine_fields(**fields: int) -> dict[str, int]:
    """Fields of struct machine_config: these, and a TLB as current server cores have it."""
    geometry = {"l1_ways": 4, "l2_entries": 1536, "l2_ways": 12, "psc_entries": 32}
    return {**geometry, "chaos": 0, "seed": 1, **fields}


class BareMachine:
    """A machine without actors: 2 pCPUs, one VM, small memory."""

    pcpus = 2
    vms = 1

    def __init__(self) -> None:
        config = ffi.new(
            "struct machine_config *",
            machine_fields(
                pcpus=self.pcpus,
                housekeeping=2,
                vms=self.vms,
                vcpus=2,
                root_frames=8,
                table_frames=64,
                guest_frames=256,
                guest_blocks=1,
            ),
        )
        error = ffi.new("char[]", 256)
        self.pointer: MachinePtr = lib.machine_create(config, error, len(error))
        if self.pointer == ffi.NULL:
            pytest.fail(f"machine_create: {ffi.string(error).decode()}")
        if lib.vm_create(self.pointer, 64) != 0:
            pytest.fail("vm_create")
        self._observers: list[MachineObserver] = []

    def show_to(self, observer: MachineObserver) -> None:
        """Let an observer read the machine until it closes; threads of clients that left may still scrape."""
        self._observers.append(observer)
        observer.machine_up(self.pointer, pcpus=self.pcpus, vms=self.vms)

    def count(self, cpu: CpuId, counter: CounterId, n: int) -> None:
        lib.counter_add(self.pointer, cpu, counter, n)

    def close(self) -> None:
        for observer in self._observers:
            observer.machine_down()
        lib.machine_stop(self.pointer)
        lib.machine_destroy(self.pointer)


def processor_seconds(process: Path) -> float:
    """Return the processor time that a process has used; process: its directory in /proc."""
    user, system = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def without_progress(errors: str) -> str:
    """Return standard error without the lines that searches print every ten seconds on a busy machine."""
    counts = r"(?:\d+ of \d+ verdicts, )?(?:\S+ executions, )?"
    return re.sub(rf"(?m)^(?:explore|litmus): {counts}\d+ s.*\n", "", errors)
