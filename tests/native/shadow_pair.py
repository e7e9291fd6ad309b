"""A pCPU without EPT and its model side by side: each operation goes to both, each answer is compared.

KVM's half sets, changes and clears SPTEs in several trees, unlinks and frees tables, loads roots with PCIDs,
and flushes or does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

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
    Vpid,
)
from tests.native.shadow_hypervisor import ShadowHypervisor
from tests.native.shadow_model import EXECUTE, LEVELS, MMIO, Access, Cpu, ShadowModel, Spte, Table, Vcpu
from tests.support import CPU0, VM0

ROOTS = 3
PAGES = (1, 2, 3, 4, 5, 513, 1 << 18)
#: In regions that leafs of 2 MiB map, by the first page.
HUGE = {1024: (1024, 1030, 1535), 2048: (2049, 2500)}
ANYWHERE = (*PAGES, *HUGE[1024], *HUGE[2048])
#: Whether a page is global is fixed: of a global translation and another, a processor may use either.
GLOBAL_PAGES = (3, 513, *HUGE[2048])
FLAGS = {"writable": lib.SPTE_WRITABLE, "executable": lib.SPTE_EXECUTABLE, "user": lib.SPTE_USER}
MAPPED = frozenset(FLAGS)
DUMP_MAX = 512


class ShadowPair:
    """geometry: entries and ways of the second level, entries of a table cache; zeros: unbounded."""

    def __init__(self, *, vpid: bool = True, geometry: tuple[int, int, int] = (0, 0, 0)) -> None:
        entries, ways, psc = geometry
        self.hypervisor = ShadowHypervisor(
            vpid=vpid, guest_frames=64, guest_blocks=2, l2_entries=entries, l2_ways=ways, psc_entries=psc
        )
        self.m = self.hypervisor.m
        self.hypervisor.vm(gfns=(1 << 18) + 512)
        self.block = {first: self._huge_frame(first) for first in HUGE}
        self.vcpus = [self.hypervisor.vcpu(VM0, vpid, paging=0) for vpid in (1, 2)]
        self.roots = [Table(LEVELS, self.hypervisor.new_root()) for _ in range(ROOTS)]
        self.detached: list[tuple[int, Table]] = []  # tables of level 1 that are unlinked, by region
        self.model = ShadowModel([Cpu(), Cpu()])
        self.state = [
            Vcpu(number, int(self.hypervisor.vpid[vcpu]), self.roots[number])
            for number, vcpu in enumerate(self.vcpus)
        ]
        self.seen: Counter[str] = Counter()
        for number in range(len(self.vcpus)):
            self.load(number, number, 0)

    def close(self) -> None:
        self.hypervisor.__exit__(None, None, None)

    def _huge_frame(self, first: int) -> object:
        frame = ffi.new("struct mm_page *")
        assert lib.mm_fault(self.m, CPU0, VM0, Hva(first), True, frame) == 0
        assert lib.mm_collapse(self.m, CPU0, VM0, Hva(first)) == 0
        assert lib.mm_fault(self.m, CPU0, VM0, Hva(first), True, frame) == 0
        return frame

    # -- tables

    def _set(self, table: Table, page: int, spte: int, gfn: int = 0) -> None:
        old = lib.shadow_mmu_set_spte(
            self.m,
            CPU0,
            VM0,
            Hfn(table.hfn),
            SpteIndex(table.index(page)),
            Level(table.level),
            Gfn(gfn),
            spte,
        )
        assert old != (1 << 64) - 1

    def word(self, table: Table, page: int) -> int:
        return int(lib.spte_read(self.m, Hfn(table.hfn), SpteIndex(table.index(page))))

    def table(self, root: int, page: int, level: int = 1) -> Table:
        """Return the table of a level; make those on the way to it."""
        table = self.roots[root]
        while table.level > level:
            below = table.entries.get(table.index(page))
            if not isinstance(below, Table):
                below = Table(table.level - 1, lib.shadow_page_alloc(self.m, CPU0, lib.FRAME_TABLE))
                assert below.hfn >= 0
                self._set(table, page, lib.make_nonleaf_spte(self.m, Hfn(below.hfn)))
                table.entries[table.index(page)] = below
            table = below
        return table

    def all_tables(self, page: int) -> list[Table]:
        """Return the tables of level 1 that hold, or held until they were unlinked, a page's SPTE."""
        unlinked = [table for region, table in self.detached if region == page >> 9]
        return [self.table(root, page) for root in range(ROOTS)] + unlinked

    def _zap_in(self, table: Table, page: int) -> None:
        self._set(table, page, 0)
        self.model.set_spte(table, page, None)

    # -- KVM and the host

    def load(self, vcpu: int, root: int, pcid: int) -> None:
        vmcs = self.hypervisor.vmcs[self.vcpus[vcpu]]
        lib.vmcs_write_guest_cr3(self.m, vmcs, Hfn(self.roots[root].hfn), pcid)
        self.state[vcpu].root, self.state[vcpu].pcid = self.roots[root], pcid

    def give_vpid(self, vcpu: int, vpid: int) -> None:
        if self.state[vcpu].vpid:
            lib.vmcs_write_vpid(self.m, self.hypervisor.vmcs[self.vcpus[vcpu]], Vpid(vpid))
            self.state[vcpu].vpid = vpid

    def set_huge(self, root: int, first: int, flags: Collection[str], aged: bool) -> None:
        table, frame = self.table(root, first, 2), self.block[first]
        self._set(table, first, 0)
        hfn, tag = frame.hfn, frame.tag  # type: ignore[attr-defined]
        custody = lib.mm_huge_custody(self.m, VM0, Hva(first), hfn, tag)
        assert custody >= 0
        self._leaf(table, first, first, (hfn, Custody(custody)), flags, aged)

    def set_spte(
        self, root: int, page: int, flags: Collection[str], aged: bool, gfn: int | None = None
    ) -> None:
        """Map a page to its own gfn, or as only a broken KVM does to another one."""
        gfn = page if gfn is None else gfn
        table, frame = self.table(root, page), ffi.new("struct mm_page *")
        self._zap_in(table, page)
        assert lib.mm_fault(self.m, CPU0, VM0, Hva(gfn), True, frame) == 0
        self._leaf(table, page, gfn, (frame.hfn, frame.tag), flags, aged)

    def _leaf(
        self,
        table: Table,
        page: int,
        gfn: int,
        frame: tuple[int, Custody],
        flags: Collection[str],
        aged: bool,
    ) -> None:
        global_ = page in GLOBAL_PAGES or any(page == first for first in HUGE if first + 1 in GLOBAL_PAGES)
        access = sum(FLAGS[flag] for flag in flags) | (lib.SPTE_GLOBAL if global_ else 0)
        spte = lib.make_shadow_spte(Hfn(frame[0]), frame[1], Level(table.level), access, HostWritable(True))
        if aged:
            spte &= ~(lib.SPTE_ACCESSED | lib.SPTE_DIRTY)
        self._set(table, page, spte, gfn)
        rights = "writable" in flags, "executable" in flags, "user" in flags
        flags_set = not aged, rights[0] and not aged
        life, size = self.model.page(gfn).life, table.level - 1
        self.model.set_spte(table, page, Spte(gfn, frame[0], life, *rights, global_, *flags_set, size))

    def set_mmio(self, root: int, page: int) -> None:
        table = self.table(root, page)
        self._set(table, page, 1 << lib.SPTE_MMIO_BIT)
        self.model.set_spte(table, page, MMIO)

    def zap(self, root: int, page: int) -> None:
        self._zap_in(self.table(root, page), page)

    def zap_huge(self, root: int, first: int) -> None:
        self._zap_in(self.table(root, first, 2), first)

    def write_protect(self, root: int, page: int) -> None:
        table = self.table(root, page)
        old, spte = self.word(table, page), table.entries.get(table.index(page))
        if isinstance(spte, Spte) and spte.writable:
            where = Hfn(table.hfn), SpteIndex(table.index(page)), Level(1)
            new = old & ~lib.SPTE_WRITABLE
            assert lib.shadow_mmu_set_spte_atomic(self.m, CPU0, VM0, *where, old, new) == 0
            spte.writable = False

    def clean(self, root: int, page: int) -> None:
        """Clear D alone."""
        table = self.table(root, page)
        old, spte = self.word(table, page), table.entries.get(table.index(page))
        if isinstance(spte, Spte):
            where = Hfn(table.hfn), SpteIndex(table.index(page)), Level(1)
            new = old & ~lib.SPTE_DIRTY
            assert lib.shadow_mmu_set_spte_atomic(self.m, CPU0, VM0, *where, old, new) == 0
            spte.dirty = False

    def promise(self, gfn: int, freed: bool) -> None:
        """Drop every SPTE that maps the gfn, and promise so to the host; `freed`: it frees the frame."""
        for page in PAGES:
            for table in self.all_tables(page):
                spte = table.entries.get(table.index(page))
                if isinstance(spte, Spte) and spte.gfn == gfn:
                    self._zap_in(table, page)
        self.hypervisor.promise(CPU0, VM0, gfn, lib.PROMISE_NOTIFIER)
        self.model.promise(gfn)
        if freed:
            self.free(gfn)

    def free(self, gfn: int) -> None:
        """Free the frame, although KVM may still map it."""
        present = bool(lib.mm_present(self.m, VM0, Hva(gfn), Hva(gfn + 1)))
        self.hypervisor.free(CPU0, VM0, gfn)
        self.model.page(gfn).life += present

    def track(self, gfn: int, on: bool) -> None:
        assert lib.oracle_track_writes(self.m, CPU0, VM0, Gfn(gfn), on) == 0
        self.model.page(gfn).tracked = on

    def unlink(self, root: int, page: int) -> None:
        """Unlink the page's table of level 1; its SPTEs stay, and table caches may lead to it."""
        table, parent = self.table(root, page), self.table(root, page, 2)
        self._zap_in(parent, page)
        table.linked = False
        self.detached.append((page >> 9, table))

    def free_table(self, number: int) -> None:
        """Free a table that is unlinked, although table caches may lead to it."""
        if self.detached:
            region, table = self.detached.pop(number % len(self.detached))
            self._empty(region, table)
            lib.ept_table_free(self.m, CPU0, Hfn(table.hfn))
            table.freed = True

    def _empty(self, region: int, table: Table) -> None:
        for page in PAGES:
            if page >> 9 == region:
                self._zap_in(table, page)

    def walk_freed(self, root: int, page: int, cpu: int, vcpu: int, kind: int) -> None:
        """Free a table that is linked, access a page of it, and unlink it."""
        table, parent = self.table(root, page), self.table(root, page, 2)
        self._empty(page >> 9, table)
        lib.ept_table_free(self.m, CPU0, Hfn(table.hfn))
        table.freed = True
        self.access(cpu, vcpu, page, kind)
        self._zap_in(parent, page)

    # -- flushes

    def invvpid_single(self, cpu: int, vcpu: int) -> None:
        if vpid := self.state[vcpu].vpid:
            lib.flush_invvpid_single(self.m, CpuId(cpu), VM0, Vpid(vpid), lib.REASON_GUEST)
            self.model.cpus[cpu].drop_vpid(vpid)

    def invvpid_retain_globals(self, cpu: int, vcpu: int) -> None:
        if vpid := self.state[vcpu].vpid:
            assert (
                lib.flush_invvpid_retain_globals(self.m, CpuId(cpu), VM0, Vpid(vpid), lib.REASON_GUEST) == 0
            )
            self.model.cpus[cpu].drop_vpid(vpid, retain_globals=True)

    def invvpid_address(self, cpu: int, vcpu: int, page: int) -> None:
        if vpid := self.state[vcpu].vpid:
            linear = LinearPage(page)
            lib.flush_invvpid_address(self.m, CpuId(cpu), VM0, Vpid(vpid), linear, lib.REASON_GUEST)
            self.model.cpus[cpu].drop_page(vpid, None, page)

    def invvpid_all(self, cpu: int) -> None:
        lib.flush_invvpid_all(self.m, CpuId(cpu), VM0, lib.REASON_GUEST)
        self.model.cpus[cpu].drop_all()

    def invept_global(self, cpu: int) -> None:
        """INVEPT drops no linear mapping."""
        lib.flush_invept_global(self.m, CpuId(cpu), VM0, lib.REASON_GUEST)

    # -- the guest

    def access(self, cpu: int, vcpu: int, page: int, kind: int, supervisor: bool = False) -> None:
        number, this, gva = CpuId(cpu), self.vcpus[vcpu], Gva(page << 12 | 8)
        self.hypervisor.enter(number, this)
        if supervisor:
            op = {"kind": kind, "linear": gva, "flags": lib.GUEST_OP_SUPERVISOR}
            assert lib.guest_set_program(self.m, this, ffi.new("struct guest_op[]", [op]), 1) == 0
            reason, end = lib.guest_run(self.m, number, this, 4, self.hypervisor.exit), lib.EXIT_PROGRAM_END
        else:
            reason = lib.guest_access(self.m, number, this, gva, AccessKind(kind), self.hypervisor.exit)
            end = lib.EXIT_PREEMPTION_TIMER
        access = Access(self.model.cpus[cpu], self.state[vcpu], page, kind, supervisor)
        error = self.model.access(access)
        if error is None:
            assert reason == end
        else:
            assert (reason, self.hypervisor.exit.error_code) == (lib.EXIT_EXCEPTION, error)
            assert self.hypervisor.exit.linear == page << 12 | 8
            assert self.hypervisor.exit.access == kind
        self.seen["done" if error is None else f"error {error}"] += 1

    def sweep(self, cpu: int, vcpu: int, root: int, pcid: int, kinds: Collection[int]) -> None:
        """Access one page after the other, so that all but the first find their table in the cache."""
        self.load(vcpu, root, pcid)
        for page, kind in zip(PAGES, kinds, strict=False):
            self.access(cpu, vcpu, page, kind)

    def map_all(self, root: int) -> None:
        for page in PAGES:
            self.set_spte(root, page, MAPPED, False)
        for first in HUGE:
            self.set_huge(root, first, MAPPED, False)

    def skip(self, vcpu: int) -> None:
        """User space emulates the access that faulted last."""
        if self.state[vcpu].faulted is not None:
            lib.guest_skip(self.m, self.vcpus[vcpu])
            self.state[vcpu].skip = self.state[vcpu].faulted

    def speculate(self, cpu: int, vcpu: int, page: int) -> None:
        number, this = CpuId(cpu), self.vcpus[vcpu]
        self.hypervisor.enter(number, this)
        assert lib.guest_enter(self.m, number, this, 1, self.hypervisor.exit) == 0
        new = lib.guest_speculate(self.m, number, Gva(page << 12))
        assert lib.guest_leave(self.m, number, lib.EXIT_PREEMPTION_TIMER) == lib.EXIT_PREEMPTION_TIMER
        access = Access(self.model.cpus[cpu], self.state[vcpu], page, speculative=True)
        assert bool(new) == self.model.speculate(access)

    # -- comparison

    def compare(self) -> None:
        for cpu in range(len(self.model.cpus)):
            self.compare_translations(cpu)
            self.compare_caches(cpu)
        for root in range(ROOTS):
            self.compare_flags(self.roots[root], 0)
        counts = ffi.new("uint64_t[]", lib.VIOLATIONS)
        lib.oracle_counts(self.m, counts)
        missed = int(counts[lib.VIOLATION_MISSED_GUEST_WRITE])
        self.compare_violations(sum(counts), missed)
        assert self.hypervisor.count(lib.COUNT_STALE_WALKS) == self.model.stale_walks

    def compare_violations(self, found: int, missed: int) -> None:
        least, most = self.model.missed_least, self.model.missed_most
        assert self.model.violations + least <= found <= self.model.violations + most
        assert missed >= least

    def compare_translations(self, cpu: int) -> None:
        entries = ffi.new("struct tlb_entry[]", DUMP_MAX)
        n = lib.tlb_dump(lib.cpu_tlb(self.m, CpuId(cpu)), entries, DUMP_MAX)
        found = sorted(
            (
                *(e.kind, e.vpid, -1 if getattr(e, "global") else e.pcid, e.size, e.page, e.hfn, e.gfn),
                *(e.right[kind] != lib.RIGHT_NONE for kind in range(3)),
                not e.supervisor,
            )
            for e in entries[0:n]
        )
        assert found == sorted(
            (
                *(lib.KIND_LINEAR, e.vpid, -1 if e.spte.global_ else e.pcid),
                *(e.size, e.page, e.spte.hfn, e.spte.gfn),
                *(True, e.write, e.spte.permits(EXECUTE, True), e.spte.user),
            )
            for e in self.model.cpus[cpu].entries
        )

    def compare_caches(self, cpu: int) -> None:
        entries = ffi.new("struct psc_entry[]", DUMP_MAX)
        n = lib.psc_dump(lib.cpu_tlb(self.m, CpuId(cpu)), entries, DUMP_MAX)
        found = {(e.vpid, e.pcid, e.level, e.page >> 9 * e.level): e.hfn for e in entries[0:n]}
        assert found == {key: table.hfn for key, (table, _) in self.model.cpus[cpu].caches.items()}

    def compare_flags(self, table: Table, page: int) -> None:
        """Compare A, D, frame and gfn of all leafs below a table; page: the first one that the table maps."""
        for index, found in table.entries.items():
            at = page + (index << 9 * (table.level - 1))
            if isinstance(found, Table):
                self.compare_flags(found, at)
            elif isinstance(found, Spte):
                word = self.word(table, at)
                assert bool(word & lib.SPTE_ACCESSED) == found.accessed
                assert bool(word & lib.SPTE_DIRTY) == found.dirty
                assert word >> lib.SPTE_HFN_SHIFT & 0xFFFFFF == found.hfn
                assert lib.kvm_mmu_page_get_gfn(self.m, Hfn(table.hfn), SpteIndex(index)) == found.gfn
