"""The guest's OS and programs without EPT: exits, stores that KVM emulates, and promises to itself."""

from __future__ import annotations

import pytest

from native import ffi, lib
from native.types import CpuId, Gva, VcpuId
from tests.native.hypervisor import Hypervisor
from tests.native.shadow_guests import (
    INVLPG,
    LINEAR,
    MAP,
    PAGES,
    RECORDS,
    W_,
    R,
    canonical,
    guest,
    record,
)
from tests.native.shadow_hypervisor import (
    CR0_PG,
    CR4_PCIDE,
    DIRECT_BASE,
    NOFLUSH,
    WRITE,
    ShadowHypervisor,
    Space,
)
from tests.support import CPU0, CPU1, VM0


def test_the_os_boots_by_its_own_stores_and_enables_paging() -> None:
    with ShadowHypervisor() as machine:
        vcpu = guest(machine, pcid=1)
        machine.run(CPU0, vcpu, 1000)
        names = [name for name, _ in machine.exits]
        assert names[:6] == ["MOV_CR4", "WRMSR_EFER", "MOV_CR3", "MOV_CR0", "MOV_CR4", "MOV_CR3"]
        assert machine.exits[2][1] & 0xFFF == 0
        assert machine.exits[5][1] & 0xFFF == 1
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


CR0 = CR0_PG | 1 << lib.X86_CR0_PE_BIT | 1 << lib.X86_CR0_WP_BIT
CR4 = 1 << lib.X86_CR4_PAE_BIT | 1 << lib.X86_CR4_PGE_BIT
# The writes of each window of a role, by the key of its interval; a MOV to CR3 by its PCID.
WINDOWS = {
    "wp_every": [("MOV_CR0", CR0 & ~(1 << lib.X86_CR0_WP_BIT)), ("MOV_CR0", CR0)],
    "pg_every": [("MOV_CR0", CR0 & ~CR0_PG), ("MOV_CR0", CR0)],
    "smep_every": [("MOV_CR4", CR4 | 1 << lib.X86_CR4_SMEP_BIT), ("MOV_CR4", CR4)],
    "pcide_every": [("MOV_CR3", 0), ("MOV_CR4", CR4), ("MOV_CR4", CR4 | CR4_PCIDE), ("MOV_CR3", 1)],
}


@pytest.mark.parametrize("every", WINDOWS)
def test_an_os_changes_a_role_and_changes_it_back_before_its_next_access(every: str) -> None:
    with ShadowHypervisor(table_frames=4096) as machine:
        vcpu = guest(machine, processes=1, pcid=int(every == "pcide_every"), **{every: 50})
        machine.run(CPU0, vcpu, 100)
        # The boot ends with the last write of some windows.
        machine.exits.clear()
        windows = machine.count(lib.COUNT_GUEST_ROLE_WINDOWS)
        machine.run(CPU0, vcpu, 2000)
        writes = [
            (name, operand & 0xFFF if name == "MOV_CR3" else operand)
            for name, operand in machine.exits
            if name.startswith("MOV_")
        ]
        windows = machine.count(lib.COUNT_GUEST_ROLE_WINDOWS) - windows
        assert 30 < windows < 50
        assert writes == WINDOWS[every] * windows
        assert machine.violations() == {}


def test_with_wp_clear_the_kernel_writes_to_a_page_that_is_mapped_read_only() -> None:
    class Watched(ShadowHypervisor):
        kernel_stores = 0

        def page_fault(self, cpu: CpuId, vcpu: VcpuId) -> None:
            own = self.exit.linear >> 12 in PAGES
            self.kernel_stores += own and not self.exit.error_code & lib.PFERR_USER
            super().page_fault(cpu, vcpu)

    for work in (0, 1):
        with Watched(table_frames=4096) as machine:
            vcpu = guest(machine, wp_every=50, protect_every=20, window_work=work)
            machine.run(CPU0, vcpu, 2000)
            assert machine.count(lib.COUNT_GUEST_ROLE_WINDOWS) > 30
            assert (machine.kernel_stores > 10) == bool(work), machine.kernel_stores
            assert machine.violations() == {}


