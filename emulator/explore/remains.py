"""What an execution leaves behind: executions told apart by more than their violations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from emulator.explore.choices import NONE, Choices
from emulator.explore.scheduler import Execution
from emulator.explore.world import LitmusProgram
from emulator.kvm.kvm_host import kvm_pages_per_hpage
from emulator.kvm.structs import Kvm, KvmMmuPage
from emulator.litmus.model import LitmusTest
from emulator.policy import Policy
from native import ffi, lib

# Of one TLB; litmus tests touch a few pages.
_ENTRIES: Final = 256


class Remains(LitmusProgram):
    """A litmus test whose outcome is, besides violations: roots and leaf SPTEs with all their bits, where
    vCPUs are and what is requested of them, and what TLBs hold."""

    def __init__(self, test: LitmusTest, policy: Policy, choices: Choices = NONE) -> None:
        super().__init__(test, policy, choices)
        self._entries = ffi.new("struct tlb_entry[]", _ENTRIES)

    def finish(self, execution: Execution) -> str:
        outcome = super().finish(execution)
        if execution.stopped or execution.deadlock or not execution.clean:
            return outcome
        kvms = self.world.kvms
        roots = [
            self._root(kvm, root, section.pages)
            for kvm, section in zip(kvms, self.test.vm, strict=True)
            for root in kvm.tdp_mmu_roots
        ]
        return "\n".join((outcome, *roots, *map(self._vcpus, kvms), *self._tlbs()))

    def _root(self, kvm: Kvm, root: KvmMmuPage, pages: int) -> str:
        leafs = ", ".join(f"{gfn:#x} {spte:#x}" for gfn, spte in self._leafs(root, pages))
        return f"root {root.hfn} of VM {kvm.id}{' invalid' if root.role.invalid else ''}: {leafs}"

    def _leafs(self, root: KvmMmuPage, pages: int) -> Iterator[tuple[int, int]]:
        cpu, gfn = self.machine.cpus[-1], 0
        while gfn < pages:
            level = lib.tdp_mmu_get_walk(cpu.m, root.hfn, root.role.level, gfn, cpu.sptes, cpu.tables)
            if cpu.sptes[level]:
                yield gfn, cpu.sptes[level]
            gfn += kvm_pages_per_hpage(level)

    def _vcpus(self, kvm: Kvm) -> str:
        m = self.machine.m
        return ", ".join(
            f"v{vcpu.id} on {lib.vcpu_cpu(m, vcpu.id)} {lib.kvm_requests(m, vcpu.id):#x}"
            for vcpu in kvm.vcpus
        )

    def _tlbs(self) -> Iterator[str]:
        m, entries = self.machine.m, self._entries
        for pcpu in range(self.machine.pcpus):
            n = lib.tlb_dump(lib.cpu_tlb(m, pcpu), entries, _ENTRIES)
            held = sorted((e.page, e.kind, e.hfn, e.size, e.vpid, e.ep4ta) for e in entries[0:n])
            yield f"pcpu{pcpu} {held}"
