"""Zaps a 1 GiB range of 4K mappings: flushes, interrupts, yields and time, for each way to free its tables.

The range's 262144 leafs lie in 512 page tables below one entry of level 1G: 513 tables.  The mailing list's
batching thread of November 2021 says of a zap of such an entry that a flush per removed table makes "many
unnecessary TLB flushes when one would suffice"; the counts that this predicts are the references.

Two guests are in guest mode meanwhile, outside of the range.  The leafs map a few host frames over and over,
which spares memory and does not change the work of a zap per SPTE.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median

from bench.benchmark import Context
from bench.errors import BenchFailed
from bench.figures import Figure
from bench.machine import machine_fields
from emulator.job.emulation import SWITCH_INTERVAL
from emulator.kvm.kvm_host import SPTE_ENT_PER_PAGE
from emulator.kvm.mmu.mmu import kvm_mmu_zap_all_fast, kvm_zap_gfn_range
from emulator.kvm.mmu.structs import KvmMmuPage
from emulator.kvm.mmu.tdp_map import tdp_entry, tdp_mmu_link_sp
from emulator.kvm.structs import Kvm, KvmParams
from emulator.kvm.virt.kvm_main import kvm_create_vm, kvm_set_memory_region, kvm_vm_ioctl_create_vcpu
from emulator.kvm.x86 import vcpu_run
from emulator.machine.runtime import Cpu, Machine, MachineStopped, rcu_read_lock
from emulator.policy import Policy
from native import ffi, lib
from native.types import Gfn, Hfn, Hva, Level, SpteIndex

GIB = 1 << 18  # pages
GUEST_PAGES = 64
PCPUS = 2
_PATIENCE_SECONDS = 20.0
# Microseconds from the contending thread's release of mmu_lock to its next attempt to take it.
_PAUSE = 200

ZAPS = ("rcu-proxy", "disconnected-list", "flush-per-table")


@dataclass(slots=True)
class Cost:
    """Costs of a zap, one entry per repeat."""

    flushes: list[int] = field(default_factory=list)
    ipis: list[int] = field(default_factory=list)
    yields: list[int] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    lock_waits: list[float] = field(default_factory=list)  # milliseconds, the longest


class ZapMachine:
    """Two pCPUs in guest mode, an ioctl caller and, if `contended`, a thread that keeps taking mmu_lock."""

    def __init__(self, policy: Policy, tables: int, contended: bool) -> None:
        self.tables = tables
        self.machine = Machine(
            machine_fields(
                pcpus=PCPUS,
                housekeeping=3,
                vms=1,
                vcpus=PCPUS,
                root_frames=4,
                table_frames=4 * tables + 64,
                guest_frames=4 * SPTE_ENT_PER_PAGE,
            )
        )
        self.host, self.contender, self.rcu_cpu = self.machine.cpus[PCPUS:]
        self.threads: list[threading.Thread] = []
        self.longest_wait = 0.0
        for cpu in (self.host, self.contender):
            lib.cpu_online(cpu.m, cpu.id)
        self._thread(lambda: lib.rcu_thread(self.machine.m, self.rcu_cpu.id))
        self.kvm = self._vm(policy)
        for cpu in self.machine.cpus[:PCPUS]:
            self._guest(cpu)
        if contended:
            self._thread(self._contend)
        self._wait_for_guests()

    def _thread(self, body: object) -> None:
        assert callable(body)

        def run() -> None:
            with suppress(MachineStopped):
                body()

        thread = threading.Thread(target=run, daemon=True)
        self.threads.append(thread)
        thread.start()

    def _vm(self, policy: Policy) -> Kvm:
        params = KvmParams(fault_around=GUEST_PAGES, resched_chunks=0)
        kvm = kvm_create_vm(self.host, GIB + SPTE_ENT_PER_PAGE, policy, params)
        kvm_set_memory_region(self.host, kvm, 0, Gfn(0), GIB + SPTE_ENT_PER_PAGE, Hva(0))
        # The frames of the first 2 MiB back the whole range.
        self.hfns = ffi.new("uint32_t[]", SPTE_ENT_PER_PAGE)
        self.tags = ffi.new("uint32_t[]", SPTE_ENT_PER_PAGE)
        self.writable = ffi.new("uint32_t[]", SPTE_ENT_PER_PAGE)
        m = self.machine.m
        self.host.check(
            lib.mm_fault_range(
                m, self.host.id, kvm.id, Hva(0), SPTE_ENT_PER_PAGE, True, self.hfns, self.tags, self.writable
            )
        )
        return kvm

    def _guest(self, cpu: Cpu) -> None:
        """Create a vCPU for this pCPU.  It reads a few pages behind the range."""
        vcpu = kvm_vm_ioctl_create_vcpu(self.host, self.kvm)
        m, pages = self.machine.m, [GIB + page for page in range(GUEST_PAGES)]
        config = ffi.new(
            "struct guest_config *", {"first_gfn": 0, "end_gfn": GIB + SPTE_ENT_PER_PAGE, "seed": 1}
        )
        records = ffi.new("uint64_t[]", [page << 12 for page in pages])
        known = ffi.new("uint64_t[]", pages)
        self.host.check(lib.guest_configure(m, vcpu.id, config))
        self.host.check(lib.guest_add_process(m, vcpu.id, records, GUEST_PAGES, known, GUEST_PAGES))

        def body() -> None:
            keep = (records, known)
            lib.cpu_online(m, cpu.id)
            run = vcpu_run(vcpu)
            next(run)
            try:
                while keep and not self.machine.stopping:
                    run.send(cpu)
            finally:
                lib.cpu_offline(m, cpu.id)

        self._thread(body)

    def _contend(self) -> None:
        cpu = self.contender
        while not self.machine.stopping:
            start = time.perf_counter()
            with self.kvm.mmu_lock.write_lock(cpu):
                self.longest_wait = max(self.longest_wait, time.perf_counter() - start)
            cpu.check(lib.cpu_halt(cpu.m, cpu.id, _PAUSE))

    def _wait_for_guests(self) -> None:
        """Wait until each guest has used all of its pages.  From then on none faults, or needs mmu_lock."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        guests = self.machine.cpus[:PCPUS]
        while any(self._counter(cpu, lib.COUNT_ACCESSES) < 2 * GUEST_PAGES for cpu in guests):
            if time.monotonic() > deadline:
                raise BenchFailed("zap: the guests do not run")
            time.sleep(0.001)

    def _counter(self, cpu: Cpu, counter: int) -> int:
        values = ffi.new("uint64_t[]", lib.COUNTERS)
        lib.counters_read(self.machine.m, cpu.id, values)
        return int(values[counter])

    def fill(self) -> None:
        """Map 4K leafs in all of the range's tables."""
        cpu, kvm, (root,) = self.host, self.kvm, self.kvm.tdp_mmu_roots
        with kvm.mmu_lock.read_lock(cpu), rcu_read_lock(cpu):
            for gfn in range(0, self.tables * SPTE_ENT_PER_PAGE, SPTE_ENT_PER_PAGE):
                table = _leaf_table(cpu, kvm, root, gfn)
                mapped = lib.tdp_mmu_map_around(
                    cpu.m,
                    cpu.id,
                    kvm.id,
                    table,
                    SpteIndex(gfn % SPTE_ENT_PER_PAGE),
                    Gfn(gfn),
                    SPTE_ENT_PER_PAGE,
                    self.hfns,
                    self.tags,
                    self.writable,
                )
                if mapped < SPTE_ENT_PER_PAGE - 1:  # a page that was not zapped is there
                    raise BenchFailed(f"zap: {mapped} of {SPTE_ENT_PER_PAGE} pages were mapped")

    def zap(self, pages: int, cost: Cost) -> None:
        self._measure(lambda: kvm_zap_gfn_range(self.host, self.kvm, Gfn(0), Gfn(pages)), cost)

    def zap_root(self, cost: Cost) -> None:
        """Invalidate all roots and zap them while the guests go on with a new one."""

        def zap() -> None:
            with self.kvm.slots_lock.held(self.host):
                kvm_mmu_zap_all_fast(self.host, self.kvm)

        self._measure(zap, cost)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while len(self.kvm.tdp_mmu_roots) != 1 or self.kvm.tdp_mmu_roots[0].role.invalid:
            if time.monotonic() > deadline:
                raise BenchFailed("zap: the guests do not use the new root")
            time.sleep(0.001)

    def _measure(self, zap: Callable[[], None], cost: Cost) -> None:
        self.fill()
        before = self._counts()
        self.longest_wait = 0.0
        start = time.perf_counter()
        zap()
        cost.milliseconds.append((time.perf_counter() - start) * 1e3)
        flushes, yields, ipis = (now - then for now, then in zip(self._counts(), before, strict=True))
        cost.flushes.append(flushes)
        cost.yields.append(yields)
        cost.ipis.append(ipis)
        self.host.check(lib.rcu_barrier(self.machine.m, self.host.id))
        time.sleep(0.002)  # the contender, if it waits, gets the lock and notes how long it took
        cost.lock_waits.append(self.longest_wait * 1e3)

    def _counts(self) -> tuple[int, int, int]:
        """Return the remote flushes, the yields, and the IPIs of the zapping thread so far."""
        flushes = lib.vm_stat(self.machine.m, self.kvm.id, lib.STAT_REMOTE_TLB_FLUSH_REQUESTS)
        yields = lib.vm_stat(self.machine.m, self.kvm.id, lib.STAT_YIELDS)
        return int(flushes), int(yields), self._counter(self.host, lib.COUNT_IPIS_SENT)

    def close(self) -> None:
        self.machine.stop()
        for thread in self.threads:
            thread.join(_PATIENCE_SECONDS)
        if any(thread.is_alive() for thread in self.threads):
            raise BenchFailed("zap: a thread does not end")
        self.machine.destroy()