def test_with_pcide_clear_the_os_unmaps_a_page_of_another_process_and_invalidates_nothing() -> None:
    faults = {}
    for work in (0, 1):
        with ShadowHypervisor(table_frames=4096) as machine:
            config = {"pcid": 1, "pcide_every": 100, "switch_every": 150, "window_work": work}
            vcpu = guest(machine, processes=2, **config)
            machine.run(CPU0, vcpu, 4000)
            assert machine.count(lib.COUNT_GUEST_ROLE_WINDOWS) > 20
            assert "INVLPG" not in {name for name, _ in machine.exits}
            assert machine.violations() == {}
            faults[work] = machine.count(lib.COUNT_GUEST_FAULTS)
    # Each page is mapped again on its next use.
    assert faults[1] > faults[0] + 20


def test_processes_share_2_mib_pages_only_where_they_are_told_to() -> None:
    used = {}
    for share in (0, 1):
        with ShadowHypervisor(table_frames=4096) as machine:
            # Region 5 is one of those that get a 2 MiB page.
            pages = [(5 << 9) + i for i in range(64)]
            vcpu = guest(machine, processes=0, hugepages=1, share_blocks=share, switch_every=100)
            for _ in range(3):
                machine.process(vcpu, [record(page, i % 2) for i, page in enumerate(pages)], pages)
            machine.run(CPU0, vcpu, 2000)
            assert machine.violations() == {}
            used[share] = lib.guest_frames_used(machine.m, vcpu)
    assert used[0] > used[1]


def test_with_ept_the_bits_of_a_role_are_the_guests_own() -> None:
    with Hypervisor() as machine:
        vm = machine.vm(gfns=2048)
        vcpu = machine.vcpu(vm, 1, paging=1, end_gfn=2048, pcid=0, wp_every=50, pg_every=50, smep_every=50)
        machine.process(vcpu, RECORDS, PAGES)
        machine.run(CPU0, vcpu, 2000)
        assert machine.count(lib.COUNT_GUEST_ROLE_WINDOWS) == 0


def test_an_os_that_runs_out_of_memory_reclaims() -> None:
    with ShadowHypervisor(table_frames=4096) as machine:
        vcpu = guest(machine, processes=3, end_gfn=48, switch_every=300)
        machine.run(CPU0, vcpu, 2000)
        assert lib.guest_frames_used(machine.m, vcpu) == 48
        assert "INVLPG" in {name for name, _ in machine.exits}
        assert machine.violations() == {}


def test_a_reset_boots_the_os_again_on_its_former_tables() -> None:
    """All memory is free again, while the former tables are still tracked: zeroing them is emulated."""
    with ShadowHypervisor(table_frames=4096) as machine:
        vcpu = guest(machine, processes=2, end_gfn=96, switch_every=300, unmap_every=90)
        machine.run(CPU0, vcpu, 1500)
        tables = set(machine.tables)
        for _ in range(2):
            lib.vcpu_set_paging(machine.m, vcpu, False)
            lib.guest_boot(machine.m, vcpu)
            machine.switch(vcpu, Space(vcpu, False, 0), 0)
            machine.flush_vpid(CPU0, vcpu)
            machine.exits.clear()
            machine.emulated = 0
            machine.run(CPU0, vcpu, 1500)
            names = [name for name, _ in machine.exits[:4]]
            assert names == ["MOV_CR4", "WRMSR_EFER", "MOV_CR3", "MOV_CR0"]
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


def test_a_lost_root_table_of_the_os_is_a_triple_fault() -> None:
    with ShadowHypervisor() as machine:
        vcpu = guest(machine)
        machine.run(CPU0, vcpu, 100)
        lib.guest_inject_page_fault(machine.m, vcpu, Gva(DIRECT_BASE << 12), 0)
        machine.enter(CPU0, vcpu)
        assert lib.guest_run(machine.m, CPU0, vcpu, 10, machine.exit) == lib.EXIT_TRIPLE_FAULT


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
