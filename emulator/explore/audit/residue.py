"""The final state of an execution: it tells executions apart by more than their violations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from emulator.explore.engine.scheduler import Execution
from emulator.explore.machine.program import LitmusProgram
from emulator.kvm.kvm_host import kvm_pages_per_hpage
from emulator.kvm.mmu.structs import KvmMmuPage
from emulator.kvm.structs import Kvm
from native import ffi, lib
from native.types import CpuId, Gfn, Hva

if TYPE_CHECKING:
    from native._native import TlbEntry


class ResidueProgram(LitmusProgram):
    """A litmus test with the final state in its outcome, apart from violations: roots and leaf SPTEs with all
    their bits, the vCPUs' CPUs and requests, dirty logs and the pages that differ from their copies, and the
    translations in TLBs with the accesses that they allow."""

    _left: str

    def finish(self, execution: Execution) -> str:
        self._left = ""
        outcome = super().finish(execution)
        if execution.stopped or execution.deadlock or not execution.clean:
            return outcome
        return f"{outcome}\n{self._left}"

    def _end_migrations(self) -> None:
        """Record the final state, then end the migrations, which read the logs and write-protect pages."""
        kvms = self.harness.kvms
        roots = [
            self._root(kvm, root, section.pages)
            for kvm, section in zip(kvms, self.test.vm, strict=True)
            for root in kvm.tdp_mmu_roots
        ]
        self._left = "\n".join((*roots, *map(self._vcpus, kvms), *map(self._logs, kvms), *self._tlbs()))
        super()._end_migrations()

    def _root(self, kvm: Kvm, root: KvmMmuPage, pages: int) -> str:
        leafs = ", ".join(f"{gfn:#x} {spte:#x}" for gfn, spte in self._leafs(root, pages))
        return f"root {root.hfn} of VM {kvm.id}{' invalid' if root.role.invalid else ''}: {leafs}"

    def _leafs(self, root: KvmMmuPage, pages: int) -> Iterator[tuple[Gfn, int]]:
        cpu, gfn = self.harness.main, Gfn(0)
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

    def _logs(self, kvm: Kvm) -> str:
        """Return the pages that are marked dirty, and those that differ from their copies."""
        slots = [slot for slots in kvm.memslots for slot in slots.slots]
        marks = [page for slot in slots for page, mark in enumerate(slot.dirty_bitmap or b"") if mark]
        differ, page = [], lib.mm_image_differs(self.machine.m, kvm.id, Hva(0))
        while page >= 0:
            differ.append(page)
            page = lib.mm_image_differs(self.machine.m, kvm.id, Hva(page + 1))
        return f"dirty {marks} copies differ {differ}"

    def _tlbs(self) -> Iterator[str]:
        for pcpu in map(CpuId, range(self.machine.pcpus)):
            tlb = lib.cpu_tlb(self.machine.m, pcpu)
            entries = ffi.new("struct tlb_entry[]", lib.tlb_dump(tlb, ffi.NULL, 0))
            lib.tlb_dump(tlb, entries, len(entries))
            yield f"pcpu{pcpu} {sorted(map(_described, entries))}"


def _described(entry: TlbEntry) -> tuple[int, ...]:
    """Return an entry as a tuple, with its rights as allowed or not: their tags depend on the last lookup."""
    allowed = (int(right != lib.RIGHT_NONE) for right in entry.right)
    keys = entry.ep4ta, entry.vpid, entry.pcid, getattr(entry, "global")
    return entry.page, entry.kind, entry.size, entry.hfn, *keys, *allowed
