"""User space's copy of a VM's memory, as live migration makes it of the pages that a dirty log names.

After the last log was read and copied with the guest paused, image and memory are equal.  A page that differs
was written without being logged: a lost dirty bit, proven end to end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from native import ffi, lib
from native.types import Hva, VcpuId

if TYPE_CHECKING:
    from emulator.kvm.structs import Kvm
    from emulator.machine.runtime import Cpu
    from native._native import ViolationReportPtr

_WORD = 64
_NOBODY = 0xFFFFFFFF


class Difference(NamedTuple):
    """A page that differs from its copy, and the first word in it that does."""

    page: int
    value: int


class Image:
    """The copy of the pages [start, start + npages) of a VMM's address space, complete when it is made.

    A VM has one at a time, and one thread at a time uses it.  Logging is armed before the first copy is made,
    so every later write is in the log.
    """

    __slots__ = ("_first", "kvm")

    def __init__(self, cpu: Cpu, kvm: Kvm, start: Hva, npages: int) -> None:
        self.kvm = kvm
        cpu.check(lib.mm_image_create(cpu.m, kvm.id, start, npages))
        cpu.check(lib.mm_image_copy_all(cpu.m, kvm.id))
        self._first = int(lib.mm_image_changed(cpu.m, kvm.id))

    def copy(self, cpu: Cpu, start: Hva, words: Sequence[int]) -> int:
        """Copy the pages of a bitmap, 64 to a word; bit 0 of the first is page `start`.  Return how many."""
        copied = 0
        for i, mask in enumerate(words):
            if mask:
                copied += cpu.check(lib.mm_image_copy(cpu.m, self.kvm.id, start + _WORD * i, mask))
        return copied

    def differing(self, cpu: Cpu) -> list[Difference]:
        """Return the pages that differ from their last copy."""
        m, vm, value = cpu.m, self.kvm.id, ffi.new("uint64_t *")
        found = []
        page = lib.mm_image_differs(m, vm, Hva(0))
        while page >= 0:
            if lib.mm_image_lost(m, vm, Hva(page), value):
                found.append(Difference(int(page), int(value[0])))
            page = lib.mm_image_differs(m, vm, Hva(page + 1))
        return found

    def compare(self, cpu: Cpu) -> None:
        """Report the pages that differ as lost.  No guest may run meanwhile."""
        differing = self.differing(cpu)
        self.count(cpu, len(differing))
        for difference in differing:
            report_lost(cpu, self.kvm, difference)

    def count(self, cpu: Cpu, lost: int) -> None:
        """Count the pages that were written since logging was armed; `lost` of them still differ."""
        compared = int(lib.mm_image_changed(cpu.m, self.kvm.id)) - self._first + lost
        if compared:
            cpu.stat(self.kvm.id, lib.STAT_DIRTY_COMPARED, compared)

    def destroy(self, cpu: Cpu) -> None:
        lib.mm_image_destroy(cpu.m, self.kvm.id)


def report_lost(cpu: Cpu, kvm: Kvm, difference: Difference) -> None:
    """Record a violation: a guest has written the page, and no log has named it."""
    report = ffi.new("struct violation_report *")
    report.kinds = 1 << lib.VIOLATION_LOST_DIRTY
    report.cpu = report.promise_cpu = cpu.id
    report.vm = kvm.id
    report.gfn = difference.page
    report.access = lib.ACCESS_WRITE
    report.promise = lib.PROMISE_DIRTY_LOG
    report.time = report.promise_time = time.monotonic_ns()
    _name_writer(cpu, kvm, difference.value, report)
    lib.oracle_report(cpu.m, cpu.id, report)


def _name_writer(cpu: Cpu, kvm: Kvm, value: int, report: ViolationReportPtr) -> None:
    """Find the writing vCPU by the stored value, which is its clock (native/guest/guest.h).

    A value that no vCPU can have stored, such as flags in a page table, has an unknown writer.
    """
    writer = VcpuId(value >> lib.GUEST_CLOCK_VCPU)
    known = any(vcpu.id == writer for vcpu in kvm.vcpus)
    if known and value <= lib.guest_clock(cpu.m, writer):
        report.vcpu = report.entry.vcpu = writer
        report.guest_clock = report.entry.clock = value
    else:
        report.vcpu = report.entry.vcpu = _NOBODY
