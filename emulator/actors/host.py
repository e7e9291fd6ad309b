"""The host's memory management: reclaim, mprotect, page migration, khugepaged.

Whatever takes a page, or a right to it, away from the VMM's address space is bracketed by KVM's mmu_notifier;
several of these actors do so concurrently with each other and with the VMs' own ioctls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from random import Random
from typing import TYPE_CHECKING

from emulator.actors.base import MachineActor
from emulator.kvm.host_work import host_works
from emulator.kvm.kvm_main import (
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
)
from emulator.locks import Mutex
from emulator.workload import HOST_ACTIVITIES, Pacer, Workload
from native import lib

if TYPE_CHECKING:
    from emulator.actors.crew import Crew
    from emulator.kvm.structs import Kvm
    from emulator.runtime import Cpu

HUGE_PAGES = 512
# mprotect takes write access away for about this long; a guest that writes meanwhile waits for it.
_PROTECTED_SECONDS = 0.0005
_RECLAIM_PAGES = 4 * HUGE_PAGES


class UserMemory:
    """A VMM's address space, as all hosts share it.

    A lock per 2 MiB stands for what keeps khugepaged out of a range that is being unmapped (mmap_lock, the
    folio's and the anon_vma's locks): whether a range is mapped huge does not change under its holder.
    """

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self.pages = kvm.gfns
        regions = -(-self.pages // HUGE_PAGES)
        self._locks = [Mutex(f"page tables of VM {kvm.id} at {i * HUGE_PAGES:#x}") for i in range(regions)]

    @contextmanager
    def changing(self, cpu: Cpu, start: int, end: int, promise: int = lib.PROMISE_NOTIFIER) -> Iterator[None]:
        """Bracket a change of [start, end).

        A huge page that is changed in part is split first, and that invalidates all of it
        (__split_huge_pmd): a fault outside the range must not map the huge page meanwhile.
        """
        with ExitStack() as stack:
            for region in range(start // HUGE_PAGES, -(-end // HUGE_PAGES)):
                stack.enter_context(self._locks[region].held(cpu))
            first, last = self._widen(cpu, start, end)
            host_works(cpu, self.kvm)
            kvm_mmu_notifier_invalidate_range_start(cpu, self.kvm, first, last, promise)
            yield
            kvm_mmu_notifier_invalidate_range_end(cpu, self.kvm, first, last)

    def _widen(self, cpu: Cpu, start: int, end: int) -> tuple[int, int]:
        first, last = start // HUGE_PAGES * HUGE_PAGES, -(-end // HUGE_PAGES) * HUGE_PAGES
        if first != start and lib.mm_huge(cpu.m, self.kvm.id, first):
            start = first
        if last != end and lib.mm_huge(cpu.m, self.kvm.id, last - HUGE_PAGES):
            end = last
        return start, end


class Host(MachineActor):
    """One kernel thread of the host's memory management, at work on all VMs."""

    def __init__(
        self,
        crew: Crew,
        cpu: Cpu,
        number: int,
        memories: Sequence[UserMemory],
        pages: int,
        pacer: Pacer,
        rng: Random,
    ) -> None:
        super().__init__(crew, cpu, f"host{number}")
        self.memories = memories
        self.pages = pages
        self.pacer = pacer
        self.rng = rng
        self._actions: dict[str, Callable[[UserMemory], None]] = {
            "unmap": self.unmap,
            "reclaim": self.reclaim,
            "mprotect": self.mprotect,
            "migrate": self.migrate,
            "collapse": self.collapse,
            "split": self.split,
        }

    def idle(self) -> None:
        activity, wait = self.pacer.next()
        if activity is None:
            self.cpu.check(lib.cpu_halt(self.cpu.m, self.cpu.id, max(1, int(wait * 1e6))))
            return
        self._actions[activity](self.rng.choice(self.memories))

    def unmap(self, memory: UserMemory) -> None:
        """Reclaim: the frames go back to the host, contents to swap."""
        start, end = self._range(memory)
        with memory.changing(self.cpu, start, end):
            lib.mm_unmap(self.cpu.m, self.cpu.id, memory.kvm.id, start, end, 1)

    def reclaim(self, memory: UserMemory) -> None:
        """The second half of a large range, then all of it: the second walk ends where nothing is left."""
        pages = min(_RECLAIM_PAGES, memory.pages)
        first = self.rng.randrange(memory.pages - pages + 1)
        for start in (first + pages // 2, first):
            with memory.changing(self.cpu, start, first + pages):
                lib.mm_unmap(self.cpu.m, self.cpu.id, memory.kvm.id, start, first + pages, 1)

    def mprotect(self, memory: UserMemory) -> None:
        """mprotect(PROT_READ), and back after a moment."""
        start, end = self._range(memory)
        vm = memory.kvm.id
        with memory.changing(self.cpu, start, end, lib.PROMISE_NOTIFIER_WRITE):
            lib.mm_protect(self.cpu.m, self.cpu.id, vm, start, end, 0)
        self.cpu.check(lib.cpu_halt(self.cpu.m, self.cpu.id, int(_PROTECTED_SECONDS * 1e6)))
        with memory.changing(self.cpu, start, end):
            lib.mm_protect(self.cpu.m, self.cpu.id, vm, start, end, 1)

    def migrate(self, memory: UserMemory) -> None:
        """migrate_pages(): each page to a new frame."""
        start, end = self._range(memory)
        with memory.changing(self.cpu, start, end):
            lib.mm_migrate(self.cpu.m, self.cpu.id, memory.kvm.id, start, end)

    def collapse(self, memory: UserMemory) -> None:
        """khugepaged: one block for 512 pages.  Without a free block it has nothing to do."""
        start, end = self._huge_range(memory)
        if lib.mm_huge(self.cpu.m, memory.kvm.id, start):
            return
        with memory.changing(self.cpu, start, end):
            rc = lib.mm_collapse(self.cpu.m, self.cpu.id, memory.kvm.id, start)
            host_works(self.cpu, memory.kvm)  # 512 pages were copied
        if rc not in (0, lib.MACHINE_NOMEM, lib.MACHINE_AGAIN):
            self.cpu.fail(rc)

    def split(self, memory: UserMemory) -> None:
        """__split_huge_pmd(): the same frames, mapped by 4K pages."""
        start, end = self._huge_range(memory)
        if lib.mm_huge(self.cpu.m, memory.kvm.id, start):
            with memory.changing(self.cpu, start, end):
                self.cpu.check(lib.mm_split(self.cpu.m, self.cpu.id, memory.kvm.id, start))

    def _range(self, memory: UserMemory) -> tuple[int, int]:
        """Pages of which some are present, if a few tries find such."""
        pages = min(self.pages, memory.pages)
        start = 0
        for _ in range(4):
            start = self.rng.randrange(memory.pages - pages + 1)
            if lib.mm_present(self.cpu.m, memory.kvm.id, start, start + pages):
                break
        return start, start + pages

    def _huge_range(self, memory: UserMemory) -> tuple[int, int]:
        start = self.rng.randrange(memory.pages // HUGE_PAGES) * HUGE_PAGES
        return start, start + HUGE_PAGES


def host_pacer(workload: Workload, actors: int, rng: Random) -> Pacer:
    return Pacer(workload, HOST_ACTIVITIES, 1.0 / actors, rng)