def _leaf_table(cpu: Cpu, kvm: Kvm, root: KvmMmuPage, gfn: int) -> Hfn:
    """Return the page table of this gfn; link it if it is missing."""
    while True:
        entry = tdp_entry(cpu, root, Gfn(gfn), Level(1))
        if entry.level == 1:
            return entry.table
        tdp_mmu_link_sp(cpu, kvm, entry)


@contextmanager
def zap_machine(policy: Policy, tables: int, contended: bool) -> Iterator[ZapMachine]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        machine = ZapMachine(policy, tables, contended)
        try:
            yield machine
        finally:
            machine.close()
    finally:
        sys.setswitchinterval(before)


@dataclass(frozen=True, slots=True)
class Range:
    """A range to zap.  `apart`: its tables are unlinked one by one, and the zap may yield in between."""

    name: str
    pages: int
    scope: str
    apart: bool

    def removed(self, tables: int) -> int:
        """Return the number of table pages that the zap removes."""
        if self.scope == "leafs":
            return 0
        return tables - (tables == SPTE_ENT_PER_PAGE) if self.apart else tables + 1


WHOLE = Range("1 GiB", GIB, "leafs-and-tables", apart=False)
SHORT = Range("1 GiB less a page", GIB - 1, "leafs-and-tables", apart=True)
LEAFS = Range("1 GiB, leafs only", GIB, "leafs", apart=True)


