"""Bugs of zaps and yields by name: caught as the registry says, and their base policies are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES, PREEMPTIBLE
from emulator.kvm.mmu.mmu import kvm_mmu_recover_huge_pages, kvm_mmu_zap_all_fast, kvm_zap_gfn_range
from emulator.kvm.mmu.spte import root_to_sp
from emulator.kvm.mmu.tdp_map import tdp_entry
from emulator.kvm.structs import Kvm, KvmMemorySlot
from emulator.kvm.virt.kvm_main import kvm_set_memory_region, kvm_vm_ioctl_get_dirty_log
from emulator.machine.runtime import Cpu
from emulator.policy import MUTANTS, Policy, preset
from native import ffi, lib
from native.types import Gfn, Hva, Level
from tests.emulator.kvm.rig import GFNS, SLOT, Guest, Rig

Scenario = Callable[[Rig, Policy], dict[str, int]]


@contextmanager
def at_each(rig: Rig, cpu: Cpu, kind: str, action: Callable[[int], None]) -> Iterator[None]:
    """action(n) at that CPU's nth point of this kind, from 1; not for points inside of it."""
    n = 0
    inside = False

    def hook(at: Cpu, what: str, obj: object, access: str) -> None:
        nonlocal n, inside
        if at is cpu and what == kind and not inside:
            n += 1
            inside = True
            action(n)
            inside = False

    rig.machine.install(hook)
    try:
        yield
    finally:
        rig.machine.install(None)


def unmap_by(rig: Rig, cpu: Cpu, kvm: Kvm, start: int, end: int) -> None:
    """Rig.unmap on another CPU."""
    host, rig.host = rig.host, cpu
    try:
        rig.unmap(kvm, start, end)
    finally:
        rig.host = host


def present(rig: Rig, guest: Guest, gfn: int) -> bool:
    root = root_to_sp(guest.vcpu.mmu.root)
    assert root is not None
    return bool(tdp_entry(rig.host, root, Gfn(gfn), Level(1)).spte & 7)


def two_roots(rig: Rig, policy: Policy) -> tuple[Kvm, Guest, Guest]:
    """Two vCPUs on roots of their own; the first one's is the later one, which walks see first."""
    kvm = rig.vm(policy, chunk=32, resched_chunks=1)
    first, second = rig.guest(kvm), rig.guest(kvm)
    second.vcpu.root_mmu.root_role = replace(second.vcpu.root_mmu.root_role, level=Level(5))
    second.write(1, 3000)
    first.write(0, GFNS - 1)
    assert len(kvm.tdp_mmu_roots) == 2
    assert kvm.tdp_mmu_roots[0] is root_to_sp(first.vcpu.mmu.root)
    return kvm, first, second


def a_later_root_yields(rig: Rig, policy: Policy) -> dict[str, int]:
    """The host takes a page that a zap in the middle of its work has unmapped, but not flushed."""
    kvm, guest, _ = two_roots(rig, policy)
    taken: list[int] = []

    def take(n: int) -> None:
        if not taken and not present(rig, guest, GFNS - 1):
            taken.append(n)
            unmap_by(rig, rig.other, kvm, GFNS - 1, GFNS)
            guest.read(0, GFNS - 1)

    with at_each(rig, rig.host, "mmu_lock", take), rig.counting(kvm) as counts:
        kvm_zap_gfn_range(rig.host, kvm, Gfn(0), Gfn(GFNS))
    assert taken
    assert counts["yields"] > 10
    return rig.violations()


def a_later_root_needs_no_flush(rig: Rig, policy: Policy) -> dict[str, int]:
    kvm, guest, _ = two_roots(rig, policy)
    rig.unmap(kvm, GFNS - 1, GFNS)
    guest.read(0, GFNS - 1)
    return rig.violations()


def logged_huge_page(rig: Rig, policy: Policy) -> tuple[Kvm, Guest, Guest]:
    """A huge page that dirty logging has mapped by 4K pages, of which 1024 is; two vCPUs know the table."""
    kvm = rig.vm(policy, chunk=32, resched_chunks=1)
    guest, walker = rig.guest(kvm), rig.guest(kvm)
    guest.write(0, 1024)
    rig.collapse(kvm, 1024)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)
    walker.read(1, 1024)
    guest.read(0, 1024)
    return kvm, guest, walker


