"""The VMs of a trace and their vCPUs: which VM a task's event is about.

A vCPU is a task that enters a guest.  Its VM is told, in this order, by the address of the struct kvm in the
probes that it hits itself, by its process, or by its number: two vCPUs of one number are not of one VM.
An event of another task is about the VM of its process.  If the process has several, the first is taken,
until a probe that the task hits tells the struct kvm.  A vCPU may hit its first probe long after its first
entry, so a trace with several VMs is read twice, the second time with the addresses from the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from emulator.hosttrace.lines import Event

_KVM: Final = re.compile(r"\bkvm=(?:0x)?([0-9a-f]+)")


def kvm_of(fields: str) -> str:
    """Return the address of the struct kvm that a probe tells, an empty string without one."""
    found = _KVM.search(fields)
    return found[1] if found else ""


class Vms:
    """The VMs in the order in which the trace shows them.

    `numbers` has the tasks of each VM's vCPUs by their numbers, `tasks` a vCPU's VM and number by its task.
    """

    def __init__(self, told: Mapping[int, str] | None = None) -> None:
        self._told = told or {}
        self.numbers: list[dict[int, int]] = []
        self.tasks: dict[int, tuple[int, int]] = {}
        self._by_kvm: dict[str, int] = {}
        self._by_process: dict[int, int] = {}

    def vcpu(self, event: Event, number: int) -> tuple[int, int]:
        """Return the VM and the number of the vCPU that the event's task runs; -1: its event has none."""
        if event.tid not in self.tasks:
            vm = self._of_vcpu(event, number)
            number = len(self.numbers[vm]) if number < 0 else number
            self.numbers[vm].setdefault(number, event.tid)
            self.tasks[event.tid] = vm, number
        return self.tasks[event.tid]

    def _of_vcpu(self, event: Event, number: int) -> int:
        kvm = self._told.get(event.tid, "")
        if not kvm:
            return self.of_process(event.tgid, number)
        vm = self._by_kvm.get(kvm, -1)
        if vm < 0 or number in self.numbers[vm]:  # else the address of a VM that is gone is used again
            vm = self._unclaimed()
            self._by_kvm[kvm] = vm
        return vm

    def of_process(self, tgid: int, number: int = -1) -> int:
        """Return the VM of a process, or without one (-1) the first that has no vCPU of that number."""
        if tgid >= 0 and tgid in self._by_process:
            return self._by_process[tgid]
        if tgid < 0:
            for vm, numbers in enumerate(self.numbers):
                if number not in numbers:
                    return vm
        self.numbers.append({})
        if tgid >= 0:
            self._by_process[tgid] = len(self.numbers) - 1
        return len(self.numbers) - 1

    def of_kvm(self, kvm: str, guess: int) -> int:
        """Return the VM of a struct kvm; -1 if the trace shows no vCPU of it.

        As long as it is not known of which VMs the vCPUs are, the guess is right.
        """
        if not self._told:
            return guess
        if kvm not in self._by_kvm:
            if kvm in self._told.values():
                self._by_kvm[kvm] = self._unclaimed()
            elif guess not in self._by_kvm.values():
                self._by_kvm[kvm] = guess
        return self._by_kvm.get(kvm, -1)

    def _unclaimed(self) -> int:
        """Return a new VM, or one that was made for an event of the host and has neither vCPU nor address."""
        for vm, numbers in enumerate(self.numbers):
            if not numbers and vm not in self._by_kvm.values():
                return vm
        self.numbers.append({})
        return len(self.numbers) - 1
