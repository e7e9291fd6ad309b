"""All that the shadow MMU keeps for a VM goes as its pages are zapped, however long guests have run.

A process grows meanwhile, up to the most frames and tables that were ever in use at once: the core takes its
memory page by page, and gives none back.  So the test counts objects, and not bytes.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from pykka import Future

from emulator.actors.ioctl_caller import RAM_SLOT, SECOND_SLOT
from emulator.actors.scheduler import Pause, Resume, Scheduler
from emulator.job.emulation import Emulation
from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES
from emulator.kvm.mmu.mmu import kvm_mmu_zap_all, kvm_zap_gfn_range
from emulator.kvm.mmu.roots import kvm_mmu_unload
from emulator.kvm.structs import Kvm
from emulator.kvm.virt.kvm_main import kvm_set_memory_region
from emulator.litmus.leftovers import left_over
from emulator.policy import preset
from emulator.scenario.config import parse_scenario
from native import lib

SCENARIO = """
[machine]
pcpus = 2
ept = false
[[vm]]
vcpus = 2
memory = 4
traces = ["sort", "cc1"]
records = 5000
processes = 3
threads = true
own_kernel_tables = true
switch_every = 400
unmap_every = 150
protect_every = 250
table_every = 1000
flush_batch = 8
[host]
actors = 0
[kvm]
mmu_pages = 40
[scheduler]
mode = "pin"
"""
ACCESSES = 30_000


def disturb(emulation: Emulation, kvm: Kvm) -> None:
    """Let the guests run; log dirty pages, zap a range, delete a slot and create it again meanwhile."""
    cpu, m = emulation.crew.main, emulation.m
    until = lib.counter_sum(m, lib.COUNT_ACCESSES) + ACCESSES
    limit = time.monotonic() + 60
    while lib.counter_sum(m, lib.COUNT_ACCESSES) < until:
        assert time.monotonic() < limit, "the guests make no progress"
        ram, second = (kvm.memslots[0].by_id[slot] for slot in (RAM_SLOT, SECOND_SLOT))
        for flags in (KVM_MEM_LOG_DIRTY_PAGES, 0):
            kvm_set_memory_region(cpu, kvm, RAM_SLOT, ram.base_gfn, ram.npages, ram.userspace_addr, flags)
        kvm_zap_gfn_range(cpu, kvm, ram.base_gfn, ram.end_gfn)
        for pages in (0, second.npages):
            kvm_set_memory_region(cpu, kvm, SECOND_SLOT, second.base_gfn, pages, second.userspace_addr)
        cpu.check(lib.cpu_halt(m, cpu.id, 20_000))


def kept(kvm: Kvm) -> dict[str, int]:
    """Return the number of objects that the shadow MMU keeps, by kind."""
    shadow = kvm.shadow
    slots = [slot.arch for slots in kvm.memslots for slot in slots.slots]
    return {
        "pages": len(shadow.page_of),
        "active pages": len(shadow.active_mmu_pages),
        "pages in the hash": len(shadow.mmu_page_hash),
        "pages that wait": len(shadow.zapped_pages),
        "pages that count": shadow.n_mmu_pages,
        "pages of guests' tables": shadow.indirect_shadow_pages,
        "SPTEs in rmaps": sum(len(sptes) for arch in slots for sptes in arch.rmap.values()),
        "tracked gfns": sum(len(arch.gfn_write_track) for arch in slots),
        "gfns that no huge page may map": sum(len(arch.disallow_lpage) for arch in slots),
    }


@pytest.mark.stress
def test_all_that_the_shadow_mmu_keeps_comes_back() -> None:
    with Emulation(parse_scenario(SCENARIO, "growth", Path()), preset("linux-7.3"), seed=1) as emulation:
        (kvm,) = emulation.vms
        emulation.adopt()
        try:
            emulation.start()
            actors = emulation.crew.actors
            (scheduler,) = (actor.actor_ref for actor in actors if isinstance(actor, Scheduler))
            for _ in range(3):
                disturb(emulation, kvm)
                parked: list[Future[None]] = scheduler.ask(Pause(kvm.id), block=True)
                for future in parked:
                    future.get()
                in_use = kept(kvm)
                assert in_use["pages"] > 5, in_use
                assert in_use["SPTEs in rmaps"] > 5, in_use
                for vcpu in kvm.vcpus:
                    kvm_mmu_unload(emulation.crew.main, vcpu)
                kvm_mmu_zap_all(emulation.crew.main, kvm)
                assert {name: n for name, n in kept(kvm).items() if n} == {}
                assert left_over(emulation.machine, [kvm]) == ""
                scheduler.tell(Resume(kvm.id))
            for stat in (lib.STAT_MMU_RECYCLED, lib.STAT_MMU_UNSYNC, lib.STAT_MMU_SHADOW_ZAPPED):
                assert lib.vm_stat(emulation.m, kvm.id, stat) > 0
        finally:
            emulation.release()
