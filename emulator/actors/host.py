"""Threads of the host's memory management, each at work on all VMs (their operations: user_memory.py).

Several of these actors run concurrently with each other and with the VMs' own ioctls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING

from emulator.actors.base import MachineActor
from emulator.host.memory import UserMemory
from emulator.kvm.host_work import host_works, owe_a_flush
from emulator.machine.runtime import HPAGE_PMD_NR
from emulator.scenario.workload import HOST_ACTIVITIES, Pacer, Workload
from native import lib
from native.types import Hva, span

if TYPE_CHECKING:
    from emulator.actors.crew import Crew
    from emulator.kvm.structs import Kvm
    from emulator.machine.runtime import Cpu

# mprotect takes write access away for about this long; a guest that writes meanwhile waits for it.
_PROTECTED_SECONDS = 0.0005
_RECLAIM_PAGES = 4 * HPAGE_PMD_NR


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
        # Duration of the last page for which a vCPU serviced a flush; initially about an exit and an entry.
        self._page_seconds = 0.0002
        self._actions: dict[str, Callable[[UserMemory], None]] = {
            "unmap": self.unmap,
            "reclaim": self.reclaim,
            "mprotect": self.mprotect,
            "migrate": self.migrate,
            "collapse": self.collapse,
            "split": self.split,
            "age": self.age,
        }

    def idle(self) -> None:
        activity, wait = self.pacer.next()
        if activity is None:
            self.cpu.check(lib.cpu_halt(self.cpu.m, self.cpu.id, max(1, int(wait * 1e6))))
            return
        self._actions[activity](self.rng.choice(self.memories))

    def unmap(self, memory: UserMemory) -> None:
        memory.reclaim(self.cpu, *self._range(memory))

    def reclaim(self, memory: UserMemory) -> None:
        """Reclaim the second half of a large range, then all of it, so that a walk ends in an empty half."""
        pages = min(_RECLAIM_PAGES, memory.pages)
        first = Hva(self.rng.randrange(memory.pages - pages + 1))
        for start in (first + pages // 2, first):
            memory.reclaim(self.cpu, start, first + pages)

    def mprotect(self, memory: UserMemory) -> None:
        """Make a range read-only by mprotect(PROT_READ), and writable again after a moment."""
        start, end = self._range(memory)
        memory.protect(self.cpu, start, end, writable=False)
        self.cpu.check(lib.cpu_halt(self.cpu.m, self.cpu.id, int(_PROTECTED_SECONDS * 1e6)))
        memory.protect(self.cpu, start, end, writable=True)

    def migrate(self, memory: UserMemory) -> None:
        memory.migrate(self.cpu, *self._range(memory))

    def collapse(self, memory: UserMemory) -> None:
        """Collapse a range into a huge page, as khugepaged does."""
        memory.collapse(self.cpu, self._huge_range(memory))

    def split(self, memory: UserMemory) -> None:
        memory.split(self.cpu, self._huge_range(memory))

    def age(self, memory: UserMemory) -> None:
        """Ask page by page whether the guest has used it, as reclaim does first.

        Unused pages stay mapped; `unmap` takes pages.
        """
        for page in span(*self._range(memory)):
            self._work_on_page(memory.kvm)
            memory.referenced(self.cpu, page)

    def _work_on_page(self, kvm: Kvm) -> None:
        """Wait after a page if a vCPU owes a flush: as long for one that is halted as for one that runs.

        If pages took time only while the vCPU runs, most of a burst would fall into its sleep, and one flush
        would serve them all.
        """
        start = time.monotonic()
        if host_works(self.cpu, kvm):
            self._page_seconds = time.monotonic() - start
        elif owe_a_flush(self.cpu, kvm):
            self.cpu.check(lib.cpu_halt(self.cpu.m, self.cpu.id, max(1, int(self._page_seconds * 1e6))))

    def _range(self, memory: UserMemory) -> tuple[Hva, Hva]:
        """Return a random range, with some page present if a few tries find such a range."""
        pages = min(self.pages, memory.pages)
        start = Hva(0)
        for _ in range(4):
            start = Hva(self.rng.randrange(memory.pages - pages + 1))
            if lib.mm_present(self.cpu.m, memory.kvm.id, start, start + pages):
                break
        return start, start + pages

    def _huge_range(self, memory: UserMemory) -> Hva:
        return Hva(self.rng.randrange(memory.pages // HPAGE_PMD_NR) * HPAGE_PMD_NR)


def host_pacer(workload: Workload, actors: int, rng: Random) -> Pacer:
    return Pacer(workload, HOST_ACTIVITIES, 1.0 / actors, rng)
