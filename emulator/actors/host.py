"""The host's memory management: reclaim, mprotect, page migration, khugepaged.

Whatever takes a page, or a right to it, away from the VMM's address space is bracketed by KVM's mmu_notifier;
several of these actors do so concurrently with each other and with the VMs' own ioctls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING

from emulator.actors.base import MachineActor
from emulator.kvm.kvm_main import (
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
)
from emulator.workload import HOST_ACTIVITIES, Pacer, Workload
from native import lib

if TYPE_CHECKING:
    from emulator.actors.crew import Crew
    from emulator.kvm.structs import Kvm
    from emulator.runtime import Cpu

HUGE_PAGES = 512
# mprotect takes write access away for about this long; a guest that writes meanwhile waits for it.
_PROTECTED_SECONDS = 0.0005


class Host(MachineActor):
    """One kernel thread of the host's memory management, at work on all VMs."""

    def __init__(
        self, crew: Crew, cpu: Cpu, number: int, vms: Sequence[Kvm], pages: int, pacer: Pacer, rng: Random
    ) -> None:
        super().__init__(crew, cpu, f"host{number}")
        self.vms = vms
        self.pages = pages
        self.pacer = pacer
        self.rng = rng
        self._actions: dict[str, Callable[[Kvm], None]] = {
            "unmap": self.unmap,
            "mprotect": self.mprotect,
            "migrate": self.migrate,
            "collapse": self.collapse,
            "split": self.split,
        }

    def idle(self) -> None:
        activity, wait = self.pacer.next(time.monotonic())
        if activity is None:
            self.cpu.check(lib.cpu_halt(self.cpu.m, self.cpu.id, max(1, int(wait * 1e6))))
            return
        self._actions[activity](self.rng.choice(self.vms))

    def unmap(self, kvm: Kvm) -> None:
        """Reclaim: the frames go back to the host, contents to swap."""
        start, end = self._range(kvm, self.pages)
        kvm_mmu_notifier_invalidate_range_start(self.cpu, kvm, start, end)
        lib.mm_unmap(self.cpu.m, self.cpu.id, kvm.id, start, end, 1)
        kvm_mmu_notifier_invalidate_range_end(self.cpu, kvm, start, end)

    def mprotect(self, kvm: Kvm) -> None:
        """mprotect(PROT_READ), and back after a moment."""
        start, end = self._range(kvm, self.pages)
        self._change_protection(kvm, start, end, writable=0)
        self.cpu.check(lib.cpu_halt(self.cpu.m, self.cpu.id, int(_PROTECTED_SECONDS * 1e6)))
        self._change_protection(kvm, start, end, writable=1)

    def _change_protection(self, kvm: Kvm, start: int, end: int, writable: int) -> None:
        promise = lib.PROMISE_NOTIFIER if writable else lib.PROMISE_NOTIFIER_WRITE
        kvm_mmu_notifier_invalidate_range_start(self.cpu, kvm, start, end, promise)
        lib.mm_protect(self.cpu.m, self.cpu.id, kvm.id, start, end, writable)
        kvm_mmu_notifier_invalidate_range_end(self.cpu, kvm, start, end)

    def migrate(self, kvm: Kvm) -> None:
        """migrate_pages(): each page to a new frame."""
        start, end = self._range(kvm, self.pages)
        kvm_mmu_notifier_invalidate_range_start(self.cpu, kvm, start, end)
        lib.mm_migrate(self.cpu.m, self.cpu.id, kvm.id, start, end)
        kvm_mmu_notifier_invalidate_range_end(self.cpu, kvm, start, end)

    def collapse(self, kvm: Kvm) -> None:
        """khugepaged: one block for 512 pages.  Without a free block it has nothing to do."""
        start = self._huge_range(kvm)
        if lib.mm_huge(self.cpu.m, kvm.id, start):
            return
        kvm_mmu_notifier_invalidate_range_start(self.cpu, kvm, start, start + HUGE_PAGES)
        rc = lib.mm_collapse(self.cpu.m, self.cpu.id, kvm.id, start)
        kvm_mmu_notifier_invalidate_range_end(self.cpu, kvm, start, start + HUGE_PAGES)
        if rc not in (0, lib.MACHINE_NOMEM, lib.MACHINE_AGAIN):
            self.cpu.fail(rc)

    def split(self, kvm: Kvm) -> None:
        """__split_huge_pmd(): the same frames, mapped by 4K pages."""
        start = self._huge_range(kvm)
        if not lib.mm_huge(self.cpu.m, kvm.id, start):
            return
        kvm_mmu_notifier_invalidate_range_start(self.cpu, kvm, start, start + HUGE_PAGES)
        lib.mm_split(self.cpu.m, self.cpu.id, kvm.id, start)
        kvm_mmu_notifier_invalidate_range_end(self.cpu, kvm, start, start + HUGE_PAGES)

    def _range(self, kvm: Kvm, pages: int) -> tuple[int, int]:
        pages = min(pages, kvm.gfns)
        start = self.rng.randrange(kvm.gfns - pages + 1)
        return start, start + pages

    def _huge_range(self, kvm: Kvm) -> int:
        return self.rng.randrange(max(1, kvm.gfns // HUGE_PAGES)) * HUGE_PAGES


def host_pacer(workload: Workload, actors: int, rng: Random) -> Pacer:
    return Pacer(workload, HOST_ACTIVITIES, 1.0 / actors, rng)