def zap_flushes(context: Context) -> Iterator[Figure]:
    for contended in (False, True):
        for what in (WHOLE, SHORT, LEAFS):
            yield from _compare(context, what, contended)
    yield from _passes(context)


def _compare(context: Context, what: Range, contended: bool) -> Iterator[Figure]:
    """Yield the figures of one range under each policy, or under the first if the zap removes no tables."""
    costs: dict[str, Cost] = {}
    with_whom = "contended" if contended else "alone"
    for zap in ZAPS if what.scope != "leafs" else ZAPS[:1]:
        context.say(f"zap of {what.name}, {with_whom}: {zap}")
        policy = Policy("bench", zap_scope=what.scope, zap=zap)
        costs[zap] = _measure(context, policy, what, contended)
    for zap, cost in costs.items():
        name = f"{what.name}, {with_whom}, {zap}"
        yield from _figures(name, what, context.sizes.zap_tables, zap, cost, costs["rcu-proxy"])


def _measure(context: Context, policy: Policy, what: Range, contended: bool) -> Cost:
    cost, warm = Cost(), Cost()
    with zap_machine(policy, context.sizes.zap_tables, contended) as machine:
        machine.zap(what.pages, warm)
        for _ in range(context.sizes.repeats):
            machine.zap(what.pages, cost)
    return cost


