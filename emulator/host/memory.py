"""A VMM's address space under the host: reclaim, MADV_DONTNEED, mprotect, page migration, khugepaged.

Each operation brackets its change with KVM's mmu_notifier and takes the locks that Linux takes around that
bracket, and no others.  Most take them shared; the page-table lock (native/memory/mm_internal.h), which makes
the change itself atomic, is taken within the bracket.  So several invalidations of one page can be in
progress at a time, and the later ones find nothing left to zap or to free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from emulator.kvm.host_work import host_works
from emulator.kvm.virt.kvm_main import (
    kvm_mmu_notifier_clear_flush_young,
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
)
from emulator.machine.locks import RwSemaphore
from emulator.machine.runtime import HPAGE_PMD_NR
from native import lib
from native.types import Hva, PromiseKind

if TYPE_CHECKING:
    from emulator.kvm.structs import Kvm
    from emulator.machine.runtime import Cpu


class UserMemory:
    """struct mm_struct with one VMA, as all of the host's threads share it.

    mmap_lock and anon_vma (the reverse map's lock) are taken in this order.  khugepaged alone holds both for
    write, so no range becomes huge within another operation's bracket: collapse_huge_page().
    """

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self.pages = kvm.gfns
        self.mmap_lock = RwSemaphore(f"mmap_lock of VM {kvm.id}")
        self.anon_vma = RwSemaphore(f"anon_vma of VM {kvm.id}")
        # Called with the pages that user space discards, because no dirty log of KVM's names them.
        self.discarded: Callable[[Cpu, Hva, Hva], None] = lambda cpu, start, end: None

    def wp_page_copy(self, cpu: Cpu, page: Hva) -> bool:
        """wp_page_copy(), for KVM's faults: copy the page for its first write; return False without a frame.

        Allocating and copying takes time, in which another vCPU may have copied the page.  The fault has to
        start over in any case, and takes no lock here.
        """
        if host_works(cpu, self.kvm):
            return True
        kvm_mmu_notifier_invalidate_range_start(cpu, self.kvm, page, page + 1)
        rc = lib.mm_break_cow(cpu.m, cpu.id, self.kvm.id, page)
        kvm_mmu_notifier_invalidate_range_end(cpu, self.kvm, page, page + 1)
        if rc == lib.MACHINE_NOMEM:
            return False
        cpu.check(rc)
        return True

    def reclaim(self, cpu: Cpu, start: Hva, end: Hva) -> None:
        """try_to_unmap(), without mmap_lock: return the frames to the host, and the contents to swap.

        A huge page that is reclaimed in part is split first (split_folio()).
        """
        with self.anon_vma.read_lock(cpu):
            self._split_ends(cpu, start, end)
            with self._invalidating(cpu, start, end):
                lib.mm_unmap(cpu.m, cpu.id, self.kvm.id, start, end, True)

    def referenced(self, cpu: Cpu, page: Hva) -> bool:
        """folio_referenced(), for reclaim: return whether the guest has used the page since the last call."""
        with self.anon_vma.read_lock(cpu):
            host_works(cpu, self.kvm)
            return kvm_mmu_notifier_clear_flush_young(cpu, self.kvm, page, page + 1)

    def discard(self, cpu: Cpu, start: Hva, end: Hva) -> None:
        """MADV_DONTNEED: return the frames to the host, and lose the contents.

        zap_pmd_range() splits a huge page after the bracket for [start, end) has begun; here the split comes
        before it.  Hence faults may map the huge page again for a moment.  This is harmless, because the host
        has changed nothing yet, and the split's bracket invalidates all of the page.
        """
        with self.mmap_lock.read_lock(cpu):
            self._split_ends(cpu, start, end)
            with self._invalidating(cpu, start, end):
                lib.mm_unmap(cpu.m, cpu.id, self.kvm.id, start, end, False)
                self.discarded(cpu, start, end)

    def protect(self, cpu: Cpu, start: Hva, end: Hva, writable: bool) -> None:
        """mprotect(): split the VMA, and with it a huge page (vma_adjust_trans_huge()), then protect."""
        promise = lib.PROMISE_NOTIFIER if writable else lib.PROMISE_NOTIFIER_WRITE
        with self.mmap_lock.write_lock(cpu):
            self._split_ends(cpu, start, end)
            with self._invalidating(cpu, start, end, promise):
                lib.mm_protect(cpu.m, cpu.id, self.kvm.id, start, end, writable)

    def migrate(self, cpu: Cpu, start: Hva, end: Hva) -> None:
        """migrate_pages(): move each page to a new frame.

        try_to_migrate() invalidates whole folios, so a huge page that [start, end) touches is invalidated as
        one.  A huge page that another thread splits meanwhile has been invalidated all the same.
        """
        with self.anon_vma.read_lock(cpu):
            if self._cut(cpu, start):
                start = start & -HPAGE_PMD_NR
            if self._cut(cpu, end):
                end = end + HPAGE_PMD_NR - 1 & -HPAGE_PMD_NR
            with self._invalidating(cpu, start, end):
                lib.mm_migrate(cpu.m, cpu.id, self.kvm.id, start, end)

    def collapse(self, cpu: Cpu, start: Hva) -> None:
        """collapse_huge_page(): map the 512 pages from `start` on by one block.

        Without a free block, or with no page present, nothing changes.
        """
        with self.mmap_lock.write_lock(cpu), self.anon_vma.write_lock(cpu):
            if lib.mm_huge(cpu.m, self.kvm.id, start):
                return
            with self._invalidating(cpu, start, start + HPAGE_PMD_NR):
                rc = lib.mm_collapse(cpu.m, cpu.id, self.kvm.id, start)
                host_works(cpu, self.kvm)  # 512 pages were copied
            if rc not in (lib.MACHINE_NOMEM, lib.MACHINE_AGAIN):
                cpu.check(rc)

    def split(self, cpu: Cpu, start: Hva) -> None:
        """__split_huge_pmd(): map the frames of a huge page by 4K pages."""
        with self.mmap_lock.read_lock(cpu):
            if lib.mm_huge(cpu.m, self.kvm.id, start):
                self._split(cpu, start)

    def _split_ends(self, cpu: Cpu, start: Hva, end: Hva) -> None:
        """Split the huge pages that [start, end) cuts in two."""
        for page in (start, end):
            if self._cut(cpu, page):
                self._split(cpu, page & -HPAGE_PMD_NR)

    def _cut(self, cpu: Cpu, page: Hva) -> bool:
        """Return whether the boundary before `page` lies inside a huge page."""
        return bool(page % HPAGE_PMD_NR and lib.mm_huge(cpu.m, self.kvm.id, page))

    def _split(self, cpu: Cpu, start: Hva) -> None:
        """Split a huge page within a bracket of its own, over the whole page.

        Otherwise a fault beside the caller's range would map it huge again.
        """
        with self._invalidating(cpu, start, start + HPAGE_PMD_NR):
            cpu.check(lib.mm_split(cpu.m, cpu.id, self.kvm.id, start))

    @contextmanager
    def _invalidating(
        self, cpu: Cpu, start: Hva, end: Hva, promise: PromiseKind = lib.PROMISE_NOTIFIER
    ) -> Iterator[None]:
        host_works(cpu, self.kvm)
        kvm_mmu_notifier_invalidate_range_start(cpu, self.kvm, start, end, promise)
        yield
        kvm_mmu_notifier_invalidate_range_end(cpu, self.kvm, start, end)
