"""The fast path of a walk against the general walk.

Two machines run the same program.  They differ in the geometry of their paging-structure caches alone: those
of one are unbounded, where the fast path does not look, so it never applies.  Neither evicts anything
there; the second level is small in both and is evicted from all the time.  Entries, counts and reports of
both must be the same after each step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from native import ffi, lib
from native.types import CpuId, Gfn, Hfn, Level, SpteIndex, VcpuId, VmId, Vpid
from tests.native.hypervisor import EXECUTE, READ, WRITE, Hypervisor
from tests.support import CPU0, CPU1, VM0, VM1

if TYPE_CHECKING:
    from native._native import PscEntry, TlbEntry

GFNS = 2048
# Of one set of the first level, so that most accesses go on to the second.
PAGES = [0x1000 + 16 * i for i in range(24)] + [0x400200 + 16 * i for i in range(4)]
KINDS = [WRITE, READ, EXECUTE, READ]
RECORDS = [KINDS[(i + i // 28) % 4] << 62 | PAGES[i * 11 % 28] << 12 | i * 8 & 0xFF8 for i in range(300)]
# Global pages of the guest's kernel, too.
LINEAR = [page << 12 for page in [*PAGES[::2], *range(0x800000000, 0x800000004)]]
# Costs in time.
OTHERS = {lib.COUNT_WAIT_NANOSECONDS}

VCPUS = 3
NTH = st.integers(0, 255)
CPU = st.integers(0, 1)
STEPS = st.one_of(
    st.tuples(st.just("access"), CPU, st.integers(0, VCPUS - 1), st.sampled_from(LINEAR), st.integers(0, 2)),
    st.tuples(st.just("run"), CPU, st.integers(0, VCPUS - 1), st.integers(1, 400)),
    st.tuples(st.just("zap"), NTH),
    st.tuples(st.just("protect"), NTH),
    st.tuples(st.just("free"), NTH, st.booleans()),
    st.tuples(
        st.just("bits"), NTH, st.sampled_from([lib.SPTE_ACCESSED, lib.SPTE_DIRTY, lib.SPTE_EXECUTABLE])
    ),
    st.tuples(st.just("void"), NTH),
    st.tuples(st.just("flush")),
    st.tuples(st.just("invvpid"), CPU),
    st.tuples(st.just("evict"), CPU, st.integers(0, 20)),
    st.tuples(st.just("large"), CPU, st.integers(0, 20)),
    st.tuples(st.just("unlink"), NTH, st.booleans()),
    st.tuples(st.just("reroot")),
)

# Every guest has its tables and a few of its pages.
WARM = [("run", i % 2, i % VCPUS, 400) for i in range(2 * VCPUS)]


class Side(Hypervisor):
    """One of the two: two vCPUs of a VM, and one of another that was given the same root."""

    def __init__(self, entries: int, ways: int, psc_entries: int) -> None:
        super().__init__(table_frames=1024, l2_entries=entries, l2_ways=ways, psc_entries=psc_entries)
        self.vms = [self.vm(GFNS), self.vm(GFNS)]
        self.roots[VM1] = self.roots[VM0]
        self.vcpus = [self.guest(VM0, 1), self.guest(VM0, 2), self.guest(VM1, 3)]

    def __enter__(self) -> Side:
        return self

    def guest(self, vm: VmId, vpid: int) -> VcpuId:
        """Its pages are spread over all tables of the EPT."""
        often = {"switch_every": 170, "unmap_every": 90, "protect_every": 70}
        vcpu = self.vcpu(vm, vpid, paging=1, end_gfn=GFNS, stride=16, phase=vpid, **often)
        for _ in range(2):
            self.process(vcpu, RECORDS, PAGES)
        return vcpu

    def sptes(self) -> dict[int, int]:
        """Every present leaf SPTE by gfn."""
        found = {}
        sptes, tables = ffi.new("uint64_t[]", 6), ffi.new("uint32_t[]", 6)
        for first in range(0, GFNS, 512):
            if lib.tdp_mmu_get_walk(self.m, self.roots[VM0], Level(4), Gfn(first), sptes, tables) == 1:
                for i in (i for i in range(512) if 1 <= i % 16 <= VCPUS):
                    found[first + i] = int(lib.spte_read(self.m, Hfn(tables[1]), SpteIndex(i)))
        return {gfn: spte for gfn, spte in found.items() if spte & 7}

    def mapped_gfns(self) -> list[int]:
        return list(self.sptes())

    def mapped_gfn(self, nth: int) -> int:
        gfns = self.mapped_gfns()
        return gfns[nth % len(gfns)] if gfns else 0

    def change(self, gfn: int, flip: int) -> None:
        """Bits of a present SPTE change."""
        table, index, old = self.leaf(CPU0, VM0, gfn, False)
        if old & 7:
            lib.tdp_mmu_set_spte(self.m, CPU0, VM0, table, SpteIndex(index), Level(1), Gfn(gfn), old ^ flip)

    def step(self, step: Any) -> None:
        getattr(self, "do_" + step[0])(*step[1:])

    def do_access(self, cpu: CpuId, vcpu: int, linear: int, kind: int) -> None:
        self.access(cpu, self.vcpus[vcpu], linear, kind)

    def do_run(self, cpu: CpuId, vcpu: int, n: int) -> None:
        self.run(cpu, self.vcpus[vcpu], n)

    def do_zap(self, nth: int) -> None:
        self.zap(CPU0, VM0, self.mapped_gfn(nth))

    def do_protect(self, nth: int) -> None:
        self.write_protect(CPU0, VM0, self.mapped_gfn(nth))

    def do_free(self, nth: int, flush: bool) -> None:
        gfn = self.mapped_gfn(nth)
        self.zap(CPU0, VM0, gfn)
        if flush:
            self.flush(VM0)
        self.promise(CPU0, VM0, gfn, lib.PROMISE_NOTIFIER)
        self.free(CPU0, VM0, gfn)

    def do_bits(self, nth: int, bits: int) -> None:
        for gfn in self.mapped_gfns()[nth % 4 :: 4]:
            self.change(gfn, bits)

    def do_void(self, nth: int) -> None:
        self.change(self.mapped_gfn(nth), 1 << lib.SPTE_CUSTODY_SHIFT)

    def do_flush(self) -> None:
        self.flush(VM0)

    def do_invvpid(self, cpu: CpuId) -> None:
        lib.flush_invvpid_single(self.m, cpu, VM0, Vpid(1), lib.REASON_MIGRATION)

    def do_evict(self, cpu: CpuId, nth: int) -> None:
        lib.tlb_evict(lib.cpu_tlb(self.m, cpu), nth)

    def do_large(self, cpu: CpuId, nth: int) -> None:
        """A 2M guest-physical mapping is cached, of which at least one page is right."""
        tlb = lib.cpu_tlb(self.m, cpu)
        entries = ffi.new("struct tlb_entry[]", 2048)
        every = [entries[i] for i in range(lib.tlb_dump(tlb, entries, 2048))]
        small = [e for e in every if (e.kind, e.size) == (lib.KIND_GUEST_PHYSICAL, lib.PAGE_4K)]
        if not small or small[nth % len(small)].hfn < 512:
            return
        e = small[nth % len(small)]
        e.size = lib.PAGE_2M
        e.hfn -= e.page & 511
        e.page = e.gfn = e.page & ~511
        lib.tlb_insert(tlb, ffi.addressof(e), e.page)

    def do_unlink(self, nth: int, free: bool) -> None:
        """The last table on the way to a page goes, without the flush that is due."""
        gfn = self.mapped_gfn(nth)
        sptes, tables = ffi.new("uint64_t[]", 6), ffi.new("uint32_t[]", 6)
        if lib.tdp_mmu_get_walk(self.m, self.roots[VM0], Level(4), Gfn(gfn), sptes, tables) != 1:
            return
        for other in self.mapped_gfns():
            if other >> 9 == gfn >> 9:
                self.zap(CPU0, VM0, other)
        removal = ffi.new("struct tdp_removal *")
        old = lib.tdp_mmu_set_spte(
            self.m, CPU0, VM0, Hfn(tables[2]), SpteIndex(gfn >> 9 & 511), Level(2), Gfn(gfn), 0
        )
        lib.tdp_removal_begin(self.m, CPU0, VM0, removal, old, Level(2), Gfn(gfn & ~511), False)
        while removal.level:
            lib.tdp_removal_step(self.m, CPU0, VM0, removal, 512)
        if free:
            lib.ept_table_free(self.m, CPU0, Hfn(tables[1]))

    def do_reroot(self) -> None:
        """The root page is freed and taken again: an earlier owner's entries live on."""
        sptes, tables = ffi.new("uint64_t[]", 6), ffi.new("uint32_t[]", 6)
        for gfn in self.mapped_gfns():
            self.zap(CPU0, VM0, gfn)
        lib.tdp_mmu_get_walk(self.m, self.roots[VM0], Level(4), Gfn(0), sptes, tables)
        kept = int(sptes[4])
        lib.tdp_mmu_set_spte(self.m, CPU0, VM0, self.roots[VM0], SpteIndex(0), Level(4), Gfn(0), 0)
        lib.ept_table_free(self.m, CPU0, self.roots[VM0])
        self.roots[VM0] = self.roots[VM1] = self.new_root()
        lib.tdp_mmu_set_spte(self.m, CPU0, VM0, self.roots[VM0], SpteIndex(0), Level(4), Gfn(0), kept)
        for vcpu in self.vcpus:
            lib.vmcs_write_eptp(self.m, self.vmcs[vcpu], self.roots[VM0], Level(4))

    def dumped(self, cpu: CpuId) -> tuple[Dump, Dump]:
        """Return every valid entry, in the order of the caches."""
        tlb = lib.cpu_tlb(self.m, cpu)
        entries, tables = ffi.new("struct tlb_entry[]", 2048), ffi.new("struct psc_entry[]", 512)
        n, k = lib.tlb_dump(tlb, entries, 2048), lib.psc_dump(tlb, tables, 512)
        assert n <= 2048
        assert k <= 512
        return Dump(entries, n), Dump(tables, k)

    def first_level(self, cpu: CpuId) -> list[Any]:
        hfn, right = ffi.new("uint32_t *"), ffi.new("uint32_t[]", 3)
        tlb = lib.cpu_tlb(self.m, cpu)
        return [(page, hfn[0], list(right)) for page in PAGES if lib.tlb_l1_probe(tlb, page, hfn, right)]

    def counts(self) -> list[int]:
        values = ffi.new("uint64_t[]", lib.COUNTERS)
        lib.counters_sum(self.m, values)
        return [0 if i in OTHERS else int(values[i]) for i in range(lib.COUNTERS)]