def _passes(context: Context) -> Iterator[Figure]:
    """Yield the longest wait for mmu_lock while a root with 1 GiB is zapped in passes (decision zap_root)."""
    policies = {answer: Policy("bench", zap_root=answer) for answer in ("root", "1g-root", "4k-2m-1g-root")}
    policies["root, flush-per-table"] = Policy("bench", zap_root="root", zap="flush-per-table")
    whole = Cost()
    for name, policy in policies.items():
        context.say(f"zap of a root: {name}")
        cost = Cost() if name != "root" else whole
        with zap_machine(policy, context.sizes.zap_tables, contended=True) as machine:
            machine.zap_root(Cost())
            for _ in range(context.sizes.repeats):
                machine.zap_root(cost)
        yield Figure(
            name=f"longest wait for mmu_lock: a root with 1 GiB, {name}",
            what=f"{median(cost.yields):g} yields, {median(cost.flushes):g} flushes, "
            f"{median(cost.milliseconds):.3g} ms in all",
            unit="ms",
            values=tuple(max(wait, 1e-6) for wait in cost.lock_waits),
            reference_name="in one pass over the root page",
            references=tuple(max(wait, 1e-6) for wait in whole.lock_waits),
            ratio_of="value/reference",
        )


def predicted(zap: str, removed: int, yields: int) -> int:
    """Return the most flushes of a zap: one per removed table with flush-per-table, one at each yield, and
    one at the end."""
    return (removed if zap == "flush-per-table" else 0) + yields + 1


def _figures(name: str, what: Range, tables: int, zap: str, cost: Cost, proxy: Cost) -> Iterator[Figure]:
    removed = what.removed(tables)
    per_table = f"{removed} tables + " if zap == "flush-per-table" else ""
    yields = f"{median(cost.yields):g} yields"
    wait = f"; longest wait for mmu_lock {median(cost.lock_waits):.3g} ms" if any(cost.lock_waits) else ""
    yield Figure(
        name=f"flushes: {name}",
        what=f"kvm_flush_remote_tlbs; {yields}{wait}",
        unit="flushes",
        values=tuple(cost.flushes),
        reference_name=f"expected: {per_table}yields ({median(cost.yields):g}) + 1",
        references=tuple(predicted(zap, removed, n) for n in cost.yields),
        ratio_of="value/reference",
        wanted="ratio <= 1",
    )
    yield Figure(
        name=f"IPIs: {name}",
        what="sent by the zapping thread; guests that are outside of guest mode get none",
        unit="IPIs",
        values=tuple(max(n, 0.5) for n in cost.ipis),
        reference_name=f"at most {PCPUS} per flush",
        references=tuple(PCPUS * n for n in cost.flushes),
        ratio_of="value/reference",
        wanted="ratio <= 1",
    )
    yield Figure(
        name=f"time: {name}",
        what=f"kvm_zap_gfn_range, flushes and {yields} included{wait}",
        unit="ms",
        values=tuple(cost.milliseconds),
        reference_name="the same with rcu-proxy" if zap != "rcu-proxy" else "itself",
        references=tuple(proxy.milliseconds),
        ratio_of="value/reference",
    )
    if any(cost.lock_waits):
        yield Figure(
            name=f"longest wait for mmu_lock: {name}",
            what=f"of a thread that wants it {_PAUSE} us after it had it",
            unit="ms",
            values=tuple(max(wait, 1e-6) for wait in cost.lock_waits),
            reference_name="the whole zap",
            references=tuple(cost.milliseconds),
            ratio_of="value/reference",
        )
