"""The events of a traced vCPU that change its role: writes of CR4, SMM, and entries of nested guests."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Final

from emulator.hosttrace.lines import Event
from emulator.hosttrace.workload import Step
from emulator.kvm.kvm_host import KVM_MMU_CR4_ROLE_BITS, X86_CR4_PSE

_SMM: Final = re.compile(r"vcpu \d+: (entering|leaving) SMM")
_CR: Final = re.compile(r"cr_write (\d+) = (?:0x)?([0-9a-f]+)")
# On SVM the reason's name, on VMX an exit qualification with CR4 and MOV to CR (SDM table 29-3).
_CR4_WRITE: Final = re.compile(r"reason (?:write_cr4|CR_ACCESS\b.*\binfo1 (?:0x)?[0-9a-f]*04)\b")
# VMRUN's VMCB, and whether L1 has nested page tables (kvm_nested_vmenter, before 6.3 kvm_nested_vmrun).
_VMRUN: Final = re.compile(r"\bvmcb: (?:0x)?[0-9a-f]+\b(?P<npt>.*\b(?:nested_npt=y|npt: on)\b)?")


class Registers:
    """Makes steps of events of vCPUs; `step` appends one, for the vCPU that the event's task runs."""

    def __init__(self, step: Callable[[Event, str, int], Step], left_out: Counter[str]) -> None:
        self._step = step
        self._left_out = left_out
        self._writing_cr4: set[int] = set()  # tasks after an exit for a write of CR4
        self._cr4: dict[int, tuple[int, Step | None]] = {}  # by task, its last CR4, and a first write's step
        self._leaving_smm: set[int] = set()  # tasks that have loaded no root since RSM
        self._nested: dict[int, bool] = {}  # tasks that run L2, and whether L1 has nested page tables
        self.without_pge: set[int] = set()

    def entry(self, task: int) -> None:
        self._writing_cr4.discard(task)
        self._leaving_smm.discard(task)

    def exit(self, event: Event) -> None:
        if _CR4_WRITE.search(event.fields):
            self._writing_cr4.add(event.tid)

    def load(self, event: Event) -> None:
        """Note that the vCPU loads a root."""
        self._leaving_smm.discard(event.tid)
        if event.tid in self._writing_cr4:
            self._writing_cr4.discard(event.tid)
            self._step(event, "cr4", X86_CR4_PSE)

    def flush_current(self, task: int) -> None:
        """Note a flush of the current context; after RSM and before a load CR4.PAE alone asks for one."""
        if task in self._leaving_smm:
            self.without_pge.add(task)

    def smm(self, event: Event) -> None:
        if (found := _SMM.search(event.fields)) is None:
            return
        leaving = found[1] == "leaving"
        self._step(event, "rsm" if leaving else "smi", -1)
        if leaving:
            self._leaving_smm.add(event.tid)

    def cr_write(self, event: Event) -> None:
        found = _CR.search(event.fields)
        if found is None or found[1] not in ("0", "4"):
            return
        self._writing_cr4.discard(event.tid)
        if found[1] == "0":
            self._left_out["writes of CR0"] += 1
            return
        value, (last, first) = int(found[2], 16), self._cr4.get(event.tid, (-1, None))
        changed = 0 if last < 0 else (last ^ value) & KVM_MMU_CR4_ROLE_BITS
        step = self._step(event, "cr4", changed)
        if first is not None:
            first.start = changed
        self._cr4[event.tid] = value, step if last < 0 else None

    def enter_nested(self, event: Event) -> None:
        """Note a VMRUN.  The flushes of a nested entry on VMX depend on VPIDs, which no trace shows."""
        found = _VMRUN.search(event.fields)
        if found is None:
            self._left_out["entries of nested guests on VMX, because their VMCSs are not in the trace"] += 1
            return
        self._nested[event.tid] = found["npt"] is not None
        if self._nested[event.tid]:
            self._left_out["nested guests' page tables (NPT), which KVM shadows, at so many entries"] += 1
        self._step(event, "vmrun", -1)

    def exit_nested(self, event: Event) -> None:
        if event.tid in self._nested:
            del self._nested[event.tid]
            self._step(event, "vmexit", -1)

    def shadows(self, task: int) -> bool:
        """Return whether the task runs a nested guest with page tables of L1, which tell other pages."""
        return self._nested.get(task, False)

    def unknown(self) -> int:
        """Return the number of first writes of CR4 without a second one."""
        return sum(step is not None for _, step in self._cr4.values())