class Dump(NamedTuple):
    """The first `n` entries of an array; the caches keep them in no order."""

    entries: Any
    n: int

    def bytes(self) -> list[bytes]:
        size = ffi.sizeof(self.entries[0])
        every = bytes(ffi.buffer(self.entries, self.n * size))
        return sorted(every[i : i + size] for i in range(0, len(every), size))

    def fields(self) -> list[Any]:
        return sorted(fields(self.entries[i]) for i in range(self.n))


def check_cached(fast: Side, general: Side, cpu: CpuId, step: Any) -> None:
    """Entries of equal bytes are equal, and bytes are compared in a tenth of the time."""
    for one, other in zip(fast.dumped(cpu), general.dumped(cpu), strict=True):
        assert one.bytes() == other.bytes() or one.fields() == other.fields(), step


def fields(entry: TlbEntry | PscEntry) -> list[Any]:
    """An entry without its padding."""
    values = [getattr(entry, name) for name, _ in ffi.typeof(entry).fields]
    return [list(value) if isinstance(value, Iterable) else value for value in values]


# State that one pCPU has put in order meets the older cache of another.
HEALED_ELSEWHERE = [("run", cpu, 0, 13) for cpu in (0, 1) for _ in range(30)]
AFTER_REROOT = [("reroot",), *HEALED_ELSEWHERE]
AFTER_UNLINK = [("unlink", 0, True), *HEALED_ELSEWHERE, ("unlink", 40, True), *HEALED_ELSEWHERE]
BITS = [
    ("bits", i, bit) for bit in (lib.SPTE_ACCESSED, lib.SPTE_DIRTY, lib.SPTE_EXECUTABLE) for i in range(4)
]
AFTER_BITS = [step for i in range(0, 12, 4) for step in BITS[i : i + 4] + HEALED_ELSEWHERE]
AFTER_PROTECT = [("protect", i) for i in range(0, 120, 2)] + HEALED_ELSEWHERE
AFTER_VOID = [("void", i) for i in range(0, 120, 3)] + HEALED_ELSEWHERE
KERNEL = [("flush",)] + [("access", 0, 0, page << 12, READ) for page in range(0x800000000, 0x800000006)]
LARGE = [step for i in range(20) for step in (("large", 0, i), ("run", 0, 0, 40))]


@pytest.mark.slow
@pytest.mark.parametrize(("entries", "ways"), [(24, 12), (192, 12), (48, 24), (0, 0)])
@example(AFTER_REROOT)
@example(AFTER_UNLINK)
@example(AFTER_BITS)
@example(AFTER_PROTECT)
@example(AFTER_VOID)
@example(KERNEL)
@example(LARGE)
@settings(max_examples=20, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEPS, min_size=5, max_size=40))
def test_both_walks_do_the_same(entries: int, ways: int, steps: list[Any]) -> None:
    with Side(entries, ways, 64) as fast, Side(entries, ways, 0) as general:
        for step in [*WARM, *steps]:
            fast.step(step)
            general.step(step)
            assert fast.counts() == general.counts(), step
            assert fast.violations() == general.violations(), step
            assert fast.sptes() == general.sptes(), step
            for cpu in (CPU0, CPU1):
                check_cached(fast, general, cpu, step)
                assert fast.first_level(cpu) == general.first_level(cpu), step
