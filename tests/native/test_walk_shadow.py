"""Guests without EPT: walks of one dimension through shadow tables, their faults, the oracle's verdicts."""

from __future__ import annotations

import pytest

from native import ffi, lib
from native.types import Hfn, VcpuId, Vpid
from tests.native.hypervisor import EXECUTE
from tests.native.shadow_hypervisor import (
    DIRECT_BASE,
    NOFLUSH,
    READ,
    WRITE,
    ShadowHypervisor,
    Space,
    Translation,
)
from tests.support import CPU0, CPU1, VM0

PAGES = [0x1000 + i for i in range(64)]


def record(page: int, kind: int = READ, offset: int = 0) -> int:
    return kind << 62 | page << 12 | offset


RECORDS = [record(PAGES[(7 * i) % 64], i % 3 == 0, 8 * (i % 512)) for i in range(512)]


def guest(machine: ShadowHypervisor, *, processes: int = 1, vpid: int = 1, **config: int) -> VcpuId:
    """A vCPU whose OS runs processes, powered on."""
    vm = machine.vm(gfns=2048)
    vcpu = machine.vcpu(vm, vpid, **({"paging": 1, "end_gfn": 2048, "pcid": 0} | config))
    for _ in range(processes):
        machine.process(vcpu, RECORDS, PAGES)
    machine.power_on(vcpu)
    return vcpu


def test_the_os_boots_by_its_own_stores_and_enables_paging() -> None:
    with ShadowHypervisor() as machine:
        vcpu = guest(machine, pcid=1)
        machine.run(CPU0, vcpu, 1000)
        names = [name for name, _ in machine.exits]
        assert names[:5] == ["MOV_CR4", "MOV_CR3", "MOV_CR0", "MOV_CR4", "MOV_CR3"]
        assert machine.exits[1][1] & 0xFFF == 0
        assert machine.exits[4][1] & 0xFFF == 1
        assert machine.violations() == {}


@pytest.mark.parametrize("pcid", [0, 1])
@pytest.mark.parametrize("vpid", [True, False])
def test_an_os_that_changes_its_tables_runs_clean(pcid: int, vpid: bool) -> None:
    with ShadowHypervisor(vpid=vpid, table_frames=4096) as machine:
        vcpu = guest(machine, processes=3, pcid=pcid, switch_every=400, unmap_every=50, protect_every=70)
        machine.run(CPU0, vcpu, 6000)
        names = {name for name, _ in machine.exits}
        assert {"INVLPG", "MOV_CR3"} <= names
        assert machine.emulated > 100
        assert machine.violations() == {}


def test_an_os_that_runs_out_of_memory_reclaims() -> None:
    with ShadowHypervisor(table_frames=4096) as machine:
        vcpu = guest(machine, processes=3, end_gfn=48, switch_every=300)
        machine.run(CPU0, vcpu, 2000)
        assert lib.guest_frames_used(machine.m, vcpu) == 48
        assert "INVLPG" in {name for name, _ in machine.exits}
        assert machine.violations() == {}


def test_entries_are_linear_and_bear_vpid_and_pcid() -> None:
    with ShadowHypervisor() as machine:
        vcpu = guest(machine, pcid=1, vpid=3)
        machine.run(CPU0, vcpu, 600)
        held = machine.dump(CPU0)
        ours = [(kind, vpid, pcid) for kind, vpid, pcid, page in held if page in PAGES]
        assert len(ours) >= len(PAGES) // 2
        assert set(ours) == {(lib.KIND_LINEAR, 3, 1)}


def test_without_vpid_entry_and_exit_drop_everything() -> None:
    with ShadowHypervisor(vpid=False) as machine:
        vcpu = guest(machine)
        machine.run(CPU0, vcpu, 600)
        assert machine.dump(CPU0) == []
        before = machine.count(lib.COUNT_L2_MISSES)
        for _ in range(3):
            machine.access(CPU0, vcpu, PAGES[0] << 12)
        assert machine.count(lib.COUNT_L2_MISSES) - before >= 3


def bare(machine: ShadowHypervisor, paging: int = 0) -> VcpuId:
    """A vCPU in real mode whose shadow tables the test fills itself."""
    return machine.vcpu(machine.vm(), 1, paging=paging)


