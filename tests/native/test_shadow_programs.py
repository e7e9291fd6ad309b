"""Guests without EPT against the SDM's rules (shadow_model.py), on programs that hypothesis writes.

KVM's half sets, changes and clears SPTEs in several trees, loads them with PCIDs, flushes or forgets to.
Each access must end as the rules say, with their cached mappings, flags, error codes and violations.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from native import ffi, lib
from native.types import (
    AccessKind,
    CpuId,
    Custody,
    Gfn,
    Gva,
    Hfn,
    HostWritable,
    Hva,
    Level,
    LinearPage,
    SpteIndex,
    VcpuId,
    Vpid,
)
from tests.native.shadow_hypervisor import ShadowHypervisor, Space
from tests.native.shadow_model import Cpu, Root, ShadowModel, Spte, Vcpu
from tests.support import CPU0, VM0

ROOTS = 3
PAGES = (1, 2, 3, 513, 1 << 18)
# In a region that leafs of 2 MiB map.
HUGE = (1024, 1030, 1535)
BITS = {
    "writable": lib.SPTE_WRITABLE,
    "executable": lib.SPTE_EXECUTABLE,
    "user": lib.SPTE_USER,
    "global_": lib.SPTE_GLOBAL,
}
FLAGS = tuple(BITS)

page = st.sampled_from(PAGES)
anywhere = st.sampled_from((*PAGES, *HUGE))
root = st.integers(0, ROOTS - 1)
pcpu = st.integers(0, 1)
vcpu = st.integers(0, 1)


class ShadowMachine(RuleBasedStateMachine):
    with_vpid = True
    geometry = (0, 0, 0)

    def __init__(self) -> None:
        super().__init__()
        entries, ways, psc = self.geometry
        self.machine = ShadowHypervisor(
            vpid=self.with_vpid,
            guest_frames=64,
            guest_blocks=1,
            l2_entries=entries,
            l2_ways=ways,
            psc_entries=psc,
        )
        self.machine.vm(gfns=(1 << 18) + 512)
        self.block = self.huge_frame()
        self.vcpus = [self.machine.vcpu(VM0, vpid, paging=0) for vpid in (1, 2)]
        self.spaces = [Space(VcpuId(99), False, number) for number in range(ROOTS)]
        for space in self.spaces:
            self.machine.tree[space] = self.machine.new_root()
        self.model = ShadowModel([Root() for _ in range(ROOTS)], [Cpu(), Cpu()])
        self.state = [Vcpu(int(self.machine.vpid[vcpu])) for vcpu in self.vcpus]
        for number in range(2):
            self.load(number, number, 0)

    def teardown(self) -> None:
        self.machine.__exit__(None, None, None)

    def huge_frame(self) -> object:
        frame, m = ffi.new("struct mm_page *"), self.machine.m
        assert lib.mm_fault(m, CPU0, VM0, Hva(HUGE[0]), True, frame) == 0
        assert lib.mm_collapse(m, CPU0, VM0, Hva(HUGE[0])) == 0
        assert lib.mm_fault(m, CPU0, VM0, Hva(HUGE[0]), True, frame) == 0
        return frame

    def huge_spot(self, root: int) -> tuple[Hfn, int, int]:
        """Return table, index and SPTE of the level of 2 MiB; make the tables."""
        m, top = self.machine.m, self.machine.tree[self.spaces[root]]
        sptes, tables = ffi.new("uint64_t[]", 6), ffi.new("uint32_t[]", 6)
        while True:
            level = lib.tdp_mmu_get_walk(m, top, Level(4), Gfn(HUGE[0]), sptes, tables)
            index = HUGE[0] >> 9 * (level - 1) & 511
            if level == 2:
                return Hfn(tables[2]), index, int(sptes[2])
            child = Hfn(lib.shadow_page_alloc(m, CPU0, lib.FRAME_TABLE))
            spte = lib.make_nonleaf_spte(m, child)
            lib.shadow_mmu_set_spte(m, CPU0, VM0, Hfn(tables[level]), SpteIndex(index), level, Gfn(0), spte)

    # -- KVM and the host

    @rule(root=root, flags=st.sets(st.sampled_from((*FLAGS, "user")), max_size=4), aged=st.booleans())
    def set_huge(self, root: int, flags: set[str], aged: bool) -> None:
        m, hfn, writable = self.machine.m, self.block.hfn, "writable" in flags  # type: ignore[attr-defined]
        table, index, _ = self.huge_spot(root)
        lib.shadow_mmu_set_spte(m, CPU0, VM0, table, SpteIndex(index), Level(2), Gfn(0), 0)
        custody = lib.mm_huge_custody(m, VM0, Hva(HUGE[0]), hfn, self.block.tag)  # type: ignore[attr-defined]
        assert custody >= 0
        spte = lib.make_shadow_spte(
            hfn, Custody(custody), Level(2), sum(BITS[flag] for flag in flags), HostWritable(True)
        )
        if aged:
            spte &= ~(lib.SPTE_ACCESSED | lib.SPTE_DIRTY)
        assert (
            lib.shadow_mmu_set_spte(m, CPU0, VM0, table, SpteIndex(index), Level(2), Gfn(HUGE[0]), spte) == 0
        )
        shape = writable, "executable" in flags, "user" in flags, "global_" in flags
        leaf = Spte(hfn, 0, *shape, not aged, writable and not aged, size=1)
        self.model.set_huge(root, HUGE[0], leaf)

    @rule(root=root)
    def zap_huge(self, root: int) -> None:
        table, index, _ = self.huge_spot(root)
        lib.shadow_mmu_set_spte(self.machine.m, CPU0, VM0, table, SpteIndex(index), Level(2), Gfn(0), 0)
        self.model.roots[root].touch(HUGE[0], 2)
        self.model.roots[root].huge.clear()

    @rule(vcpu=vcpu, root=root, pcid=st.integers(0, 2))
    def load(self, vcpu: int, root: int, pcid: int) -> None:
        self.machine.switch(self.vcpus[vcpu], self.spaces[root], pcid)
        self.state[vcpu].root, self.state[vcpu].pcid = root, pcid

    @rule(
        root=root, page=page, flags=st.sets(st.sampled_from((*FLAGS, "user")), max_size=4), aged=st.booleans()
    )
    def set_spte(self, root: int, page: int, flags: set[str], aged: bool) -> None:
        m = self.machine.m
        table, index, _ = self.machine.spot(CPU0, VM0, self.spaces[root], page)
        lib.shadow_mmu_set_spte(m, CPU0, VM0, table, SpteIndex(index), Level(1), Gfn(0), 0)
        self.model.zap(root, page)
        frame = ffi.new("struct mm_page *")
        assert lib.mm_fault(m, CPU0, VM0, Hva(page), True, frame) == 0
        spte = lib.make_shadow_spte(
            frame.hfn, frame.tag, Level(1), sum(BITS[flag] for flag in flags), HostWritable(True)
        )
        if aged:
            spte &= ~(lib.SPTE_ACCESSED | lib.SPTE_DIRTY)
        assert lib.shadow_mmu_set_spte(m, CPU0, VM0, table, SpteIndex(index), Level(1), Gfn(page), spte) == 0
        writable = "writable" in flags
        self.model.set_spte(
            root,
            page,
            Spte(
                frame.hfn,
                self.model.page(page).life,
                writable,
                "executable" in flags,
                "user" in flags,
                "global_" in flags,
                not aged,
                writable and not aged,
            ),
        )

    @rule(root=root, page=page)
    def set_mmio(self, root: int, page: int) -> None:
        table, index, _ = self.machine.spot(CPU0, VM0, self.spaces[root], page)
        mmio = 1 << lib.SPTE_MMIO_BIT
        lib.shadow_mmu_set_spte(self.machine.m, CPU0, VM0, table, SpteIndex(index), Level(1), Gfn(0), mmio)
        self.model.set_mmio(root, page)

    @rule(root=root, page=page)
    def zap(self, root: int, page: int) -> None:
        table, index, _ = self.machine.spot(CPU0, VM0, self.spaces[root], page)
        lib.shadow_mmu_set_spte(self.machine.m, CPU0, VM0, table, SpteIndex(index), Level(1), Gfn(0), 0)
        self.model.roots[root].touch(page)
        self.model.zap(root, page)

    @rule(root=root, page=page)
    def write_protect(self, root: int, page: int) -> None:
        table, index, old = self.machine.spot(CPU0, VM0, self.spaces[root], page)
        self.model.roots[root].touch(page)
        if old & lib.SPTE_WRITABLE:
            new = old & ~lib.SPTE_WRITABLE
            rc = lib.shadow_mmu_set_spte_atomic(
                self.machine.m, CPU0, VM0, table, SpteIndex(index), Level(1), old, new
            )
            assert rc == 0
            self.model.roots[root].leafs[page].writable = False

    @rule(page=page, freed=st.booleans())
    def promise(self, page: int, freed: bool) -> None:
        for number, space in enumerate(self.spaces):
            table, index, old = self.machine.spot(CPU0, VM0, space, page)
            self.model.roots[number].touch(page)
            if old & 7:
                lib.shadow_mmu_set_spte(
                    self.machine.m, CPU0, VM0, table, SpteIndex(index), Level(1), Gfn(0), 0
                )
        present = lib.mm_present(self.machine.m, VM0, Hva(page), Hva(page + 1))
        self.machine.promise(CPU0, VM0, page, lib.PROMISE_NOTIFIER)
        if freed:
            self.machine.free(CPU0, VM0, page)
        self.model.promise(page, freed=freed and bool(present))

    # -- flushes

    @rule(cpu=pcpu, vcpu=vcpu)
    def invvpid_single(self, cpu: int, vcpu: int) -> None:
        vpid = self.state[vcpu].vpid
        if vpid:
            lib.flush_invvpid_single(self.machine.m, CpuId(cpu), VM0, Vpid(vpid), lib.REASON_GUEST)
            self.model.cpus[cpu].drop_vpid(vpid)

    @rule(cpu=pcpu, vcpu=vcpu)
    def invvpid_retain_globals(self, cpu: int, vcpu: int) -> None:
        vpid = self.state[vcpu].vpid
        if vpid:
            m, reason = self.machine.m, lib.REASON_GUEST
            assert lib.flush_invvpid_retain_globals(m, CpuId(cpu), VM0, Vpid(vpid), reason) == 0
            self.model.cpus[cpu].drop_vpid(vpid, retain_globals=True)

    @rule(cpu=pcpu, vcpu=vcpu, page=anywhere)
    def invvpid_address(self, cpu: int, vcpu: int, page: int) -> None:
        vpid = self.state[vcpu].vpid
        if vpid:
            lib.flush_invvpid_address(
                self.machine.m, CpuId(cpu), VM0, Vpid(vpid), LinearPage(page), lib.REASON_GUEST
            )
            self.model.cpus[cpu].drop_page(vpid, None, page)

    @rule(cpu=pcpu)
    def invvpid_all(self, cpu: int) -> None:
        lib.flush_invvpid_all(self.machine.m, CpuId(cpu), VM0, lib.REASON_GUEST)
        self.model.cpus[cpu].drop_all()

    @rule(cpu=pcpu)
    def invept_global(self, cpu: int) -> None:
        """INVEPT drops no linear mapping."""
        lib.flush_invept_global(self.machine.m, CpuId(cpu), VM0, lib.REASON_GUEST)

    # -- the guest

    @rule(cpu=pcpu, vcpu=vcpu, page=anywhere, kind=st.integers(0, 2))
    def access(self, cpu: int, vcpu: int, page: int, kind: int) -> None:
        self.machine.enter(CpuId(cpu), self.vcpus[vcpu])
        reason = lib.guest_access(
            self.machine.m,
            CpuId(cpu),
            self.vcpus[vcpu],
            Gva(page << 12 | 8),
            AccessKind(kind),
            self.machine.exit,
        )
        expected = self.model.access(cpu, self.state[vcpu], page, kind)
        if expected is None:
            assert reason == lib.EXIT_PREEMPTION_TIMER
        else:
            assert (reason, self.machine.exit.error_code) == (lib.EXIT_EXCEPTION, expected)
            assert self.machine.exit.linear == page << 12 | 8

    @rule(cpu=pcpu, vcpu=vcpu, page=anywhere)
    def speculate(self, cpu: int, vcpu: int, page: int) -> None:
        m, number = self.machine.m, CpuId(cpu)
        self.machine.enter(number, self.vcpus[vcpu])
        assert lib.guest_enter(m, number, self.vcpus[vcpu], 1, self.machine.exit) == 0
        new = lib.guest_speculate(m, number, Gva(page << 12))
        assert lib.guest_leave(m, number, lib.EXIT_PREEMPTION_TIMER) == lib.EXIT_PREEMPTION_TIMER
        assert bool(new) == self.model.speculate(cpu, self.state[vcpu], page)

    # -- comparison

    @invariant()
    def translations(self) -> None:
        entries = ffi.new("struct tlb_entry[]", 256)
        for cpu, model in enumerate(self.model.cpus):
            n = lib.tlb_dump(lib.cpu_tlb(self.machine.m, CpuId(cpu)), entries, 256)
            found = {
                (
                    *(e.kind, e.vpid, None if getattr(e, "global") else e.pcid),
                    *(e.size, e.page, e.hfn, *self.rights(e)),
                )
                for e in entries[0:n]
            }
            assert len(found) == n
            assert found == {
                (
                    *(lib.KIND_LINEAR, e.vpid, None if e.global_ else e.pcid),
                    *(e.size, e.page, e.hfn, e.write, e.execute),
                )
                for e in model.entries
            }

    @staticmethod
    def rights(entry: object) -> tuple[bool, bool]:
        right = entry.right  # type: ignore[attr-defined]
        return right[1] != lib.RIGHT_NONE, right[2] != lib.RIGHT_NONE

    @invariant()
    def caches(self) -> None:
        entries = ffi.new("struct psc_entry[]", 256)
        for cpu, model in enumerate(self.model.cpus):
            n = lib.psc_dump(lib.cpu_tlb(self.machine.m, CpuId(cpu)), entries, 256)
            found = {(e.vpid, e.pcid, e.level, e.page >> 9 * e.level) for e in entries[0:n]}
            assert found == set(model.caches)

    @invariant()
    def flags(self) -> None:
        for number, space in enumerate(self.spaces):
            for page, spte in self.model.roots[number].leafs.items():
                table, index, word = self.machine.spot(CPU0, VM0, space, page)
                assert bool(word & lib.SPTE_ACCESSED) == spte.accessed
                assert bool(word & lib.SPTE_DIRTY) == spte.dirty
                assert Hfn(word >> lib.SPTE_HFN_SHIFT & 0xFFFFFF) == spte.hfn
                assert lib.kvm_mmu_page_get_gfn(self.machine.m, table, SpteIndex(index)) == page
            for spte in self.model.roots[number].huge.values():
                word = self.huge_spot(number)[2]
                assert bool(word & lib.SPTE_ACCESSED) == spte.accessed
                assert bool(word & lib.SPTE_DIRTY) == spte.dirty

    @invariant()
    def violations(self) -> None:
        counts = ffi.new("uint64_t[]", lib.VIOLATIONS)
        lib.oracle_counts(self.machine.m, counts)
        assert sum(counts) == self.model.violations


class WithoutVpidMachine(ShadowMachine):
    with_vpid = False


class FastMachine(ShadowMachine):
    """Bounded, so that walks take their fast path, but so large that nothing is evicted."""

    geometry = (12 * 4096, 12, 4 * 4096)


_SETTINGS = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)

ShadowMachine.TestCase.settings = _SETTINGS
WithoutVpidMachine.TestCase.settings = _SETTINGS
FastMachine.TestCase.settings = _SETTINGS
TestWithVpid = pytest.mark.slow(ShadowMachine.TestCase)
TestWithoutVpid = pytest.mark.slow(WithoutVpidMachine.TestCase)
TestFast = pytest.mark.slow(FastMachine.TestCase)


def test_retaining_globals_drops_all_other_translations() -> None:
    machine = ShadowMachine()
    try:
        machine.set_spte(0, 1, {"user", "global_"}, False)
        machine.set_spte(0, 2, {"user"}, False)
        machine.set_huge(0, {"user", "global_"}, False)
        for page in (1, 2, HUGE[1]):
            machine.access(0, 0, page, 0)
        machine.invvpid_retain_globals(0, 0)
        machine.translations()
        machine.caches()
        assert {entry.page for entry in machine.model.cpus[0].entries} == {1, HUGE[0]}
    finally:
        machine.teardown()
