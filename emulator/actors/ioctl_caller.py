"""The VMM's thread that makes a VM's ioctls: memory slots and dirty logging.

Dirty logging serves a live migration: reported pages are copied, and the copy is compared with the guest's
memory after the last, paused round (emulator.actors.image).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, Any

from emulator.actors.base import MachineActor
from emulator.actors.image import Image
from emulator.actors.scheduler import Pause, Resume
from emulator.kvm import structs
from emulator.kvm.kvm_host import KVM_MAX_HUGEPAGE_LEVEL, KVM_MEM_LOG_DIRTY_PAGES, kvm_pages_per_hpage
from emulator.kvm.mmu.mmu import kvm_zap_gfn_range
from emulator.kvm.mmu.tdp_roots import flush_workqueue
from emulator.kvm.reset import apic_send_init
from emulator.kvm.smm import kvm_inject_smi
from emulator.kvm.virt.kvm_main import kvm_set_memory_region, kvm_vm_ioctl_get_dirty_log
from emulator.scenario.workload import KVM_ACTIVITIES, Pacer, Workload
from native import lib
from native.types import Gfn

if TYPE_CHECKING:
    from pykka import ActorRef, Future

    from emulator.actors.crew import Crew
    from emulator.machine.runtime import Cpu

RAM_SLOT = 0
SECOND_SLOT = 1

# Rounds of reading the log while the guest runs, as a live migration's pre-copy.
_ROUNDS = 3
_BETWEEN_ROUNDS_US = 2000
# How long logging stays armed in a toggle, which does not read the log.
_ARMED_US = 5000
_ZAP_PAGES = 2048
_FEW_PAGES = 512
# Time for the guest to map pages again before that zap: the slot's deletion has zapped all of its roots.
_REFILL_US = 10_000
# How often the workqueue checks for work, with policies that schedule any.
_WORKQUEUE_US = 200
# Share of the cycles with a range zap.  Its flush drops stale entries that the deletion may have left, so
# some cycles go without it.
_ZAP_SHARE = 0.25


def whole_range(slot: structs.KvmMemorySlot, pages: int, rng: Random) -> tuple[Gfn, Gfn]:
    """Return the gfns [start, end) of some `pages` pages of a slot that are safe to give to
    kvm_zap_gfn_range(): no huge page is mapped on both sides of an end.

    A fault next to a range does not retry while the range is zapped, and may map again a huge page that
    reaches into the range.  So in Linux 7.3 each caller zaps all memory, whole huge pages, or a slot of one
    page.  Before 6.11 update_mtrr() zapped smaller ranges, but kvm_mtrr_check_gfn_range_consistency() forbade
    huge pages there.  For memory attributes a smaller range was a bug, which 9129633d568e (6.16) repairs.
    """
    huge = kvm_pages_per_hpage(KVM_MAX_HUGEPAGE_LEVEL)
    start = slot.base_gfn + rng.randrange(slot.npages) & -huge
    end = start + pages + huge - 1 & -huge
    return max(start, slot.base_gfn), min(end, slot.end_gfn)


class IoctlCaller(MachineActor):
    """The ioctl caller of one VM.  slot_gone: the seconds for which a slot that it deletes stays away."""

    def __init__(
        self,
        crew: Crew,
        cpu: Cpu,
        kvm: structs.Kvm,
        scheduler: ActorRef[Any],
        pacer: Pacer,
        rng: Random,
        slot_gone: float,
    ) -> None:
        super().__init__(crew, cpu, f"kvm{kvm.id}")
        self.kvm = kvm
        self.scheduler = scheduler
        self.pacer = pacer
        self.rng = rng
        self._slot_gone_us = slot_gone * 1e6
        self.dirty_rounds = 0
        has_worker = kvm.policy.may_answer("root_put", "async")
        self._longest_sleep_us = _WORKQUEUE_US if has_worker else math.inf
        self._actions: dict[str, Callable[[], None]] = {
            "memslot_cycles": self.memslot_cycle,
            "range_zaps": self.range_zap,
            "dirty_log_cycles": self.dirty_log_cycle,
            "dirty_log_toggles": self.dirty_log_toggle,
            "smis": self.smi,
            "resets": self.reset,
        }

    def idle(self) -> None:
        # This actor is the VM's workqueue, too.
        flush_workqueue(self.cpu, self.kvm)
        activity, wait = self.pacer.next()
        if activity is None:
            self._sleep(min(wait * 1e6, self._longest_sleep_us))
        else:
            self._actions[activity]()

    def _sleep(self, microseconds: float) -> None:
        self.cpu.check(lib.cpu_halt(self.cpu.m, self.cpu.id, max(1, int(microseconds))))

    # --- memory slots ----------------------------------------------------------------------------------

    def memslot_cycle(self) -> None:
        """Delete a slot and create it again; then zap a range, as changes of MTRRs do."""
        slot = self.kvm.memslots[0].by_id[SECOND_SLOT]
        kvm_set_memory_region(self.cpu, self.kvm, SECOND_SLOT, slot.base_gfn, 0, slot.userspace_addr)
        self._sleep(self._slot_gone_us)
        kvm_set_memory_region(
            self.cpu, self.kvm, SECOND_SLOT, slot.base_gfn, slot.npages, slot.userspace_addr
        )
        if self.rng.random() < _ZAP_SHARE:
            self._sleep(_REFILL_US)
            self._zap_range(_ZAP_PAGES)

    def range_zap(self) -> None:
        """Zap the pages of one huge page, as a change of MTRRs does."""
        self._zap_range(_FEW_PAGES)

    def _zap_range(self, pages: int) -> None:
        start, end = whole_range(self.kvm.memslots[0].by_id[RAM_SLOT], pages, self.rng)
        kvm_zap_gfn_range(self.cpu, self.kvm, start, end)

    def smi(self) -> None:
        """Send an SMI to a vCPU (KVM_SMI), which runs its handler in SMM's address space, on its own root."""
        kvm_inject_smi(self.cpu, self.rng.choice(self.kvm.vcpus))

    def reset(self) -> None:
        """Send an INIT to a vCPU, as another vCPU does: its guest boots, without its cached translations."""
        apic_send_init(self.cpu, self.rng.choice(self.kvm.vcpus))

    # --- dirty logging ---------------------------------------------------------------------------------

    def dirty_log_cycle(self) -> None:
        """Arm, copy all pages, copy dirtied pages, pause, copy the rest, compare, disarm."""
        slot = self.kvm.memslots[0].by_id[RAM_SLOT]
        self._set_logging(slot, KVM_MEM_LOG_DIRTY_PAGES)
        image = Image(self.cpu, self.kvm, slot.userspace_addr, slot.npages)
        try:
            for _ in range(_ROUNDS):
                self._sleep(_BETWEEN_ROUNDS_US)
                self._read_and_copy(image, slot)
            with self._vcpus_paused():
                self._read_and_copy(image, slot)
                image.compare(self.cpu)
        finally:
            image.destroy(self.cpu)
        self._set_logging(slot, 0)
        self.dirty_rounds += 1

    def dirty_log_toggle(self) -> None:
        """Arm and disarm dirty logging.

        Faults in between map 4K pages, even where the host maps huge ones.  Disarming recovers the huge
        pages, unless a fault has done so first.
        """
        slot = self.kvm.memslots[0].by_id[RAM_SLOT]
        self._set_logging(slot, KVM_MEM_LOG_DIRTY_PAGES)
        self._sleep(_ARMED_US)
        self._set_logging(slot, 0)

    def _set_logging(self, slot: structs.KvmMemorySlot, flags: int) -> None:
        kvm_set_memory_region(
            self.cpu, self.kvm, slot.id, slot.base_gfn, slot.npages, slot.userspace_addr, flags
        )

    def _read_and_copy(self, image: Image, slot: structs.KvmMemorySlot) -> None:
        words = kvm_vm_ioctl_get_dirty_log(self.cpu, self.kvm, slot.id)
        named = sum(word.bit_count() for word in words)
        self.cpu.event(lib.EVENT_LOG_GET, slot.base_gfn, named, self.kvm.id)
        image.copy(self.cpu, slot.userspace_addr, words)

    @contextmanager
    def _vcpus_paused(self) -> Iterator[None]:
        parked: list[Future[None]] = self.scheduler.ask(Pause(self.kvm.id), block=True)
        for future in parked:
            future.get()
        try:
            yield
        finally:
            self.scheduler.tell(Resume(self.kvm.id))


def kvm_pacer(workload: Workload, vms: int, rng: Random) -> Pacer:
    return Pacer(workload, KVM_ACTIVITIES, 1.0 / vms, rng)