def canonical(linear: int) -> int:
    return linear | 0xFFFF << 48 if linear >> 47 & 1 else linear


def fault(machine: ShadowHypervisor, vcpu: VcpuId, linear: int, kind: int) -> int:
    """One access, which must fault; returns its error code."""
    machine.enter(CPU0, vcpu)
    assert lib.guest_access(machine.m, CPU0, vcpu, linear, kind, machine.exit) == lib.EXIT_EXCEPTION
    assert machine.exit.linear == canonical(linear)
    assert machine.exit.access == kind
    return int(machine.exit.error_code)


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
        assert lib.shadow_mmu_set_spte(machine.m, CPU0, VM0, table, index, 1, 7, mmio) == 0
        expected = user | lib.PFERR_PRESENT | lib.PFERR_RSVD
        assert fault(machine, vcpu, 0x7000, READ) == expected
        lib.guest_skip(machine.m, vcpu)
        machine.enter(CPU0, vcpu)
        ended = lib.guest_access(machine.m, CPU0, vcpu, 0x7000, READ, machine.exit)
        assert ended == lib.EXIT_PREEMPTION_TIMER


def test_nx_faults_a_fetch_only() -> None:
    with ShadowHypervisor() as machine:
        vcpu = bare(machine)
        space = machine.space[vcpu]
        machine.map_linear(CPU0, VM0, space, 5, Translation(5, True, True))
        table, index, spte = machine.spot(CPU0, VM0, space, 5)
        lib.shadow_mmu_set_spte(machine.m, CPU0, VM0, table, index, 1, 5, spte & ~lib.SPTE_EXECUTABLE)
        machine.access(CPU0, vcpu, 0x5000, WRITE)
        assert fault(machine, vcpu, 0x5000, EXECUTE) == lib.PFERR_USER | lib.PFERR_FETCH | lib.PFERR_PRESENT


def test_walks_set_accessed_and_dirty() -> None:
    with ShadowHypervisor() as machine:
        vcpu = bare(machine)
        space = machine.space[vcpu]
        machine.map_linear(CPU0, VM0, space, 5, Translation(5, True, True))
        table, index, spte = machine.spot(CPU0, VM0, space, 5)
        clean = spte & ~(lib.SPTE_ACCESSED | lib.SPTE_DIRTY)
        assert lib.shadow_mmu_set_spte_atomic(machine.m, CPU0, VM0, table, index, 1, spte, clean) == 0
        machine.access(CPU0, vcpu, 0x5000, READ)
        assert lib.spte_read(machine.m, table, index) == clean | lib.SPTE_ACCESSED
        machine.access(CPU0, vcpu, 0x5000, WRITE)
        assert lib.spte_read(machine.m, table, index) == clean | lib.SPTE_ACCESSED | lib.SPTE_DIRTY


def test_supervisor_pages_are_cached_for_the_os_alone() -> None:
    """The OS's map of memory: its entry is used by the OS, and faults for a process."""
    with ShadowHypervisor() as machine:
        vcpu = guest(machine)
        machine.run(CPU0, vcpu, 300)
        held = [page for _, _, _, page in machine.dump(CPU0) if page >= DIRECT_BASE]
        assert held
        machine.enter(CPU0, vcpu)
        reason = lib.guest_access(machine.m, CPU0, vcpu, held[0] << 12, READ, machine.exit)
        assert reason == lib.EXIT_EXCEPTION
        assert machine.exit.error_code == lib.PFERR_USER | lib.PFERR_PRESENT


