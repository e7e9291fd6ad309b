"""The guest's OS without EPT: changes that it invalidates together, on all vCPUs that run its threads."""

from __future__ import annotations

import pytest

from native import lib
from native.types import VcpuId, VmId
from tests.native.shadow_guests import PAGES, RECORDS, guest
from tests.native.shadow_hypervisor import DIRECT_BASE, FRAME, KERNEL_BASE, NOFLUSH, ShadowHypervisor
from tests.support import CPU0, CPU1

# Of each kind of change, one in a few accesses.
CHANGES = {"switch_every": 300, "unmap_every": 20, "protect_every": 30, "table_every": 900}
PGE = 1 << 7


def batching(machine: ShadowHypervisor, pcid: int, **config: int) -> VcpuId:
    return guest(machine, **({"processes": 3, "pcid": pcid, "batch": 8} | CHANGES | config))


def threads(machine: ShadowHypervisor, pcid: int, **config: int) -> tuple[VcpuId, VcpuId]:
    """Return two vCPUs that run threads of the same processes."""
    first = batching(machine, pcid, **config)
    shared = {"paging": 1, "end_gfn": 2048, "pcid": pcid, "batch": 8} | CHANGES | config
    second = machine.vcpu(machine.vm_of[first], 2, **shared)
    for _ in range(3):
        machine.process(second, RECORDS, PAGES)
    lib.guest_run_threads(machine.m, second, first)
    machine.power_on(second)
    return first, second


def take_turns(machine: ShadowHypervisor, vcpus: tuple[VcpuId, VcpuId], turns: int) -> None:
    """Run the vCPUs in turn, each up to its next exit, also in the middle of its OS."""
    for _ in range(turns):
        for cpu, vcpu in zip((CPU0, CPU1), vcpus, strict=True):
            reason = machine.once(cpu, vcpu, 50)
            if reason not in (lib.EXIT_PREEMPTION_TIMER, lib.EXIT_HLT):
                machine.serve(cpu, vcpu, reason)


@pytest.mark.parametrize("pcid", [0, 1])
@pytest.mark.parametrize("vpid", [True, False])
def test_an_os_that_gathers_changes_runs_clean(pcid: int, vpid: bool) -> None:
    with ShadowHypervisor(vpid=vpid, table_frames=4096) as machine:
        vcpu = batching(machine, pcid)
        machine.run(CPU0, vcpu, 8000)
        assert machine.violations() == {}
        assert machine.count(lib.COUNT_GUEST_INVALIDATIONS) > 50
        # Each kind of invalidation, and old translations that were used before.
        exits = machine.exits
        cleared = [at for at, (name, value) in enumerate(exits) if name == "MOV_CR4" and not value & PGE]
        assert cleared
        assert all(exits[at + 1] == ("MOV_CR4", exits[at][1] | PGE) for at in cleared)
        assert {"INVLPG", "INVPCID", "MOV_CR3"} <= {name for name, _ in exits}
        if vpid:
            assert machine.count(lib.COUNT_LEGAL_STALE) > 0


@pytest.mark.parametrize("broken", ["invlpg", "cr3", "sync"])
def test_a_hypervisor_that_forgets_what_the_guest_invalidates_is_found(broken: str) -> None:
    with ShadowHypervisor(broken=(broken,), table_frames=4096) as machine:
        machine.run(CPU0, batching(machine, 1), 8000)
        assert set(machine.violations()) == {"guest-stale"}


def test_a_process_that_is_not_loaded_is_flushed_when_it_is() -> None:
    """Without INVPCID for it: of the MOVs to CR3, those flush that find changes of their process."""
    with ShadowHypervisor(table_frames=4096) as machine:
        machine.run(CPU0, batching(machine, 1, protect_every=0, table_every=0), 8000)
        switches = [value for name, value in machine.exits if name == "MOV_CR3"]
        flushing = sum(not value & NOFLUSH for value in switches)
        assert len(switches) // 8 < flushing < len(switches)
        assert machine.violations() == {}


@pytest.mark.parametrize("vcpus", [1, 2])
def test_an_os_that_runs_out_of_memory_flushes_and_goes_on(vcpus: int) -> None:
    config = {"end_gfn": 64, "unmap_every": 0, "table_every": 0}
    with ShadowHypervisor(pcpus=2, table_frames=4096) as machine:
        if vcpus == 1:
            first = batching(machine, 0, **config)
            machine.run(CPU0, first, 3000)
        else:
            first, second = threads(machine, 0, **config)
            take_turns(machine, (first, second), 3000)
        assert lib.guest_frames_used(machine.m, first) == 64
        assert machine.count(lib.COUNT_GUEST_INVALIDATIONS) > 20
        assert machine.violations() == {}


