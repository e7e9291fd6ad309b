"""Walks without EPT, of one dimension through shadow tables: faults, caches, and the oracle's verdicts."""

from __future__ import annotations

import pytest

from native import ffi, lib
from native.types import AccessKind, Custody, Gfn, Gva, Hfn, HostWritable, Level, SpteIndex, Vpid, WordIndex
from tests.native.hypervisor import EXECUTE
from tests.native.shadow_guests import (
    LINEAR,
    MAP,
    PAGES,
    bare,
    fault,
    guest,
)
from tests.native.shadow_hypervisor import (
    DIRECT_BASE,
    READ,
    WRITE,
    ShadowHypervisor,
    Space,
    Translation,
)
from tests.support import CPU0, VM0


def test_entries_are_linear_and_bear_vpid_and_pcid() -> None:
    with ShadowHypervisor() as machine:
        vcpu = guest(machine, pcid=1, vpid=3)
        machine.run(CPU0, vcpu, 600)
        held = machine.dump(CPU0)
        ours = [(kind, vpid, pcid) for kind, vpid, pcid, page in held if page in PAGES]
        assert len(ours) >= len(PAGES) // 2
        assert set(ours) == {(lib.KIND_LINEAR, 3, 1)}


def test_without_vpid_entry_and_exit_drop_everything() -> None:
    with ShadowHypervisor() as machine:
        machine.run(CPU0, guest(machine), 600)
        assert machine.count(lib.COUNT_NO_VPID_EXITS) == 0
    with ShadowHypervisor(vpid=False) as machine:
        vcpu = guest(machine)
        machine.run(CPU0, vcpu, 600)
        assert machine.count(lib.COUNT_NO_VPID_EXITS) == machine.count(lib.COUNT_VM_ENTRIES) > 0
        assert machine.dump(CPU0) == []
        before = machine.count(lib.COUNT_L2_MISSES)
        for _ in range(3):
            machine.access(CPU0, vcpu, PAGES[0] << 12)
        assert machine.count(lib.COUNT_L2_MISSES) - before >= 3


def test_error_codes() -> None:
    with ShadowHypervisor() as machine:
        vcpu = bare(machine)
        space = machine.space[vcpu]
        user = lib.PFERR_USER
        assert fault(machine, vcpu, 0x5008, READ) == user
        assert fault(machine, vcpu, 0x5008, WRITE) == user | lib.PFERR_WRITE
        assert fault(machine, vcpu, 0x5008, EXECUTE) == user | lib.PFERR_FETCH
        machine.map_linear(CPU0, VM0, space, 5, Translation(5, False, True), writable=False)
        machine.access(CPU0, vcpu, 0x5008)
        assert fault(machine, vcpu, 0x5008, WRITE) == user | lib.PFERR_WRITE | lib.PFERR_PRESENT
        machine.map_linear(CPU0, VM0, space, 6, Translation(6, True, False))
        assert fault(machine, vcpu, 0x6000, READ) == user | lib.PFERR_PRESENT
        table, index, _ = machine.spot(CPU0, VM0, space, 7)
        mmio = 1 << lib.SPTE_MMIO_BIT | 7 << 12
        assert (
            lib.shadow_mmu_set_spte(machine.m, CPU0, VM0, table, SpteIndex(index), Level(1), Gfn(7), mmio)
            == 0
        )
        expected = user | lib.PFERR_PRESENT | lib.PFERR_RSVD
        assert fault(machine, vcpu, 0x7000, READ) == expected
        lib.guest_skip(machine.m, vcpu)
        machine.enter(CPU0, vcpu)
        ended = lib.guest_access(machine.m, CPU0, vcpu, Gva(0x7000), AccessKind(READ), machine.exit)
        assert ended == lib.EXIT_PREEMPTION_TIMER


def test_nx_faults_a_fetch_only() -> None:
    with ShadowHypervisor() as machine:
        vcpu = bare(machine)
        space = machine.space[vcpu]
        machine.map_linear(CPU0, VM0, space, 5, Translation(5, True, True))
        table, index, spte = machine.spot(CPU0, VM0, space, 5)
        lib.shadow_mmu_set_spte(
            machine.m, CPU0, VM0, table, SpteIndex(index), Level(1), Gfn(5), spte & ~lib.SPTE_EXECUTABLE
        )
        machine.access(CPU0, vcpu, 0x5000, WRITE)
        assert fault(machine, vcpu, 0x5000, EXECUTE) == lib.PFERR_USER | lib.PFERR_FETCH | lib.PFERR_PRESENT