def end_logging(rig: Rig, kvm: Kvm) -> None:
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0))


def pages_recovered(rig: Rig, policy: Policy) -> dict[str, int]:
    kvm, _, walker = logged_huge_page(rig, policy)
    end_logging(rig, kvm)
    rig.rcu()
    walker.read(1, 1025)
    return rig.violations()


def table_freed_while_recovered(rig: Rig, policy: Policy) -> dict[str, int]:
    """In a yield a fault replaces the table that the walk has found, and RCU frees it."""
    kvm, guest, _ = logged_huge_page(rig, policy)
    replaced: list[int] = []

    def replace_table(n: int) -> None:
        if n > 2 and not replaced:
            replaced.append(n)
            guest.read(0, 1030)
            rig.other.check(lib.rcu_barrier(rig.machine.m, rig.other.id))

    # Points 1 and 2: the lock is taken, and given up in the first yield, before the table is found.
    with at_each(rig, rig.host, "mmu_lock", replace_table):
        end_logging(rig, kvm)
    assert replaced
    return rig.violations()


def spte_where_the_zap_yields(rig: Rig, policy: Policy) -> dict[str, int]:
    kvm = rig.vm(policy, chunk=32, resched_chunks=1)
    guest = rig.guest(kvm)
    guest.write(0, 32)
    with rig.counting(kvm) as counts:
        rig.unmap(kvm, 0, 128)
    assert counts["yields"] == 3
    guest.read(0, 32)
    return rig.violations()


def zap_then_notifier(rig: Rig, policy: Policy) -> dict[str, int]:
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    guest.write(0, 5)
    guest.write(0, 600)
    kvm_zap_gfn_range(rig.host, kvm, Gfn(0), Gfn(1024))
    guest.read(0, 600)
    rig.unmap(kvm, 0, 64)
    guest.read(0, 5)
    return rig.violations()


def root_freed_under_a_notifier(rig: Rig, policy: Policy) -> dict[str, int]:
    """While a notifier yields, all roots are zapped, and the vCPU goes on on another one."""
    kvm = rig.vm(policy, chunk=32, resched_chunks=1)
    guest = rig.guest(kvm)
    guest.write(0, 5)

    def zap_all(n: int) -> None:
        # After the lock's first point the walk is in its root.
        if n == 2:
            with kvm.slots_lock.held(rig.other):
                kvm_mmu_zap_all_fast(rig.other, kvm)
            guest.write(0, GFNS - 1)
            rig.other.check(lib.rcu_barrier(rig.machine.m, rig.other.id))

    with at_each(rig, rig.host, "mmu_lock", zap_all):
        rig.unmap(kvm, 0, 128)
    return rig.violations()


def refilled_before_the_zap(rig: Rig, policy: Policy) -> dict[str, int]:
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    guest.write(0, 5)

    def refill(n: int) -> None:
        guest.read(0, 5)

    with at_each(rig, rig.host, "sptes", refill):
        rig.unmap(kvm, 0, 64)
    guest.read(0, 5)
    return rig.violations()


def fault_meets_frozen(rig: Rig, policy: Policy) -> dict[str, int]:
    """A fault between the flush of a frozen link and its end, which brings a huge page."""
    kvm, guest, _ = logged_huge_page(rig, policy)

    def fault(n: int) -> None:
        if n == 2:  # 1: the link is frozen, 2: it is emptied
            guest.records[0] = lib.ACCESS_READ << 62 | 1030 << 12
            for _ in range(20):
                if guest.resume(0) is not PREEMPTIBLE:
                    break

    with at_each(rig, rig.host, "spte", fault):
        end_logging(rig, kvm)
    rig.unmap(kvm, 1024, 1536)
    guest.read(0, 1030)
    return rig.violations()


def rights_left(rig: Rig, kvm: Kvm, gfn: int) -> int:
    return int(lib.oracle_right(rig.machine.m, kvm.id, Gfn(gfn), ffi.new("uint32_t *"))) & 3


