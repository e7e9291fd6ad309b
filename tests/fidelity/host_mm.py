"""The host's side: madvise, mprotect, reclaim and khugepaged on the VMM's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from emulator.kvm.host_work import host_works
from emulator.kvm.structs import Kvm
from emulator.kvm.virt.kvm_main import (
    kvm_mmu_notifier_clear_flush_young,
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
)
from emulator.machine.runtime import HPAGE_PMD_NR, Cpu
from native import ffi, lib
from native.types import Hva, PromiseKind


class HostMm:
    """Ranges are host virtual pages."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu

    @contextmanager
    def _notified(self, kvm: Kvm, start: int, end: int, promise: PromiseKind) -> Iterator[None]:
        host_works(self.cpu, kvm)
        kvm_mmu_notifier_invalidate_range_start(self.cpu, kvm, Hva(start), Hva(end), promise)
        yield
        kvm_mmu_notifier_invalidate_range_end(self.cpu, kvm, Hva(start), Hva(end))

    def unmap(
        self,
        kvm: Kvm,
        start: int,
        end: int,
        keep: bool = False,
        before_split: Callable[[], None] | None = None,
    ) -> None:
        """MADV_DONTNEED, or reclaim if the contents are kept.

        before_split: called inside the notifier range; then the huge page that the range is a part of is
        split, in a notifier range of its own (zap_pmd_range(), __split_huge_pmd()).
        """
        with self._notified(kvm, start, end, lib.PROMISE_NOTIFIER):
            if before_split is not None:
                before_split()
                self.split(kvm, start & -HPAGE_PMD_NR)
            lib.mm_unmap(self.cpu.m, self.cpu.id, kvm.id, Hva(start), Hva(end), keep)

    def split(self, kvm: Kvm, block: int) -> None:
        """__split_huge_pmd(), as mprotect() of a part does, too, before it changes anything."""
        with self._notified(kvm, block, block + HPAGE_PMD_NR, lib.PROMISE_NOTIFIER):
            self.cpu.check(lib.mm_split(self.cpu.m, self.cpu.id, kvm.id, Hva(block)))

    def protect(self, kvm: Kvm, start: int, end: int, prot: str) -> None:
        """mprotect. PROT_NONE differs from PROT_READ only for a vCPU that faults, and none does then."""
        promise = lib.PROMISE_NOTIFIER_WRITE if prot == "r" else lib.PROMISE_NOTIFIER
        with self._notified(kvm, start, end, promise):
            lib.mm_protect(self.cpu.m, self.cpu.id, kvm.id, Hva(start), Hva(end), prot == "rw")

    def own_again(self, kvm: Kvm, start: int, end: int) -> None:
        """The other process that shared the pages is gone: a write fault takes them without a copy and
        without a notifier (wp_page_reuse)."""
        lib.mm_protect(self.cpu.m, self.cpu.id, kvm.id, Hva(start), Hva(end), True)

    def age(self, kvm: Kvm, page: int) -> bool:
        """folio_referenced() of reclaim, one page."""
        host_works(self.cpu, kvm)
        return kvm_mmu_notifier_clear_flush_young(self.cpu, kvm, Hva(page), Hva(page + 1))

    def collapse(self, kvm: Kvm, start: int) -> None:
        """khugepaged, one 2M range."""
        with self._notified(kvm, start, start + HPAGE_PMD_NR, lib.PROMISE_NOTIFIER):
            self.cpu.check(lib.mm_collapse(self.cpu.m, self.cpu.id, kvm.id, Hva(start)))
            host_works(self.cpu, kvm)  # 512 pages were copied

    def make_huge(self, kvm: Kvm, start: int, pages: int) -> None:
        """Memory that is huge from its first fault on, before any vCPU uses it."""
        page = ffi.new("struct mm_page *")
        for block in range(start, start + pages, HPAGE_PMD_NR):
            self.cpu.check(lib.mm_fault(self.cpu.m, self.cpu.id, kvm.id, Hva(block), True, page))
            self.cpu.check(lib.mm_collapse(self.cpu.m, self.cpu.id, kvm.id, Hva(block)))