def test_walks_set_accessed_and_dirty() -> None:
    with ShadowHypervisor() as machine:
        vcpu = bare(machine)
        space = machine.space[vcpu]
        machine.map_linear(CPU0, VM0, space, 5, Translation(5, True, True))
        table, index, spte = machine.spot(CPU0, VM0, space, 5)
        clean = spte & ~(lib.SPTE_ACCESSED | lib.SPTE_DIRTY)
        assert (
            lib.shadow_mmu_set_spte_atomic(
                machine.m, CPU0, VM0, table, SpteIndex(index), Level(1), spte, clean
            )
            == 0
        )
        machine.access(CPU0, vcpu, 0x5000, READ)
        assert lib.spte_read(machine.m, table, SpteIndex(index)) == clean | lib.SPTE_ACCESSED
        machine.access(CPU0, vcpu, 0x5000, WRITE)
        assert lib.spte_read(machine.m, table, SpteIndex(index)) == clean | lib.SPTE_ACCESSED | lib.SPTE_DIRTY


def test_supervisor_pages_are_cached_for_the_os_alone() -> None:
    """The OS's map of memory: its entry is used by the OS, and faults for a process."""
    with ShadowHypervisor() as machine:
        vcpu = guest(machine)
        machine.run(CPU0, vcpu, 300)
        held = [page for _, _, _, page in machine.dump(CPU0) if page >= DIRECT_BASE]
        assert held
        machine.enter(CPU0, vcpu)
        reason = lib.guest_access(machine.m, CPU0, vcpu, Gva(held[0] << 12), AccessKind(READ), machine.exit)
        assert reason == lib.EXIT_EXCEPTION
        assert machine.exit.error_code == lib.PFERR_USER | lib.PFERR_PRESENT


def test_a_supervisor_page_that_the_oracle_has_judged_stays_the_os_own() -> None:
    with ShadowHypervisor() as machine:
        vcpu = guest(machine)
        machine.execute(CPU0, vcpu, (MAP, LINEAR, 100))
        pml4 = machine.space[vcpu].cr3
        assert lib.oracle_track_writes(machine.m, CPU0, VM0, Gfn(pml4), True) == 0
        before = machine.count(lib.COUNT_ORACLE_SLOW)
        machine.execute(CPU0, vcpu, (MAP, LINEAR, 101))
        assert machine.count(lib.COUNT_ORACLE_SLOW) > before
        assert fault(machine, vcpu, (DIRECT_BASE + pml4) << 12, READ) == lib.PFERR_USER | lib.PFERR_PRESENT


def test_a_global_translation_serves_each_pcid() -> None:
    with ShadowHypervisor() as machine:
        vcpu = bare(machine)
        space = machine.space[vcpu]
        for page, extra in ((6, 0), (5, lib.SPTE_GLOBAL)):
            machine.map_linear(CPU0, VM0, space, page, Translation(page, True, True))
            table, index, spte = machine.spot(CPU0, VM0, space, page)
            lib.shadow_mmu_set_spte(
                machine.m, CPU0, VM0, table, SpteIndex(index), Level(1), Gfn(page), spte | extra
            )
            machine.access(CPU0, vcpu, page << 12)
        lib.vmcs_write_guest_cr3(machine.m, machine.vmcs[vcpu], machine.tree[space], 9)
        before = machine.count(lib.COUNT_L2_MISSES)
        machine.access(CPU0, vcpu, 0x5000)
        assert machine.count(lib.COUNT_L2_MISSES) == before
        machine.access(CPU0, vcpu, 0x6000)
        assert machine.count(lib.COUNT_L2_MISSES) == before + 1