def fault_into_a_removed_table(rig: Rig, policy: Policy) -> tuple[int, dict[str, int]]:
    """The table goes between a fault's look at the SPTE and its change of it.  Returns rights that outlive a
    notifier, and violations."""
    kvm, guest, _ = logged_huge_page(rig, policy)
    unlogged = KvmMemorySlot(SLOT, 0, Gfn(0), GFNS, Hva(0))

    def recover(n: int) -> None:
        if n == 1:
            kvm_mmu_recover_huge_pages(rig.host, kvm, unlogged)

    with at_each(rig, rig.machine.cpus[0], "spte", recover):
        guest.read(0, 1030)
    rig.rcu()
    rig.unmap(kvm, 1024, 1536)
    left = rights_left(rig, kvm, 1030)
    guest.read(0, 1030)
    return left, rig.violations()


def log_of_two_words(rig: Rig, policy: Policy) -> dict[str, int]:
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)
    guest.write(0, 5)
    guest.write(0, 100)

    def write_again(n: int) -> None:
        """A pCPU that has flushed fills again, until the page's W is gone."""
        if n == 4:  # each word is looked at and then cleared
            guest.write(0, 100)

    with at_each(rig, rig.host, "dirty_bitmap", write_again):
        words = kvm_vm_ioctl_get_dirty_log(rig.host, kvm, SLOT)
    assert words[:2] == [1 << 5, 1 << 36]
    guest.write(0, 100)
    return rig.violations()


def table_freed_as_the_zap_leaves_rcu(rig: Rig, policy: Policy) -> dict[str, int]:
    kvm = rig.vm(policy)
    guest, walker = rig.guest(kvm), rig.guest(kvm)
    guest.write(0, 1024)
    walker.read(1, 1024)

    def free_and_walk(n: int) -> None:
        rig.other.check(lib.rcu_barrier(rig.machine.m, rig.other.id))
        walker.read(1, 1025)

    with at_each(rig, rig.host, "rcu", free_and_walk):
        rig.unmap(kvm, 1024, 1536)
    return rig.violations()


CAUGHT: dict[str, Scenario] = {
    "yield-forgets-flush": a_later_root_yields,
    "later-root-forgets-flush": a_later_root_needs_no_flush,
    "recovery-forgets-flush": pages_recovered,
    "recovery-uses-old-iterator": table_freed_while_recovered,
    "iterator-skips-spte": spte_where_the_zap_yields,
    "zap-leaves-flush-to-next": zap_then_notifier,
    "notifier-without-reference": root_freed_under_a_notifier,
    "unlock-before-flush": table_freed_as_the_zap_leaves_rcu,
    "flush-before-zap": refilled_before_the_zap,
    "map-over-frozen": fault_meets_frozen,
    "log-flush-before-protect": log_of_two_words,
    "list-flush-after-rcu": table_freed_as_the_zap_leaves_rcu,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUGHT)
def test_caught_as_said(rig: Rig, name: str) -> None:
    assert set(CAUGHT[name](rig, preset(f"mutant:{name}"))) >= set(MUTANTS[name].expected)


@pytest.mark.parametrize("name", CAUGHT)
def test_the_base_is_not(rig: Rig, name: str) -> None:
    assert CAUGHT[name](rig, preset(MUTANTS[name].base)) == {}


def test_a_superfluous_flush_costs_only_itself(rig: Rig) -> None:
    """flush-repeated-after-yield"""

    def flushes(policy: Policy) -> int:
        kvm, guest, _ = two_roots(rig, policy)
        with rig.counting(kvm) as counts:
            kvm_zap_gfn_range(rig.host, kvm, Gfn(0), Gfn(GFNS))
        guest.read(0, GFNS - 1)
        rig.destroy(kvm)
        return counts["remote_tlb_flush_requests"]

    assert flushes(preset("mutant:flush-repeated-after-yield")) == flushes(preset("linux-7.3")) + 1
    assert rig.violations() == {}


def test_a_removed_table_without_freezing_leaks(rig: Rig) -> None:
    """P14: a right that no zap ends any more, but no way to use it."""
    assert MUTANTS["children-not-frozen"].cost_only
    left, violations = fault_into_a_removed_table(rig, preset("mutant:children-not-frozen"))
    assert left
    assert violations == {}


def test_a_removed_table_leaks_nothing(rig: Rig) -> None:
    assert fault_into_a_removed_table(rig, preset("linux-7.3")) == (0, {})
