"""Interrupts by receiver: the pCPUs of each kind of VM that has pCPUs of its own, and the shared pCPUs.

The pCPUs of a VM that neither the host nor an ioctl disturbs are *uninvolved*: interrupts that reach them are
on behalf of other VMs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from emulator.scenario.config import Scenario
from native import ffi, lib
from native.types import CpuId

if TYPE_CHECKING:
    from native._native import MachinePtr


@dataclass(frozen=True, slots=True)
class Receivers:
    """A group of pCPUs and the interrupts that reached them.

    `ipis`: interrupts received, of which `serviced` found a halted pCPU outside of guest mode.
    `interruptions`: exits from guest mode that they caused, of which `bystanders` had no call about the VM.
    """

    who: str
    pcpus: int
    uninvolved: bool
    ipis: int
    serviced: int
    interruptions: int
    bystanders: int

    def less(self, before: Receivers) -> Receivers:
        """Return the counts since an earlier reading."""
        return replace(
            self,
            ipis=self.ipis - before.ipis,
            serviced=self.serviced - before.serviced,
            interruptions=self.interruptions - before.interruptions,
            bystanders=self.bystanders - before.bystanders,
        )


def read_receivers(m: MachinePtr, scenario: Scenario) -> tuple[Receivers, ...]:
    """Return the groups of a scenario's pCPUs in the order of the pCPUs, without empty groups."""
    return tuple(
        _read(m, who, pcpus, uninvolved) for who, pcpus, uninvolved in _groups(scenario) if len(pcpus)
    )


def _groups(scenario: Scenario) -> Iterator[tuple[str, range, bool]]:
    first = 0
    for vm in scenario.vm:
        if vm.placement == "own":
            pcpus = range(first, first + vm.count * vm.vcpus)
            first = pcpus.stop
            yield vm.name or f"VMs with pCPUs {pcpus.start}-{pcpus.stop - 1}", pcpus, not vm.disturbed
    yield "shared pCPUs", range(first, scenario.machine.pcpus), False


def _read(m: MachinePtr, who: str, pcpus: range, uninvolved: bool) -> Receivers:
    sums = [0] * lib.COUNTERS
    values = ffi.new("uint64_t[]", lib.COUNTERS)
    for pcpu in map(CpuId, pcpus):
        lib.counters_read(m, pcpu, values)
        for i in (
            lib.COUNT_IPIS_RECEIVED,
            lib.COUNT_CALLS_SERVICED,
            lib.COUNT_INTERRUPTIONS,
            lib.COUNT_BYSTANDER,
        ):
            sums[i] += values[i]
    return Receivers(
        who,
        len(pcpus),
        uninvolved,
        ipis=sums[lib.COUNT_IPIS_RECEIVED],
        serviced=sums[lib.COUNT_CALLS_SERVICED],
        interruptions=sums[lib.COUNT_INTERRUPTIONS],
        bystanders=sums[lib.COUNT_BYSTANDER],
    )