def test_two_megabyte_spte() -> None:
    with ShadowHypervisor() as machine:
        vm = machine.vm(gfns=2048)
        vcpu = machine.vcpu(vm, 1, paging=0)
        block = Hfn(lib.frame_alloc(machine.m, CPU0, lib.FRAME_BLOCK))
        machine.spot(CPU0, vm, machine.space[vcpu], 0)
        sptes, tables = ffi.new("uint64_t[]", 6), ffi.new("uint32_t[]", 6)
        lib.tdp_mmu_get_walk(machine.m, machine.tree[machine.space[vcpu]], Level(4), Gfn(512), sptes, tables)
        custody = lib.frame_block_custody(machine.m, block)
        spte = lib.make_shadow_spte(
            block, Custody(custody), Level(2), lib.SPTE_WRITABLE | lib.SPTE_USER, HostWritable(True)
        )
        assert (
            lib.shadow_mmu_set_spte(
                machine.m, CPU0, vm, Hfn(tables[2]), SpteIndex(1), Level(2), Gfn(512), spte
            )
            == 0
        )
        machine.access(CPU0, vcpu, (512 + 7) << 12, WRITE)
        machine.access(CPU0, vcpu, (512 + 300) << 12, READ)
        assert [page for *_, page in machine.dump(CPU0)] == [512]
        assert machine.violations() == {}
        assert lib.frame_read(machine.m, Hfn(block + 7), WordIndex(0)) != 0


def test_the_processor_fetches_linear_mappings_ahead() -> None:
    with ShadowHypervisor() as machine:
        vcpu = bare(machine)
        machine.map_linear(CPU0, VM0, machine.space[vcpu], 5, Translation(5, True, True))
        ops = ffi.new("struct guest_op[]", [(lib.GUEST_OP_READ, 0, 0x5000, 0)])
        assert lib.guest_set_program(machine.m, vcpu, ops, 1) == 0
        machine.enter(CPU0, vcpu)
        assert lib.guest_enter(machine.m, CPU0, vcpu, 10, machine.exit) == 0
        assert lib.guest_speculate(machine.m, CPU0, Gva(0x6000)) == 0
        assert lib.guest_speculate(machine.m, CPU0, Gva(0x5000)) == 1
        assert lib.guest_speculate(machine.m, CPU0, Gva(0x5000)) == 0
        assert [page for *_, page in machine.dump(CPU0)] == [5]
        assert lib.guest_leave(machine.m, CPU0, lib.EXIT_MESSAGE) == lib.EXIT_MESSAGE
        assert machine.violations() == {}


@pytest.mark.parametrize("flush", [True, False])
def test_the_hosts_promise(flush: bool) -> None:
    with ShadowHypervisor() as machine:
        vcpu = bare(machine)
        machine.access(CPU0, vcpu, 0x5000, WRITE)
        machine.zap(CPU0, VM0, 5)
        if flush:
            machine.flush_vpid(CPU0, vcpu)
        machine.promise(CPU0, VM0, 5, lib.PROMISE_NOTIFIER)
        machine.free(CPU0, VM0, 5)
        machine.access(CPU0, vcpu, 0x5000, WRITE)
        assert set(machine.violations()) == (set() if flush else {"use-after-free"})


def test_a_walk_from_a_cached_pointer_to_a_freed_table() -> None:
    with ShadowHypervisor() as machine:
        vcpu = bare(machine)
        machine.access(CPU0, vcpu, 0x5000)
        sptes, tables = ffi.new("uint64_t[]", 6), ffi.new("uint32_t[]", 6)
        lib.tdp_mmu_get_walk(machine.m, machine.tree[machine.space[vcpu]], Level(4), Gfn(5), sptes, tables)
        machine.zap(CPU0, VM0, 5)
        lib.shadow_mmu_set_spte(machine.m, CPU0, VM0, Hfn(tables[2]), SpteIndex(0), Level(2), Gfn(0), 0)
        lib.ept_table_free(machine.m, CPU0, Hfn(tables[1]))
        machine.access(CPU0, vcpu, 0x6000)
        assert set(machine.violations()) == {"walk-after-free"}


def test_a_recycled_vpid() -> None:
    """A vCPU that gets the VPID of another must not use its entries."""
    with ShadowHypervisor() as machine:
        first = bare(machine)
        machine.access(CPU0, first, 0x5000)
        second = machine.vcpu(VM0, 1, paging=0)
        machine.tree[Space(second, False, 0)] = machine.tree[Space(first, False, 0)]
        machine.switch(second, Space(second, False, 0), 0)
        machine.access(CPU0, second, 0x5000)
        assert set(machine.violations()) == {"foreign-root"}
        assert machine.vpid[first] == machine.vpid[second] == Vpid(1)


def test_a_leaf_must_be_dropped_before_that_of_another_gfn() -> None:
    with ShadowHypervisor() as machine:
        vcpu = bare(machine)
        machine.access(CPU0, vcpu, 0x5000)
        table, index, spte = machine.spot(CPU0, VM0, machine.space[vcpu], 5)
        assert lib.kvm_mmu_page_get_gfn(machine.m, table, SpteIndex(index)) == 5
        assert (
            lib.shadow_mmu_set_spte(machine.m, CPU0, VM0, table, SpteIndex(index), Level(1), Gfn(6), spte)
            == (1 << 64) - 1
        )
        assert b"another gfn" in ffi.string(lib.machine_error_text(machine.m, CPU0))