def test_a_supervisor_page_that_the_oracle_has_judged_stays_the_os_own() -> None:
    with ShadowHypervisor() as machine:
        vcpu = guest(machine)
        machine.execute(CPU0, vcpu, (MAP, LINEAR, 100))
        pml4 = machine.space[vcpu].cr3
        assert lib.oracle_track_writes(machine.m, CPU0, VM0, pml4, 1) == 0
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
            lib.shadow_mmu_set_spte(machine.m, CPU0, VM0, table, index, 1, page, spte | extra)
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
        lib.tdp_mmu_get_walk(machine.m, machine.tree[machine.space[vcpu]], 4, 512, sptes, tables)
        custody = lib.frame_block_custody(machine.m, block)
        spte = lib.make_shadow_spte(block, custody, 2, lib.SPTE_WRITABLE | lib.SPTE_USER, 1)
        assert lib.shadow_mmu_set_spte(machine.m, CPU0, vm, Hfn(tables[2]), 1, 2, 512, spte) == 0
        machine.access(CPU0, vcpu, (512 + 7) << 12, WRITE)
        machine.access(CPU0, vcpu, (512 + 300) << 12, READ)
        assert [page for *_, page in machine.dump(CPU0)] == [512]
        assert machine.violations() == {}
        assert lib.frame_read(machine.m, Hfn(block + 7), 0) != 0


def test_a_reset_boots_the_os_again_on_its_former_tables() -> None:
    """All memory is free again, while the former tables are still tracked: zeroing them is emulated."""
    with ShadowHypervisor(table_frames=4096) as machine:
        vcpu = guest(machine, processes=2, end_gfn=96, switch_every=300, unmap_every=90)
        machine.run(CPU0, vcpu, 1500)
        tables = set(machine.tables)
        for _ in range(2):
            lib.vcpu_set_paging(machine.m, vcpu, 0)
            lib.guest_boot(machine.m, vcpu)
            machine.switch(vcpu, Space(vcpu, False, 0), 0)
            machine.flush_vpid(CPU0, vcpu)
            machine.exits.clear()
            machine.emulated = 0
            machine.run(CPU0, vcpu, 1500)
            assert [name for name, _ in machine.exits[:3]] == ["MOV_CR4", "MOV_CR3", "MOV_CR0"]
            assert machine.emulated > len(tables)
        assert machine.violations() == {}


def test_toggling_pge_exits_twice() -> None:
    with ShadowHypervisor() as machine:
        vcpu = guest(machine)
        machine.run(CPU0, vcpu, 100)
        machine.exits.clear()
        assert lib.guest_execute(machine.m, vcpu, lib.GUEST_INSN_TOGGLE_PGE, 0) == 0
        machine.run(CPU0, vcpu, 10)
        assert [(name, value >> 7 & 1) for name, value in machine.exits] == [("MOV_CR4", 0), ("MOV_CR4", 1)]


@pytest.mark.parametrize("kind", range(4))
def test_invpcid_exits_with_its_operands(kind: int) -> None:
    with ShadowHypervisor() as machine:
        vcpu = guest(machine, processes=2, pcid=1)
        machine.execute(CPU0, vcpu, (MAP, LINEAR, 100), (R, LINEAR))
        held = machine.dump(CPU0)
        ops = ffi.new("struct guest_op[]", [(lib.GUEST_OP_INVPCID, kind, LINEAR, 1)])
        assert lib.guest_set_program(machine.m, vcpu, ops, 1) == 0
        assert machine.once(CPU0, vcpu, 10) == lib.EXIT_INSTRUCTION
        found = machine.exit.access, machine.exit.invpcid_type, machine.exit.invpcid_pcid, machine.exit.linear
        assert found == (lib.GUEST_INSN_INVPCID, kind, 2, LINEAR)
        # The instruction itself has changed nothing, and is not executed again.
        assert machine.dump(CPU0) == held
        assert machine.once(CPU0, vcpu, 10) == lib.EXIT_PROGRAM_END


def test_kvm_is_told_canonical_addresses() -> None:
    """INVVPID of another address fails, so KVM could not flush the guest's kernel pages."""
    kernel = 0x800000001 << 12
    with ShadowHypervisor() as machine:
        vcpu = guest(machine)
        machine.execute(CPU0, vcpu, (W_, kernel), (INVLPG, kernel), (R, kernel))
        assert machine.exits[-1] == ("INVLPG", canonical(kernel))
        assert machine.violations() == {}


