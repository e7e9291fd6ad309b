"""Liberties of hardware at any time: evict an entry, fetch a translation that no access needs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from native import ffi, lib
from native.types import CpuId, Gva, VcpuId
from tests.native.hypervisor import READ, WRITE, Hypervisor
from tests.native.tlb_model import Kind
from tests.native.tlb_pair import (
    EP4TAS,
    PAGES,
    PCIDS,
    SERVER,
    TINY,
    UNBOUNDED,
    VPIDS,
    Geometry,
    Pair,
    psc,
    translation,
)
from tests.support import CPU0, CPU1, VM0

A = 0x100


# --- evictions, against the rules


def evict(pair: Pair, n: int) -> None:
    held = lib.tlb_dump(pair.native, pair.dumped, len(pair.dumped))
    assert lib.tlb_evict(pair.native, n) == (n < held)
    if n < held:
        gone = translation(pair.dumped[n])
        del pair.model.live[gone.key]
        pair.model.superseded.clear()
        assert lib.tlb_dump(pair.native, pair.dumped, 0) == held - 1


def evict_psc(pair: Pair, n: int) -> None:
    held = lib.psc_dump(pair.native, pair.psc_dumped, len(pair.psc_dumped))
    assert lib.psc_evict(pair.native, n) == (n < held)
    if n < held:
        del pair.model.psc[psc(pair.psc_dumped[n]).key]


@pytest.mark.parametrize("geometry", [UNBOUNDED, SERVER, TINY], ids=["unbounded", "server", "tiny"])
def test_evictions_take_one_entry_and_leave_no_ghost(geometry: Geometry) -> None:
    for seed in range(40):
        r = random.Random(seed)
        pair = Pair(geometry)
        for _ in range(40):
            step = r.randrange(6)
            physical = r.random() < 0.3
            if step < 2:
                pair.insert(r.choice(PAGES), r.choice((0, 0, 1)), r.randrange(3), r.random() < 0.5, physical)
            elif step == 2:
                pair.insert_psc(r.choice(PAGES), r.randrange(1, 5), physical)
            elif step == 3:
                pair.switch(Kind(r.randrange(3)), r.choice(VPIDS), r.choice(PCIDS), r.choice(EP4TAS))
            elif step == 4:
                evict(pair, r.randrange(6))
            else:
                evict_psc(pair, r.randrange(6))
            pair.check()
            pair.lookup(r.choice(PAGES), physical)
        pair.close()


# --- speculation


@pytest.fixture(params=[0, 1], ids=["physical", "paging"])
def machine(request: pytest.FixtureRequest) -> Iterator[tuple[Hypervisor, VcpuId, int]]:
    """A guest that has accessed page A on pCPU 0; and its address."""
    paging = int(request.param)
    with Hypervisor(l2_entries=0, psc_entries=0) as h:
        vcpu = h.vcpu(h.vm(1024), 1, paging=paging, pcid=0, first_gfn=900, end_gfn=1024)
        h.process(vcpu, [], [A, A + 1])
        h.access(CPU0, vcpu, A << 12, WRITE)
        yield h, vcpu, A << 12


def speculate(h: Hypervisor, vcpu: VcpuId, linear: int, cpu: CpuId = CPU0) -> int:
    h.enter(cpu, vcpu)
    assert lib.guest_enter(h.m, cpu, vcpu, 1, h.exit) == 0
    filled = int(lib.guest_speculate(h.m, cpu, Gva(linear)))
    assert lib.guest_leave(h.m, cpu, lib.EXIT_PREEMPTION_TIMER) == lib.EXIT_PREEMPTION_TIMER
    return filled


def tlb_entries(h: Hypervisor, cpu: CpuId = CPU0) -> list[Any]:
    out = ffi.new("struct tlb_entry[]", 256)
    n = lib.tlb_dump(lib.cpu_tlb(h.m, cpu), out, 256)
    return [out[i] for i in range(n)]


def psc_entries(h: Hypervisor, cpu: CpuId = CPU0) -> int:
    return int(lib.psc_dump(lib.cpu_tlb(h.m, cpu), ffi.NULL, 0))


def gfn_of(h: Hypervisor, linear: int) -> int:
    return next(int(e.gfn) for e in tlb_entries(h) if e.page == linear >> 12)


def test_a_fill_makes_the_access_a_hit(machine: tuple[Hypervisor, VcpuId, int]) -> None:
    h, vcpu, linear = machine
    assert speculate(h, vcpu, linear) == 0, "it is cached"
    h.flush(VM0)
    assert tlb_entries(h) == []
    assert psc_entries(h) == 0
    assert speculate(h, vcpu, linear) == 1
    assert psc_entries(h) > 0
    assert h.count(lib.COUNT_SPECULATIVE) == 1
    misses, refills = h.count(lib.COUNT_L2_MISSES), h.count(lib.COUNT_REFILLS)
    h.access(CPU0, vcpu, linear, READ)
    assert (h.count(lib.COUNT_L2_MISSES), h.count(lib.COUNT_REFILLS)) == (misses, refills)


def test_what_would_fault_is_not_fetched_and_nothing_happens(machine: tuple[Hypervisor, VcpuId, int]) -> None:
    h, vcpu, linear = machine
    before = len(tlb_entries(h))
    assert speculate(h, vcpu, linear + 0x40000) == 0
    assert len(tlb_entries(h)) == before
    assert h.exit.reason == lib.EXIT_PREEMPTION_TIMER
    assert h.violations() == {}


def test_a_translation_fetched_before_the_zap_is_stale_after_it(
    machine: tuple[Hypervisor, VcpuId, int],
) -> None:
    """On pCPU 1, where the guest never touched the page: a flush that leaves pCPU 1 out is too little."""
    h, vcpu, linear = machine
    gfn = gfn_of(h, linear)
    assert speculate(h, vcpu, linear, cpu=CPU1) == 1
    h.zap(CPU0, VM0, gfn)
    lib.flush_invept_global(h.m, CPU0, VM0, lib.REASON_REMOTE_ZAP)
    h.promise(CPU0, VM0, gfn, lib.PROMISE_ZAP_RANGE)
    assert h.violations() == {}, "presence is no use"
    h.access(CPU1, vcpu, linear, READ)
    # With paging the combined and the guest-physical mapping are both used.
    assert set(h.violations()) == {"stale-after-revoke"}


def test_speculation_through_a_stale_entry_is_no_use_and_heals_nothing(
    machine: tuple[Hypervisor, VcpuId, int],
) -> None:
    h, vcpu, linear = machine
    gfn = gfn_of(h, linear)
    h.zap(CPU0, VM0, gfn)
    h.promise(CPU0, VM0, gfn, lib.PROMISE_ZAP_RANGE)
    # With paging the walk gets as far as the stale guest-physical mapping.
    lib.invlpg(lib.cpu_tlb(h.m, CPU0), A)
    assert speculate(h, vcpu, linear) == 0
    assert h.violations() == {}
    h.access(CPU0, vcpu, linear, READ)
    # With paging the combined and the guest-physical mapping are both used.
    assert set(h.violations()) == {"stale-after-revoke"}


def test_evicted_is_missed_and_charged_to_no_flush(machine: tuple[Hypervisor, VcpuId, int]) -> None:
    h, vcpu, linear = machine
    tlb = lib.cpu_tlb(h.m, CPU0)
    while tlb_entries(h):
        assert lib.tlb_evict(tlb, 0) == 1
    while psc_entries(h):
        assert lib.psc_evict(tlb, 0) == 1
    assert lib.tlb_evict(tlb, 0) == lib.psc_evict(tlb, 0) == 0
    misses = h.count(lib.COUNT_L2_MISSES)
    h.access(CPU0, vcpu, linear, READ)
    assert h.count(lib.COUNT_L2_MISSES) == misses + 1
    assert h.count(lib.COUNT_REFILLS) == 0


def test_there_is_no_speculation_outside_guest_mode(machine: tuple[Hypervisor, VcpuId, int]) -> None:
    h, vcpu, linear = machine
    assert lib.guest_speculate(h.m, CPU0, Gva(linear)) == lib.MACHINE_MISUSE
    speculate(h, vcpu, linear)
    assert lib.guest_speculate(h.m, CPU0, Gva(linear)) == lib.MACHINE_MISUSE