def test_entry_without_a_root_is_misuse() -> None:
    with ShadowHypervisor() as machine:
        vcpu = bare(machine)
        lib.vmcs_write_guest_cr3(machine.m, machine.vmcs[vcpu], Hfn(0), 0)
        machine.enter(CPU0, vcpu)
        assert (
            lib.guest_access(machine.m, CPU0, vcpu, Gva(0), AccessKind(READ), machine.exit)
            == lib.MACHINE_MISUSE
        )


def entry_of(machine: ShadowHypervisor, page: int) -> dict[str, object]:
    entries = ffi.new("struct tlb_entry[]", 4096)
    found = [
        e for e in entries[0 : lib.tlb_dump(lib.cpu_tlb(machine.m, CPU0), entries, 4096)] if e.page == page
    ]
    (e,) = found
    fields = (
        "page",
        "hfn",
        "ep4ta",
        "vpid",
        "pcid",
        "kind",
        "size",
        "fractured",
        "vm",
        "vcpu",
        "gfn",
        "custody",
    )
    return {name: getattr(e, name) for name in (*fields, "supervisor", "global")} | {"right": list(e.right)}


@pytest.mark.parametrize("kind", [READ, WRITE, EXECUTE])
@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("dirty", [True, False])
def test_the_fast_path_fills_what_the_slow_one_fills(kind: int, writable: bool, dirty: bool) -> None:
    """With its table cached a walk takes the fast path, unless the second level has ways beyond it."""
    if kind == WRITE and not writable:
        return
    filled = []
    for ways in (12, 24):
        with ShadowHypervisor(l2_ways=ways) as machine:
            vcpu = bare(machine)
            machine.map_linear(CPU0, VM0, machine.space[vcpu], 5, Translation(5, writable, True), writable)
            table, index, spte = machine.spot(CPU0, VM0, machine.space[vcpu], 5)
            if not dirty:
                clean = spte & ~lib.SPTE_DIRTY
                lib.shadow_mmu_set_spte_atomic(
                    machine.m, CPU0, VM0, table, SpteIndex(index), Level(1), spte, clean
                )
            machine.access(CPU0, vcpu, 0x6000)
            machine.access(CPU0, vcpu, 0x5000, kind)
            filled.append(entry_of(machine, 5))
            assert machine.violations() == {}
    assert filled[0] == filled[1]


_DOUBTS: dict[str, set[str]] = {
    "tracked": {"missed-guest-write"},
    "gfn": {"guest-stale"},
    "unlinked": set(),
    "void custody": {"use-after-free"},
}


@pytest.mark.parametrize("ways", [12, 24])
@pytest.mark.parametrize("doubt", _DOUBTS)
def test_neither_path_trusts_what_the_oracle_must_judge(doubt: str, ways: int) -> None:
    with ShadowHypervisor(l2_ways=ways) as machine:
        vcpu = bare(machine)
        space = machine.space[vcpu]
        gfn = 7 if doubt == "gfn" else 5
        machine.access(CPU0, vcpu, 0x6000)
        machine.map_linear(CPU0, VM0, space, 5, Translation(gfn, True, True))
        if doubt == "tracked":
            assert lib.oracle_track_writes(machine.m, CPU0, VM0, Gfn(5), True) == 0
        if doubt == "void custody":
            machine.free(CPU0, VM0, 5)
        before = machine.count(lib.COUNT_STALE_WALKS)
        if doubt == "unlinked":
            sptes, tables = ffi.new("uint64_t[]", 6), ffi.new("uint32_t[]", 6)
            lib.tdp_mmu_get_walk(machine.m, machine.tree[space], Level(4), Gfn(5), sptes, tables)
            lib.shadow_mmu_set_spte(machine.m, CPU0, VM0, Hfn(tables[2]), SpteIndex(0), Level(2), Gfn(0), 0)
        machine.access(CPU0, vcpu, 0x5000, WRITE)
        assert set(machine.violations()) == _DOUBTS[doubt]
        assert (machine.count(lib.COUNT_STALE_WALKS) > before) == (doubt == "unlinked")