def test_invlpg_changes_nothing_by_itself() -> None:
    with ShadowHypervisor(broken=("invlpg",)) as machine:
        vcpu = guest(machine)
        machine.execute(CPU0, vcpu, (MAP, LINEAR, 100), (R, LINEAR))
        held = machine.dump(CPU0)
        machine.execute(CPU0, vcpu, (INVLPG, LINEAR))
        assert machine.exits[-1] == ("INVLPG", LINEAR)
        assert machine.dump(CPU0) == held


def test_the_processor_fetches_linear_mappings_ahead() -> None:
    with ShadowHypervisor() as machine:
        vcpu = bare(machine)
        machine.map_linear(CPU0, VM0, machine.space[vcpu], 5, Translation(5, True, True))
        ops = ffi.new("struct guest_op[]", [(lib.GUEST_OP_READ, 0, 0x5000, 0)])
        assert lib.guest_set_program(machine.m, vcpu, ops, 1) == 0
        machine.enter(CPU0, vcpu)
        assert lib.guest_enter(machine.m, CPU0, vcpu, 10, machine.exit) == 0
        assert lib.guest_speculate(machine.m, CPU0, 0x6000) == 0
        assert lib.guest_speculate(machine.m, CPU0, 0x5000) == 1
        assert lib.guest_speculate(machine.m, CPU0, 0x5000) == 0
        assert [page for *_, page in machine.dump(CPU0)] == [5]
        assert lib.guest_leave(machine.m, CPU0, lib.EXIT_MESSAGE) == lib.EXIT_MESSAGE
        assert machine.violations() == {}


# --- the oracle ---------------------------------------------------------------------------------------------


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


MAP, UNMAP, INVLPG, R, W_ = (
    getattr(lib, f"GUEST_OP_{name}") for name in ("MAP", "UNMAP", "INVLPG", "READ", "WRITE")
)
LINEAR = PAGES[3] << 12


@pytest.mark.parametrize("broken", [(), ("invlpg",), ("sync",)])
def test_the_guests_promise(broken: tuple[str, ...]) -> None:
    """INVLPG that KVM does not execute, and a shadow SPTE that it does not bring up to date."""
    with ShadowHypervisor(broken=broken) as machine:
        vcpu = guest(machine)
        machine.execute(
            CPU0,
            vcpu,
            (MAP, LINEAR, 100),
            (W_, LINEAR),
            (MAP, LINEAR, 101),
            (INVLPG, LINEAR),
            (W_, LINEAR),
        )
        expected = {"guest-stale"} if broken else set()
        assert set(machine.violations()) == expected


def test_an_unsynchronized_table_is_legal_until_the_guest_invalidates() -> None:
    with ShadowHypervisor(broken=("sync",)) as machine:
        vcpu = guest(machine)
        machine.execute(CPU0, vcpu, (MAP, LINEAR, 100), (W_, LINEAR), (MAP, LINEAR, 101))
        for pcpu in (CPU0, CPU1):
            machine.flush_vpid(pcpu, vcpu)
        before = machine.count(lib.COUNT_LEGAL_STALE)
        machine.execute(CPU0, vcpu, (W_, LINEAR))
        assert machine.violations() == {}
        assert machine.count(lib.COUNT_LEGAL_STALE) > before
        machine.execute(CPU0, vcpu, (INVLPG, LINEAR), (W_, LINEAR))
        assert set(machine.violations()) == {"guest-stale"}


@pytest.mark.parametrize("broken", [(), ("cr3",)])
def test_mov_to_cr3_without_pcids_ends_the_address_space(broken: tuple[str, ...]) -> None:
    with ShadowHypervisor(broken=broken) as machine:
        vcpu = guest(machine, processes=2)
        cr3 = lib.GUEST_OP_MOV_CR3
        machine.execute(
            CPU0,
            vcpu,
            (MAP, LINEAR, 100),
            (W_, LINEAR),
            (cr3, 0, 1),
            (MAP, LINEAR, 101),
            (W_, LINEAR),
        )
        # All tables are shadowed now, so nothing else flushes.
        machine.execute(CPU0, vcpu, (cr3, 0, 0), (R, LINEAR), (cr3, 0, 1), (R, LINEAR))
        assert set(machine.violations()) == ({"guest-stale"} if broken else set())