def test_a_reset_forgets_a_batch_and_frees_its_pages() -> None:
    with ShadowHypervisor(table_frames=4096) as machine:
        vcpu = batching(machine, 0, end_gfn=200)
        for _ in range(3):
            machine.run(CPU0, vcpu, 1500)
            lib.vcpu_set_paging(machine.m, vcpu, False)
            lib.guest_boot(machine.m, vcpu)
            assert lib.guest_frames_used(machine.m, vcpu) == 0
            machine.switch(vcpu, machine.space[vcpu]._replace(paging=False, cr3=0), 0)
            machine.flush_vpid(CPU0, vcpu)
        machine.run(CPU0, vcpu, 1500)
        assert machine.violations() == {}


@pytest.mark.parametrize("pcid", [0, 1])
def test_threads_share_tables_and_invalidate_on_both_vcpus(pcid: int) -> None:
    with ShadowHypervisor(pcpus=2, table_frames=4096) as machine:
        vcpus = threads(machine, pcid)
        take_turns(machine, vcpus, 3000)
        assert machine.violations() == {}
        assert lib.guest_frames_used(machine.m, vcpus[1]) == 0
        assert machine.space[vcpus[0]].cr3 in {machine.space[vcpus[1]].cr3, *machine_roots(machine, vcpus[1])}
        assert machine.count(lib.COUNT_GUEST_INVALIDATIONS) > 50


def machine_roots(machine: ShadowHypervisor, vcpu: VcpuId) -> set[int]:
    return {space.cr3 for space in machine.tree if space.vcpu == vcpu}


@pytest.mark.parametrize("broken", ["invlpg", "sync"])
def test_what_one_thread_changes_and_the_other_does_not_lose_is_found(broken: str) -> None:
    with ShadowHypervisor(pcpus=2, broken=(broken,), table_frames=4096) as machine:
        take_turns(machine, threads(machine, 1), 3000)
        assert set(machine.violations()) == {"guest-stale"}


@pytest.mark.parametrize("own", [0, 1])
def test_processes_share_tables_for_the_kernel_or_have_their_own(own: int) -> None:
    with ShadowHypervisor(table_frames=4096) as machine:
        vcpu = batching(machine, 1, own_kernel=own)
        machine.run(CPU0, vcpu, 8000)
        assert machine.violations() == {}
        vm, index = machine.vm_of[vcpu], KERNEL_BASE >> 27
        roots = [space.cr3 for space in machine.tree if space.paging]
        assert len(roots) == 3
        assert len({machine.word(CPU0, vm, cr3, index) & FRAME for cr3 in roots}) == (3 if own else 1)


def test_a_kernel_page_goes_from_the_tables_of_all_processes() -> None:
    """Each process has its own entry for it, and the OS clears them all before it invalidates."""
    with ShadowHypervisor(table_frames=4096) as machine:
        vcpu = batching(machine, 1, own_kernel=1, switch_every=40)
        vm, most = machine.vm_of[vcpu], 0
        for _ in range(200):
            machine.run(CPU0, vcpu, 50)
            frames = [kernel_pages(machine, vm, space.cr3) for space in machine.tree if space.paging]
            for page in range(20):
                found = {pages[page] for pages in frames if page in pages}
                assert len(found) <= 1, "an entry of another process is left, with the old frame"
            most = max(most, *(sum(page in pages for pages in frames) for page in range(20)))
        assert most == 3, "no page was mapped by all"
        assert machine.violations() == {}


def kernel_pages(machine: ShadowHypervisor, vm: VmId, cr3: int) -> dict[int, int]:
    """Return the frames of the kernel's first pages, by page, in an address space."""
    gfn = cr3
    for level in (4, 3, 2):
        entry = machine.word(CPU0, vm, gfn, KERNEL_BASE >> 9 * (level - 1) & 511)
        if not entry & 1:
            return {}
        gfn = (entry & FRAME) >> 12
    entries = {page: machine.word(CPU0, vm, gfn, page) for page in range(20)}
    return {page: entry & FRAME for page, entry in entries.items() if entry & 1}


@pytest.mark.parametrize("files", [0, 1])
def test_an_os_touches_the_pages_that_it_maps_unless_a_device_fills_them(files: int) -> None:
    with ShadowHypervisor(table_frames=4096) as machine:
        vcpu = batching(machine, 1, file_pages=files, unmap_every=0, table_every=0)
        machine.run(CPU0, vcpu, 4000)
        mapped = [{page for _, page in pages} for pages in machine.mapped_by.values()]
        users = [pages for pages in mapped if not pages.isdisjoint(PAGES)]
        assert len(users) > 50
        touched = sum(max(pages) >= DIRECT_BASE for pages in users)
        assert touched == (0 if files else len(users))


@pytest.mark.slow
def test_a_vcpu_with_interrupts_off_uses_old_translations_for_longer() -> None:
    stale = []
    for most in (0, 1 << 16):
        with ShadowHypervisor(pcpus=2, table_frames=4096) as machine:
            take_turns(machine, threads(machine, 1, interrupts_off=most), 3000)
            assert machine.violations() == {}
            stale.append(machine.count(lib.COUNT_LEGAL_STALE))
    assert stale[1] > 2 * stale[0]
