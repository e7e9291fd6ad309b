"""Steps of a kernel's compiled code on SPTEs: values, rights that they grant, bits that a store loses."""

from __future__ import annotations

import threading
from typing import Any

from cffi import FFI

from native import ffi, lib
from native.types import Custody, Gfn, Hfn, HostWritable, Hva, KernelSpteStep, Level, SpteIndex, WordIndex
from tests.native.memory_rig import (
    ACCESSED,
    CPU,
    CUSTODY_MASK,
    DIRTY,
    HUGE,
    HUGE_GFN,
    RCU_CPU,
    WRITABLE,
    Rig,
    index_of,
    map_huge,
    map_page,
)
from tests.support import VM0

GFN = Gfn(5)
LEAF = Level(1)


def change(rig: Rig, table: Hfn, gfn: Gfn, step: KernelSpteStep, value: int, old: int = 0) -> tuple[int, int]:
    """Return the result, and the SPTE that was replaced."""
    was = ffi.new("uint64_t *", old)
    result = lib.kernel_spte_change(
        rig.m, CPU, VM0, table, SpteIndex(index_of(gfn, LEAF)), LEAF, gfn, step, was, value
    )
    return int(result), int(was[0])


def test_each_step_replaces_the_spte_and_its_rights(rig: Rig) -> None:
    spte = map_page(rig, GFN)
    table, _, _ = rig.walk(GFN)
    protected = spte & ~WRITABLE
    assert change(rig, table, GFN, lib.KERNEL_FETCH_AND, ~WRITABLE & (1 << 64) - 1) == (0, spte)
    assert rig.right(GFN) == 1
    assert change(rig, table, GFN, lib.KERNEL_CMPXCHG, spte, old=0) == (lib.MACHINE_AGAIN, protected)
    assert rig.right(GFN) == 1
    assert change(rig, table, GFN, lib.KERNEL_CMPXCHG, spte, old=protected) == (0, protected)
    assert rig.right(GFN) == 3
    assert change(rig, table, GFN, lib.KERNEL_XCHG, lib.FROZEN_SPTE) == (0, spte)
    assert rig.right(GFN) == 0
    assert change(rig, table, GFN, lib.KERNEL_STORE, 0) == (0, lib.FROZEN_SPTE)
    assert change(rig, table, GFN, lib.KERNEL_STORE, spte) == (0, 0)
    assert rig.right(GFN) == 3
    kinds = [kind for kind, gfn, _ in rig.events() if gfn == GFN]
    assert kinds == [lib.EVENT_MAP, lib.EVENT_PROTECT, lib.EVENT_ZAP, lib.EVENT_MAP]


def test_an_spte_that_no_kernel_could_mean_is_refused(rig: Rig) -> None:
    spte = map_page(rig, GFN)
    table, _, _ = rig.walk(GFN)
    of_a_table = lib.make_spte(table, Custody(0), LEAF, True, HostWritable(True))
    for step in (lib.KERNEL_CMPXCHG, lib.KERNEL_XCHG, lib.KERNEL_STORE):
        assert change(rig, table, GFN, step, of_a_table, old=spte)[0] == lib.MACHINE_MISUSE
        assert "maps what is no guest frame" in rig.error()
    assert rig.walk(GFN)[2] == spte
    assert rig.right(GFN) == 3


def test_locked_steps_lose_no_flag_that_a_cpu_sets(rig: Rig) -> None:
    """Threads add and remove W; each sees all changes of the others, so both end as they began."""
    spte = map_page(rig, GFN) & ~(ACCESSED | DIRTY)
    table, _, _ = rig.walk(GFN)
    change(rig, table, GFN, lib.KERNEL_XCHG, spte)
    lost = []

    def exchange(mask: int) -> None:
        for _ in range(3000):
            was = ffi.new("uint64_t *")
            arguments = (rig.m, CPU, VM0, table, SpteIndex(index_of(GFN, LEAF)), LEAF, GFN)
            lib.kernel_spte_change(*arguments, lib.KERNEL_FETCH_AND, was, ~mask & (1 << 64) - 1)
            before = was[0] & ~mask
            while lib.kernel_spte_change(*arguments, lib.KERNEL_CMPXCHG, was, was[0] | mask):
                before = was[0]
            if before & mask:
                lost.append(before)

    threads = [threading.Thread(target=exchange, args=(bit,)) for bit in (ACCESSED, DIRTY)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not lost
    assert rig.walk(GFN)[2] == spte | ACCESSED | DIRTY


def test_a_store_loses_what_a_cpu_sets_meanwhile(rig: Rig) -> None:
    spte = map_page(rig, GFN) & ~DIRTY
    table, _, _ = rig.walk(GFN)
    change(rig, table, GFN, lib.KERNEL_XCHG, spte)
    seen = rig.walk(GFN)[2]
    change(rig, table, GFN, lib.KERNEL_XCHG, spte | DIRTY)
    assert change(rig, table, GFN, lib.KERNEL_STORE, seen & ~ACCESSED) == (0, spte | DIRTY)
    assert not rig.walk(GFN)[2] & DIRTY


def test_the_leafs_of_a_split_get_the_custody_of_their_frames(rig: Rig) -> None:
    huge = map_huge(rig)
    # Copies of the huge leaf's bits, as make_small_spte() makes them.
    table = rig.table()
    ours = rig.table()
    assert lib.tdp_mmu_fill_split_table(rig.m, CPU, ours, huge, Level(2)) == 0
    for index in range(512):
        small = (huge & ~HUGE) + (index << lib.SPTE_HFN_SHIFT)
        lib.frame_write(rig.m, table, WordIndex(index), small)
    lib.kernel_split_custody(rig.m, table, huge, Level(2))
    small_sptes = [lib.spte_read(rig.m, table, SpteIndex(index)) for index in range(512)]
    assert small_sptes == [lib.spte_read(rig.m, ours, SpteIndex(index)) for index in range(512)]
    first = lib.mm_fault(rig.m, CPU, VM0, Hva(HUGE_GFN), True, page := ffi.new("struct mm_page *"))
    assert first == 0
    assert (small_sptes[0] & CUSTODY_MASK) >> lib.SPTE_CUSTODY_SHIFT == page.tag


def test_a_function_of_the_kernel_runs_as_an_rcu_callback(rig: Rig) -> None:
    called = []
    other: Any = FFI()
    function = other.callback(
        "void(uint32_t, uint64_t)", lambda cpu, argument: called.append((cpu, argument))
    )
    lib.rcu_set_function(int(other.cast("uintptr_t", function)))
    assert lib.call_rcu(rig.m, CPU, lib.RCU_FUNCTION, 0x1234_5678_9ABC_DEF0) == 0
    assert not called
    assert lib.rcu_gp_begin(rig.m, RCU_CPU) == 1
    assert lib.rcu_gp_end(rig.m, RCU_CPU) == 1
    assert called == [(RCU_CPU, 0x1234_5678_9ABC_DEF0)]
