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
from native.types import CpuId, Hfn, VcpuId, Vpid
from tests.native.shadow_hypervisor import ShadowHypervisor, Space
from tests.native.shadow_model import Cpu, Root, ShadowModel, Spte, Vcpu
from tests.support import CPU0, VM0

ROOTS = 3
PAGES = (1, 2, 3, 513, 1 << 18)
FLAGS = ("writable", "executable", "user", "global_")

page = st.sampled_from(PAGES)
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
            vpid=self.with_vpid, guest_frames=64, l2_entries=entries, l2_ways=ways, psc_entries=psc
        )
        self.machine.vm(gfns=(1 << 18) + 512)
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

    # -- KVM and the host

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
        lib.shadow_mmu_set_spte(m, CPU0, VM0, table, index, 1, 0, 0)
        self.model.zap(root, page)
        frame = ffi.new("struct mm_page *")
        assert lib.mm_fault(m, CPU0, VM0, page, 1, frame) == 0
        bits = {"writable": lib.SPTE_WRITABLE, "executable": lib.SPTE_EXECUTABLE, "user": lib.SPTE_USER}
        bits["global_"] = lib.SPTE_GLOBAL
        spte = lib.make_shadow_spte(frame.hfn, frame.tag, 1, sum(bits[flag] for flag in flags), 1)
        if aged:
            spte &= ~(lib.SPTE_ACCESSED | lib.SPTE_DIRTY)
        assert lib.shadow_mmu_set_spte(m, CPU0, VM0, table, index, 1, page, spte) == 0
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
        lib.shadow_mmu_set_spte(self.machine.m, CPU0, VM0, table, index, 1, 0, mmio)
        self.model.set_mmio(root, page)

    @rule(root=root, page=page)
    def zap(self, root: int, page: int) -> None:
        table, index, _ = self.machine.spot(CPU0, VM0, self.spaces[root], page)
        lib.shadow_mmu_set_spte(self.machine.m, CPU0, VM0, table, index, 1, 0, 0)
        self.model.roots[root].touch(page)
        self.model.zap(root, page)

    @rule(root=root, page=page)
    def write_protect(self, root: int, page: int) -> None:
        table, index, old = self.machine.spot(CPU0, VM0, self.spaces[root], page)
        self.model.roots[root].touch(page)
        if old & lib.SPTE_WRITABLE:
            new = old & ~lib.SPTE_WRITABLE
            rc = lib.shadow_mmu_set_spte_atomic(self.machine.m, CPU0, VM0, table, index, 1, old, new)
            assert rc == 0
            self.model.roots[root].leafs[page].writable = False

    @rule(page=page, freed=st.booleans())
    def promise(self, page: int, freed: bool) -> None:
        for number, space in enumerate(self.spaces):
            table, index, old = self.machine.spot(CPU0, VM0, space, page)
            self.model.roots[number].touch(page)
            if old & 7:
                lib.shadow_mmu_set_spte(self.machine.m, CPU0, VM0, table, index, 1, 0, 0)
        present = lib.mm_present(self.machine.m, VM0, page, page + 1)
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

    @rule(cpu=pcpu, vcpu=vcpu, page=page)
    def invvpid_address(self, cpu: int, vcpu: int, page: int) -> None:
        vpid = self.state[vcpu].vpid
        if vpid:
            lib.flush_invvpid_address(self.machine.m, CpuId(cpu), VM0, Vpid(vpid), page, lib.REASON_GUEST)
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

    @rule(cpu=pcpu, vcpu=vcpu, page=page, kind=st.integers(0, 2))
    def access(self, cpu: int, vcpu: int, page: int, kind: int) -> None:
        self.machine.enter(CpuId(cpu), self.vcpus[vcpu])
        reason = lib.guest_access(
            self.machine.m, CpuId(cpu), self.vcpus[vcpu], page << 12 | 8, kind, self.machine.exit
        )
        expected = self.model.access(cpu, self.state[vcpu], page, kind)
        if expected is None:
            assert reason == lib.EXIT_PREEMPTION_TIMER
        else:
            assert (reason, self.machine.exit.error_code) == (lib.EXIT_EXCEPTION, expected)
            assert self.machine.exit.linear == page << 12 | 8

    # -- comparison

    @invariant()
    def translations(self) -> None:
        entries = ffi.new("struct tlb_entry[]", 256)
        for cpu, model in enumerate(self.model.cpus):
            n = lib.tlb_dump(lib.cpu_tlb(self.machine.m, CpuId(cpu)), entries, 256)
            found = {
                (e.kind, e.vpid, None if getattr(e, "global") else e.pcid, e.page, e.hfn, *self.rights(e))
                for e in entries[0:n]
            }
            assert len(found) == n
            assert found == {
                (lib.KIND_LINEAR, e.vpid, None if e.global_ else e.pcid, e.page, e.hfn, e.write, e.execute)
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
                assert lib.kvm_mmu_page_get_gfn(self.machine.m, table, index) == page

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
