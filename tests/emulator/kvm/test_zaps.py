"""Removed tables: the flushes of each way, that none frees a table that a CPU may walk, and yields."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES
from emulator.kvm.mmu.mmu import kvm_mmu_zap_all_fast, kvm_zap_gfn_range
from emulator.kvm.mmu.spte import root_to_sp
from emulator.kvm.mmu.tdp_iter import TdpIter
from emulator.kvm.mmu.tdp_map import tdp_entry
from emulator.kvm.structs import Kvm, KvmParams
from emulator.kvm.virt.kvm_main import kvm_create_vm, kvm_set_memory_region
from emulator.machine.runtime import Cpu, rcu_read_lock
from emulator.policy import Policy, preset
from native import lib
from native.types import Gfn, Hva, Level, SpteIndex
from tests.emulator.kvm.rig import SLOT, Guest, Rig

GIB = 1 << 18  # pages
ZAPS = ("rcu-proxy", "disconnected-list", "flush-per-table")
# Pages of five page tables below one 1G entry.
SPREAD = (0, 512, 1024, 5000, GIB - 1)


def big_vm(rig: Rig, policy: Policy, chunk: int = 32, resched_chunks: int = 0) -> Kvm:
    """A VM of a little more than 1 GiB."""
    params = KvmParams(fault_around=0, slice_accesses=1, chunk=chunk, resched_chunks=resched_chunks)
    kvm = kvm_create_vm(rig.host, GIB + 512, policy, params)
    rig.vms.append(kvm)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GIB + 512, Hva(0))
    return kvm


def spread(rig: Rig, kvm: Kvm) -> Guest:
    guest = rig.guest(kvm)
    for gfn in SPREAD:
        guest.write(0, gfn)
    return guest


def tables_too(zap: str, **answers: str) -> Policy:
    return Policy("test", zap_scope="leafs-and-tables", zap=zap, **answers)


@contextmanager
def hooked(rig: Rig, cpu: Cpu, kind: str, action: Callable[[], None]) -> Iterator[None]:
    """Do `action` each time that CPU passes a point of this kind."""

    def hook(at: Cpu, what: str, obj: object, access: str) -> None:
        if at is cpu and what == kind:
            action()

    rig.machine.install(hook)
    try:
        yield
    finally:
        rig.machine.install(None)


@pytest.mark.parametrize(
    ("zap", "flushes"), [("rcu-proxy", 1), ("disconnected-list", 1), ("flush-per-table", 7)]
)
def test_flushes_of_a_range_zap(rig: Rig, zap: str, flushes: int) -> None:
    """One 1G entry goes, with its table and the five below that; to 5.17 the zap itself flushed, too."""
    kvm = big_vm(rig, tables_too(zap))
    guest = spread(rig, kvm)
    freed = rig.counter(lib.COUNT_TABLES_FREED)
    with rig.counting(kvm) as counts:
        kvm_zap_gfn_range(rig.host, kvm, Gfn(0), Gfn(GIB))
    assert counts["remote_tlb_flush_requests"] == flushes
    rig.rcu()
    assert rig.counter(lib.COUNT_TABLES_FREED) - freed == 6
    assert [guest.read(0, gfn) for gfn in SPREAD]
    assert rig.violations() == {}


def test_only_tables_wholly_in_the_range_go(rig: Rig) -> None:
    """One page less: the 1G entry stays, the 2M entries go one by one, the last table loses its leafs."""
    kvm = big_vm(rig, tables_too("flush-per-table"))
    spread(rig, kvm)
    freed = rig.counter(lib.COUNT_TABLES_FREED)
    with rig.counting(kvm) as counts:
        kvm_zap_gfn_range(rig.host, kvm, Gfn(0), Gfn(GIB - 1))
    rig.rcu()
    assert rig.counter(lib.COUNT_TABLES_FREED) - freed == 4
    assert counts["remote_tlb_flush_requests"] == 4 + 1


def test_leafs_alone_leave_the_tables(rig: Rig) -> None:
    kvm = big_vm(rig, Policy("test", zap="flush-per-table"))
    spread(rig, kvm)
    freed = rig.counter(lib.COUNT_TABLES_FREED)
    with rig.counting(kvm) as counts:
        kvm_zap_gfn_range(rig.host, kvm, Gfn(0), Gfn(GIB))
    rig.rcu()
    assert rig.counter(lib.COUNT_TABLES_FREED) == freed
    assert counts["remote_tlb_flush_requests"] == 1


# --- tables that a CPU may walk ----------------------------------------------------------------------------


def walk_when_rcu_is_left(rig: Rig, policy: Policy, zap: Callable[[Kvm, Guest], None]) -> dict[str, int]:
    """Whenever the zapping thread leaves RCU, all callbacks run, and a guest walks from cached pointers."""
    kvm = big_vm(rig, policy)
    guest, walker = rig.guest(kvm), rig.guest(kvm)
    guest.write(0, 1024)
    walker.read(1, 1024)
    freed = []

    def free_and_walk() -> None:
        before = rig.counter(lib.COUNT_TABLES_FREED)
        rig.other.check(lib.rcu_barrier(rig.machine.m, rig.other.id))
        freed.append(rig.counter(lib.COUNT_TABLES_FREED) - before)
        walker.read(1, 1025)

    with hooked(rig, rig.host, "rcu", free_and_walk):
        zap(kvm, guest)
    assert freed
    rig.rcu()
    walker.read(1, 1026)
    return rig.violations()


def range_zap(kvm: Kvm, guest: Guest) -> None:
    kvm_zap_gfn_range(guest.rig.host, kvm, Gfn(0), Gfn(2048))


@pytest.mark.parametrize("order", ["flush-then-unlock", "unlock-then-flush"])
@pytest.mark.parametrize("zap", ZAPS)
def test_only_rcu_as_a_proxy_needs_the_flush_inside_rcu(rig: Rig, zap: str, order: str) -> None:
    violations = walk_when_rcu_is_left(rig, tables_too(zap, zap_yield=order), range_zap)
    wrong = zap == "rcu-proxy" and order == "unlock-then-flush"
    assert set(violations) == ({"walk-after-free"} if wrong else set())


@pytest.mark.parametrize("name", ["linux-7.3", "linux-6.12", *(f"zap={zap}" for zap in ZAPS)])
def test_roots_that_nobody_uses(rig: Rig, name: str) -> None:
    """Every pass over an invalidated root; the guest goes on on a new one."""
    policy = Policy("test", zap=name[4:], zap_root="root") if name.startswith("zap=") else preset(name)
    kvm = big_vm(rig, policy)
    guest = spread(rig, kvm)
    with kvm.slots_lock.held(rig.host):
        kvm_mmu_zap_all_fast(rig.host, kvm)
    guest.read(0, 0)
    rig.rcu()
    for gfn in SPREAD:
        guest.write(0, gfn)
    assert rig.violations() == {}


@pytest.mark.parametrize(
    ("zap", "flushes"), [("rcu-proxy", 0), ("disconnected-list", 1), ("flush-per-table", 8)]
)
def test_flushes_of_a_root_zap(rig: Rig, zap: str, flushes: int) -> None:
    """Before 5.18, under mmu_lock for read, a zapped table was flushed for while its link was frozen; below
    it each of seven tables."""
    kvm = big_vm(rig, Policy("test", zap=zap, zap_root="root"))
    spread(rig, kvm)
    with rig.counting(kvm) as counts, kvm.slots_lock.held(rig.host):
        kvm_mmu_zap_all_fast(rig.host, kvm)
    assert counts.get("remote_tlb_flush_requests", 0) == flushes


@pytest.mark.parametrize(("answer", "steps"), [("4k-2m-1g-root", 5 + 5 + 1 + 1), ("1g-root", 2), ("root", 1)])
def test_passes_over_a_root(rig: Rig, answer: str, steps: int) -> None:
    """A pass takes the SPTEs of its level, with all that is below."""
    kvm = big_vm(rig, Policy("test", zap_root=answer), chunk=1 << 20)
    spread(rig, kvm)
    seen = []

    def changed() -> None:
        zapped = rig.counter(lib.COUNT_SPTES_ZAPPED)
        seen.append(zapped)

    freed = rig.counter(lib.COUNT_TABLES_FREED)
    with hooked(rig, rig.host, "sptes", changed), kvm.slots_lock.held(rig.host):
        kvm_mmu_zap_all_fast(rig.host, kvm)
    rig.rcu()
    assert rig.counter(lib.COUNT_TABLES_FREED) - freed == 7
    # A step stops behind each table; leafs need none of their own in a chunk that takes all of them.
    passes = answer.count("-") + 1
    tables = steps - 5 if answer == "4k-2m-1g-root" else steps
    assert len(seen) == tables + passes


# --- huge pages ---------------------------------------------------------------------------------------------


def logged_huge_page(rig: Rig, policy: Policy) -> tuple[Kvm, Guest]:
    """A huge page that dirty logging has split."""
    kvm = big_vm(rig, policy)
    guest = rig.guest(kvm)
    guest.write(0, 1024)
    rig.collapse(kvm, 1024)
    guest.write(0, 1024)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GIB + 512, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)
    guest.write(0, 1024)
    return kvm, guest


def end_logging(rig: Rig, kvm: Kvm) -> None:
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GIB + 512, Hva(0))


@pytest.mark.parametrize("order", ["flush-then-unlock", "unlock-then-flush"])
@pytest.mark.parametrize("zap", ZAPS)
def test_huge_pages_come_back(rig: Rig, zap: str, order: str) -> None:
    kvm, _ = logged_huge_page(rig, Policy("test", zap=zap, zap_yield=order))
    walker = rig.guest(kvm)
    walker.read(1, 1024)

    def free_and_walk() -> None:
        rig.other.check(lib.rcu_barrier(rig.machine.m, rig.other.id))
        walker.read(1, 1025)

    with hooked(rig, rig.host, "rcu", free_and_walk), rig.counting(kvm) as counts:
        end_logging(rig, kvm)
    assert counts["remote_tlb_flush_requests"] == 1
    wrong = zap == "rcu-proxy" and order == "unlock-then-flush"
    assert set(rig.violations()) == ({"walk-after-free"} if wrong else set())


@pytest.mark.parametrize("replace", ["flush", "none"])
@pytest.mark.parametrize("zap", ZAPS)
def test_a_leaf_replaces_a_table(rig: Rig, zap: str, replace: str) -> None:
    """To 5.17, and with the list, which faults do not use, the table was flushed for when it was removed."""
    kvm = big_vm(rig, Policy("test", zap=zap, map_replace=replace, huge_recovery="zap-each"))
    guest, walker = rig.guest(kvm), rig.guest(kvm)
    guest.write(0, 1024)
    rig.collapse(kvm, 1024)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GIB + 512, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)
    walker.read(1, 1024)
    fired: list[int] = []

    def fault() -> None:
        if not fired:
            fired.append(1)
            guest.read(0, 1030)

    with rig.counting(kvm) as counts, hooked(rig, rig.host, "mmu_lock", fault):
        end_logging(rig, kvm)
    assert fired
    rig.rcu()
    walker.read(1, 1031)
    wrong = replace == "none" and zap == "rcu-proxy"
    assert counts.get("remote_tlb_flush_requests", 0) == (0 if wrong else 1)
    assert set(rig.violations()) == ({"walk-after-free"} if wrong else set())


# --- yields under contention --------------------------------------------------------------------------------


class Contender:
    """A thread that wants mmu_lock while another zaps, and records the state that it found when it got it."""

    def __init__(self, rig: Rig, kvm: Kvm) -> None:
        self.rig, self.kvm = rig, kvm
        self.seen: list[int] = []
        self.thread = threading.Thread(target=self.body)

    def body(self) -> None:
        cpu = self.rig.other
        with self.kvm.mmu_lock.write_lock(cpu):
            self.seen.append(self.rig.stats(self.kvm)["remote_tlb_flush_requests"])

    def start(self) -> None:
        """Returns when it waits."""
        self.thread.start()
        while not self.kvm.mmu_lock.needbreak(self.rig.host):
            pass


@pytest.mark.parametrize(
    ("zap", "at_yield", "in_all"),
    [("rcu-proxy", 1, 2), ("disconnected-list", 1, 2), ("flush-per-table", 2 + 1, 4 + 2)],
)
def test_a_zap_yields_to_whoever_wants_the_lock(rig: Rig, zap: str, at_yield: int, in_all: int) -> None:
    """Two tables of four are gone when a waiter comes; the owed flush comes before it gets the lock."""
    kvm = big_vm(rig, tables_too(zap))
    spread(rig, kvm)
    contender = Contender(rig, kvm)
    steps: list[int] = []

    def second_step() -> None:
        steps.append(1)
        if len(steps) == 2:
            contender.start()

    before = rig.stats(kvm)["remote_tlb_flush_requests"]
    with rig.counting(kvm) as counts, hooked(rig, rig.host, "sptes", second_step):
        kvm_zap_gfn_range(rig.host, kvm, Gfn(0), Gfn(GIB - 1))
    contender.thread.join()
    assert counts["yields"] == 1
    assert contender.seen == [before + at_yield]
    assert counts["remote_tlb_flush_requests"] == in_all
    rig.rcu()
    assert rig.violations() == {}


def test_the_list_survives_a_yield(rig: Rig) -> None:
    """Tables removed before the yield are given to RCU at the end, with the others."""
    kvm = big_vm(rig, tables_too("disconnected-list"), resched_chunks=1)
    spread(rig, kvm)
    freed = rig.counter(lib.COUNT_TABLES_FREED)
    at_yields: list[int] = []

    def yields() -> None:
        at_yields.append(_freed(rig) - freed)

    with rig.counting(kvm) as counts, hooked(rig, rig.host, "rcu", yields):
        kvm_zap_gfn_range(rig.host, kvm, Gfn(0), Gfn(GIB - 1))
    assert counts["yields"] >= 4
    assert set(at_yields[:-1]) == {0}
    assert at_yields[-1] == _freed(rig) - freed == 4


def test_giving_the_list_to_rcu_yields(rig: Rig) -> None:
    """After its flush, so none is needed; a thread that wanted the lock meanwhile finds that flush over."""
    kvm = big_vm(rig, tables_too("disconnected-list"), chunk=1 << 20)
    spread(rig, kvm)
    contender = Contender(rig, kvm)
    steps: list[int] = []

    def last_step() -> None:
        steps.append(1)
        if len(steps) == 5:  # behind the four tables
            contender.start()

    before = rig.stats(kvm)["remote_tlb_flush_requests"]
    with rig.counting(kvm) as counts, hooked(rig, rig.host, "sptes", last_step):
        kvm_zap_gfn_range(rig.host, kvm, Gfn(0), Gfn(GIB - 1))
    contender.thread.join()
    assert len(steps) == 5
    assert counts["yields"] == 1
    assert contender.seen == [before + 1]
    assert counts["remote_tlb_flush_requests"] == 1


def _freed(rig: Rig) -> int:
    rig.other.check(lib.rcu_barrier(rig.machine.m, rig.other.id))
    return rig.counter(lib.COUNT_TABLES_FREED)


def test_somebody_elses_frozen_entry_is_waited_for(rig: Rig) -> None:
    kvm = big_vm(rig, Policy())
    guest = spread(rig, kvm)
    root = root_to_sp(guest.vcpu.mmu.root)
    assert root is not None
    entry = tdp_entry(rig.host, root, Gfn(1), Level(1))
    m = rig.machine.m
    lib.tdp_mmu_set_spte(m, rig.host.id, kvm.id, entry.table, SpteIndex(1), Level(1), Gfn(1), lib.FROZEN_SPTE)
    waited: list[int] = []

    def owner_goes_on() -> None:
        # The first step of the removal stops at it, the second is after a nap.
        waited.append(1)
        if len(waited) == 2:
            lib.tdp_mmu_set_spte(m, rig.other.id, kvm.id, entry.table, SpteIndex(1), Level(1), Gfn(1), 0)

    kvm.policy = Policy("test", zap_root="1g-root")
    with hooked(rig, rig.host, "spte", owner_goes_on), kvm.slots_lock.held(rig.host):
        kvm_mmu_zap_all_fast(rig.host, kvm)
    assert len(waited) > 2
    guest.read(0, 0)
    assert rig.violations() == {}


def test_a_walk_outside_of_a_read_section_is_refused(rig: Rig) -> None:
    """As rcu_dereference() is, by a kernel with PROVE_RCU."""
    kvm = big_vm(rig, Policy())
    root = root_to_sp(spread(rig, kvm).vcpu.mmu.root)
    assert root is not None
    walk = TdpIter(root, lib.TDP_ZAP_LEAFS, Gfn(0), Gfn(1), shared=False)
    with kvm.mmu_lock.write_lock(rig.host):
        with pytest.raises(AssertionError, match="suspicious RCU usage"):
            walk.step(rig.host, kvm)
        with rcu_read_lock(rig.host):
            assert walk.step(rig.host, kvm)