def test_a_noflush_switch_keeps_each_pcids_entries() -> None:
    with ShadowHypervisor() as machine:
        vcpu = guest(machine, processes=2, pcid=1)
        cr3, keep = lib.GUEST_OP_MOV_CR3, lib.GUEST_OP_NOFLUSH
        machine.execute(
            CPU0, vcpu, (MAP, LINEAR, 100), (W_, LINEAR), (cr3, 0, 1), (MAP, LINEAR, 101), (W_, LINEAR)
        )
        machine.execute(CPU0, vcpu, (cr3, 0, 0, keep), (R, LINEAR), (cr3, 0, 1, keep), (R, LINEAR))
        before = machine.count(lib.COUNT_L2_MISSES)
        machine.execute(CPU0, vcpu, (cr3, 0, 0, keep), (R, LINEAR), (cr3, 0, 1, keep), (R, LINEAR))
        assert machine.count(lib.COUNT_L2_MISSES) == before
        assert [value & NOFLUSH for name, value in machine.exits[-4:]] == [NOFLUSH] * 4
        assert machine.violations() == {}


@pytest.mark.parametrize("broken", [(), ("track",), ("flush",)])
def test_a_store_to_a_tracked_table_that_kvm_does_not_see(broken: tuple[str, ...]) -> None:
    with ShadowHypervisor(broken=broken) as machine:
        vcpu = guest(machine)
        machine.execute(CPU0, vcpu, (MAP, LINEAR, 100), (R, LINEAR), (MAP, LINEAR, 101), (INVLPG, LINEAR))
        found = set(machine.violations())
        assert ("missed-guest-write" in found) == bool(broken)
        assert machine.emulated or broken


def test_a_walk_from_a_cached_pointer_to_a_freed_table() -> None:
    with ShadowHypervisor() as machine:
        vcpu = bare(machine)
        machine.access(CPU0, vcpu, 0x5000)
        sptes, tables = ffi.new("uint64_t[]", 6), ffi.new("uint32_t[]", 6)
        lib.tdp_mmu_get_walk(machine.m, machine.tree[machine.space[vcpu]], 4, 5, sptes, tables)
        machine.zap(CPU0, VM0, 5)
        lib.shadow_mmu_set_spte(machine.m, CPU0, VM0, Hfn(tables[2]), 0, 2, 0, 0)
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
        assert lib.kvm_mmu_page_get_gfn(machine.m, table, index) == 5
        assert lib.shadow_mmu_set_spte(machine.m, CPU0, VM0, table, index, 1, 6, spte) == (1 << 64) - 1
        assert b"another gfn" in ffi.string(lib.machine_error_text(machine.m, CPU0))


def test_entry_without_a_root_is_misuse() -> None:
    with ShadowHypervisor() as machine:
        vcpu = bare(machine)
        lib.vmcs_write_guest_cr3(machine.m, machine.vmcs[vcpu], Hfn(0), 0)
        machine.enter(CPU0, vcpu)
        assert lib.guest_access(machine.m, CPU0, vcpu, 0, READ, machine.exit) == lib.MACHINE_MISUSE


def test_a_lost_root_table_of_the_os_is_a_triple_fault() -> None:
    with ShadowHypervisor() as machine:
        vcpu = guest(machine)
        machine.run(CPU0, vcpu, 100)
        lib.guest_inject_page_fault(machine.m, vcpu, DIRECT_BASE << 12, 0)
        machine.enter(CPU0, vcpu)
        assert lib.guest_run(machine.m, CPU0, vcpu, 10, machine.exit) == lib.EXIT_TRIPLE_FAULT


# --- stores that KVM emulates -------------------------------------------------------------------------------


def test_a_program_goes_on_behind_a_store_that_kvm_has_emulated() -> None:
    with ShadowHypervisor() as machine:
        vcpu = guest(machine)
        machine.execute(CPU0, vcpu, (MAP, LINEAR, 100), (R, LINEAR))
        machine.shadow(CPU0, vcpu, 100)
        machine.emulated = 0
        machine.execute(CPU0, vcpu, (W_, LINEAR | 0x18), (R, LINEAR), (W_, LINEAR | 0x20))
        assert machine.emulated == 2
        assert machine.word(CPU0, VM0, 100, 4) > machine.word(CPU0, VM0, 100, 3) > 0
        assert machine.violations() == {}


