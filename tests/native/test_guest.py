"""The guest OS and two-dimensional walks: paging, switches, invalidations, shared and huge pages, MMIO."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from native import ffi, lib
from native.types import AccessKind, Gva, VcpuId, Vpid
from tests.native.hypervisor import READ, WRITE, Hypervisor
from tests.support import CPU0, CPU1, VM0

PAGES = [0x1000 + 3 * i for i in range(128)]


def records(n: int = 4096) -> list[int]:
    """A third writes, spread over PAGES."""
    kinds = [WRITE, READ, READ]
    return [kinds[i % 3] << 62 | PAGES[i * 41 % 128] << 12 | i * 8 & 0xFF8 for i in range(n)]


@pytest.fixture
def machine() -> Iterator[Hypervisor]:
    with Hypervisor() as h:
        yield h


def boot(machine: Hypervisor, processes: int = 3, gfns: int = 1024, **guest: int) -> VcpuId:
    """Return the vCPU of a VM with a guest that runs the same records in each of its processes."""
    vm = machine.vm(gfns)
    vcpu = machine.vcpu(vm, 1, **{"paging": 1, "end_gfn": gfns, **guest})
    for _ in range(processes):
        machine.process(vcpu, records(), PAGES)
    return vcpu


def test_every_record_takes_one_poll_one_lookup_and_one_check(machine: Hypervisor) -> None:
    vcpu = boot(machine, processes=1)
    machine.run(CPU0, vcpu, 20_000)
    before = [machine.count(c) for c in (lib.COUNT_POLLS, lib.COUNT_LOOKUPS, lib.COUNT_CHECKS)]
    machine.run(CPU0, vcpu, 100_000)
    after = [machine.count(c) for c in (lib.COUNT_POLLS, lib.COUNT_LOOKUPS, lib.COUNT_CHECKS)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [100_000] * 3


def test_busy_guest_is_clean_and_does_what_an_os_does(machine: Hypervisor) -> None:
    vcpu = boot(machine, switch_every=3000, unmap_every=300, protect_every=400)
    machine.run(CPU0, vcpu, 300_000)
    assert machine.violations() == {}
    assert machine.count(lib.COUNT_GUEST_SWITCHES) > 50
    assert machine.count(lib.COUNT_GUEST_INVALIDATIONS) > 500
    assert machine.count(lib.COUNT_GUEST_FAULTS) > 500


def test_too_little_guest_memory_is_reclaimed(machine: Hypervisor) -> None:
    vcpu = boot(machine, gfns=160)
    machine.run(CPU0, vcpu, 20_000)
    assert machine.violations() == {}
    assert lib.guest_frames_used(machine.m, vcpu) <= 160


def test_what_a_guest_invalidated_elsewhere_is_stale(machine: Hypervisor) -> None:
    """INVLPG reaches the pCPU that executes it; the entries of another one are the migration flush's job."""
    vcpu = boot(machine, processes=1, unmap_every=50)
    for cpu in (CPU0, CPU1):
        machine.run(cpu, vcpu, 5_000)
    assert machine.violations() == {}, "whoever invalidates sees nothing stale"
    machine.run(CPU0, vcpu, 5_000)
    assert set(machine.violations()) == {"guest-stale"}


def test_invvpid_makes_up_for_it(machine: Hypervisor) -> None:
    vcpu = boot(machine, processes=1, unmap_every=50)
    for _ in range(10):
        for cpu in (CPU0, CPU1):
            lib.flush_invvpid_single(machine.m, cpu, VM0, Vpid(1), lib.REASON_MIGRATION)
            machine.run(cpu, vcpu, 3_000)
    assert machine.violations() == {}
    assert machine.count(lib.COUNT_AVERTED) > 0


def test_guest_huge_pages_are_cached_in_pieces(machine: Hypervisor) -> None:
    vcpu = boot(machine, processes=4, gfns=4096, hugepages=1, unmap_every=500, switch_every=2000)
    machine.run(CPU0, vcpu, 200_000)
    assert machine.violations() == {}


def test_access_to_a_gfn_without_memory_is_skipped_when_told_so(machine: Hypervisor) -> None:
    vm = machine.vm(16)
    vcpu = machine.vcpu(vm, 1, end_gfn=16)
    machine.enter(CPU0, vcpu)
    assert (
        lib.guest_access(machine.m, CPU0, vcpu, Gva(0x5000), AccessKind(WRITE), machine.exit)
        == lib.EXIT_EPT_VIOLATION
    )
    lib.guest_skip(machine.m, vcpu)
    machine.enter(CPU0, vcpu)
    assert (
        lib.guest_access(machine.m, CPU0, vcpu, Gva(0x5000), AccessKind(WRITE), machine.exit)
        == lib.EXIT_PREEMPTION_TIMER
    )
    assert not machine.mapped(vm, 5)


def pcids(machine: Hypervisor) -> set[int]:
    """Return the PCIDs of the combined mappings that pCPU 0 caches."""
    entries = ffi.new("struct tlb_entry[]", 4096)
    n = lib.tlb_dump(lib.cpu_tlb(machine.m, CPU0), entries, 4096)
    return {entries[i].pcid for i in range(n) if entries[i].kind == lib.KIND_COMBINED}


@pytest.mark.parametrize("boots", [False, True])
def test_cr3_is_that_of_the_current_process_from_the_first_entry_on(machine: Hypervisor, boots: bool) -> None:
    """The guest builds its first page tables in that entry, without an exit in between; also after a reset in
    another process."""
    vcpu = boot(machine, processes=2, switch_every=1000)
    for gfn in range(64):
        machine.map(CPU0, VM0, gfn)
    if boots:
        machine.run(CPU0, vcpu, 1500)
        assert pcids(machine) >= {1, 2}
        lib.guest_boot(machine.m, vcpu)
        lib.flush_invvpid_all(machine.m, CPU0, VM0, lib.REASON_GUEST)
        assert pcids(machine) == set()
    machine.access(CPU0, vcpu, PAGES[0] << 12)
    assert pcids(machine) == {1}


def test_entry_with_interrupts_on_is_refused(machine: Hypervisor) -> None:
    vcpu = machine.vcpu(machine.vm(), 1)
    lib.vcpu_set_mode(machine.m, vcpu, lib.IN_GUEST_MODE)
    assert lib.guest_run(machine.m, CPU0, vcpu, 1, machine.exit) == lib.MACHINE_MISUSE
    assert b"interrupts on" in ffi.string(lib.machine_error_text(machine.m, CPU0))


@pytest.mark.parametrize("phase", [0, 1])
def test_vcpus_can_share_a_range_page_by_page(machine: Hypervisor, phase: int) -> None:
    vm = machine.vm(1024)
    vcpu = machine.vcpu(vm, 1, paging=1, end_gfn=1024, stride=2, phase=phase)
    machine.process(vcpu, records(), PAGES)
    machine.run(CPU0, vcpu, 5_000)
    used = [gfn for gfn in range(1024) if machine.mapped(vm, gfn)]
    assert used
    assert all(gfn % 2 == phase for gfn in used)