def test_a_trace_goes_on_behind_a_store_that_kvm_has_emulated() -> None:
    with ShadowHypervisor() as machine:
        vcpu = guest(machine)
        machine.run(CPU0, vcpu, 600)
        space = machine.space[vcpu]
        gfns = [gfn for (_, gfn), by in machine.mapped_by.items() if (space, PAGES[0]) in by]
        machine.shadow(CPU0, vcpu, gfns[0])
        stores = sum(RECORDS[i] == record(PAGES[0], WRITE, RECORDS[i] & 0xFFF) for i in range(512))
        machine.emulated = 0
        before = lib.guest_clock(machine.m, vcpu)
        assert machine.run(CPU0, vcpu, 512) == 512
        assert lib.guest_clock(machine.m, vcpu) - before == 512
        assert machine.emulated == stores > 0
        assert machine.violations() == {}


def test_tables_whose_links_kvm_has_stored_are_not_handed_out_again() -> None:
    with ShadowHypervisor(table_frames=8192) as machine:
        vm = machine.vm(gfns=2048)
        vcpu = machine.vcpu(vm, 1, paging=1, end_gfn=2048, pcid=0)
        pages = [(1 << 18) * (i % 5) + 512 * i + 1 for i in range(40)]
        machine.process(vcpu, [record(page, WRITE) for page in pages] * 3, pages)
        machine.power_on(vcpu)
        machine.run(CPU0, vcpu, 240)
        assert machine.emulated >= 40
        assert len(machine.tables) >= 40
        assert machine.violations() == {}


def test_a_huge_mapping_that_is_taken_away_by_an_emulated_store() -> None:
    region, huge, unmap = 1 << 30, lib.GUEST_OP_HUGE, lib.GUEST_OP_UNMAP
    with ShadowHypervisor(broken=("sync",)) as machine:
        vm = machine.vm(gfns=2048)
        vcpu = machine.vcpu(vm, 1, paging=1, end_gfn=512, pcid=0)
        machine.process(vcpu, [], [region >> 12])
        machine.power_on(vcpu)
        machine.execute(CPU0, vcpu, (MAP, region, 512, huge), (W_, region))
        machine.emulated = 0
        machine.execute(CPU0, vcpu, (unmap, region), (R, region))
        assert machine.emulated
        assert machine.violations() == {}
        machine.execute(CPU0, vcpu, (INVLPG, region), (R, region))
        assert set(machine.violations()) == {"guest-stale"}


def test_more_changes_than_the_oracle_remembers_excuse_old_translations() -> None:
    with ShadowHypervisor(broken=("sync",)) as machine:
        vcpu = guest(machine)
        for page in PAGES[:40]:
            at = page << 12
            machine.execute(CPU0, vcpu, (MAP, at, 100), (R, at), (MAP, at, 101))
        machine.flush_vpid(CPU0, vcpu)
        for page in PAGES[:40]:
            machine.execute(CPU0, vcpu, (R, page << 12))
        assert machine.violations() == {}


# --- the fast path ------------------------------------------------------------------------------------------


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
                lib.shadow_mmu_set_spte_atomic(machine.m, CPU0, VM0, table, index, 1, spte, clean)
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
            assert lib.oracle_track_writes(machine.m, CPU0, VM0, 5, 1) == 0
        if doubt == "void custody":
            machine.free(CPU0, VM0, 5)
        before = machine.count(lib.COUNT_STALE_WALKS)
        if doubt == "unlinked":
            sptes, tables = ffi.new("uint64_t[]", 6), ffi.new("uint32_t[]", 6)
            lib.tdp_mmu_get_walk(machine.m, machine.tree[space], 4, 5, sptes, tables)
            lib.shadow_mmu_set_spte(machine.m, CPU0, VM0, Hfn(tables[2]), 0, 2, 0, 0)
        machine.access(CPU0, vcpu, 0x5000, WRITE)
        assert set(machine.violations()) == _DOUBTS[doubt]
        assert (machine.count(lib.COUNT_STALE_WALKS) > before) == (doubt == "unlinked")
