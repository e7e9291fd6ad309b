"""The fast oracle against the slow one on random runs, and single cases of each verdict."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from native import ffi, lib
from native.types import Gfn, Hfn, HostWritable, Hva, Level, PromiseKind, SpteIndex, VcpuId, VmId
from tests.native.hypervisor import READ, WRITE, Hypervisor
from tests.native.slow_oracle import Model
from tests.support import CPU0, CPU1, VM0

GFNS = 4
OPERATIONS = st.one_of(
    st.tuples(st.just("access"), st.integers(0, 1), st.integers(0, GFNS - 1), st.sampled_from([READ, WRITE])),
    st.tuples(st.just("zap"), st.integers(0, GFNS - 1)),
    st.tuples(st.just("protect"), st.integers(0, GFNS - 1)),
    st.tuples(st.just("flush")),
    st.tuples(st.just("dirty-log"), st.integers(0, GFNS - 1)),
    st.tuples(st.just("zap-range"), st.integers(0, GFNS - 1)),
    st.tuples(st.just("free"), st.integers(0, GFNS - 1), st.booleans()),
)


def access(machine: Hypervisor, model: Model, vcpus: list[VcpuId], step: Any) -> None:
    """Make an access on both sides, and serve EPT violations in between."""
    _, cpu, gfn, kind = step
    before = sum(machine.violations().values())
    expected = model.violations
    machine.access(cpu, vcpus[cpu], gfn << 12, kind)
    while not model.access(cpu, gfn, kind):
        frame = ffi.new("uint32_t *")
        lib.oracle_right(machine.m, VM0, gfn, frame)
        model.map(gfn, int(frame[0]))
    found = sum(machine.violations().values()) - before
    assert found == model.violations - expected, f"{step}: fast {found}, slow {model.violations - expected}"


def apply(machine: Hypervisor, model: Model, vcpus: list[VcpuId], step: Any) -> None:
    match step:
        case ("access", *_):
            access(machine, model, vcpus, step)
        case ("zap", gfn):
            machine.zap(CPU0, VM0, gfn)
            model.zap(gfn)
        case ("protect", gfn):
            machine.write_protect(CPU0, VM0, gfn)
            model.write_protect(gfn)
        case ("flush",):
            machine.flush(VM0)
            model.flush()
        case ("dirty-log", gfn):
            machine.promise(CPU0, VM0, gfn, lib.PROMISE_DIRTY_LOG)
            model.history.add("revoke", 0, gfn, -1, (WRITE,))
        case ("zap-range", gfn):
            machine.promise(CPU0, VM0, gfn, lib.PROMISE_ZAP_RANGE)
            model.history.add("withdraw", 0, gfn, -1, (READ, WRITE))
        case ("free", gfn, zap):
            if zap:
                machine.zap(CPU0, VM0, gfn)
                model.zap(gfn)
            machine.promise(CPU0, VM0, gfn, lib.PROMISE_NOTIFIER)
            machine.free(CPU0, VM0, gfn)
            model.free(gfn)


# A frame that is freed and granted again for the same page.
@pytest.mark.slow
@example(
    [("access", 1, 1, READ), ("zap", 0), ("free", 1, True), ("access", 0, 1, READ), ("access", 1, 1, READ)]
)
# An SPTE of a freed frame that another one replaces.
@example(
    [
        ("access", 0, 2, READ),
        ("protect", 2),
        ("free", 2, False),
        ("access", 0, 0, READ),
        ("access", 0, 2, WRITE),
    ]
)
@settings(max_examples=300, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(OPERATIONS, min_size=5, max_size=60))
def test_fast_and_slow_oracle_agree(steps: list[Any]) -> None:
    model = Model(pcpus=2)
    with Hypervisor(l2_entries=0, psc_entries=0) as machine:
        vm = machine.vm(GFNS)
        vcpus = [machine.vcpu(vm, 1, end_gfn=GFNS), machine.vcpu(vm, 2, end_gfn=GFNS)]
        for step in steps:
            apply(machine, model, vcpus, step)


@pytest.fixture
def machine() -> Any:
    with Hypervisor() as h:
        yield h


def test_use_before_the_promise_is_legal_and_counted(machine: Hypervisor) -> None:
    vm = machine.vm()
    vcpu = machine.vcpu(vm, 1)
    machine.access(CPU0, vcpu, 0x5000, WRITE)
    machine.zap(CPU0, vm, 5)
    machine.access(CPU0, vcpu, 0x5000, WRITE)
    assert machine.violations() == {}
    assert machine.count(lib.COUNT_LEGAL_STALE) == 1
    assert not machine.mapped(vm, 5), "the access went through the TLB, not through a new fault"


@pytest.mark.parametrize("flush", [True, False])
def test_freed_frame(machine: Hypervisor, flush: bool) -> None:
    vm = machine.vm()
    vcpu = machine.vcpu(vm, 1)
    machine.access(CPU0, vcpu, 0x5000, READ)
    machine.zap(CPU0, vm, 5)
    if flush:
        machine.flush(vm)
    machine.promise(CPU0, vm, 5, lib.PROMISE_NOTIFIER)
    machine.free(CPU0, vm, 5)
    machine.access(CPU0, vcpu, 0x5000, READ)
    assert machine.violations() == ({} if flush else {"use-after-free": 1})
    assert machine.count(lib.COUNT_AVERTED) == flush
    if not flush:
        (report,) = machine.reports()
        assert report.gfn == 5
        assert report.promise == lib.PROMISE_NOTIFIER
        assert report.kinds >> lib.VIOLATION_STALE_AFTER_REVOKE & 1, "all kinds that hold are listed"


@pytest.mark.parametrize(("paging", "pages"), [(0, 1), (1, 5)])
def test_a_refill_is_counted_once_whatever_exits_it_takes(
    machine: Hypervisor, paging: int, pages: int
) -> None:
    vm = machine.vm()
    vcpu = machine.vcpu(vm, 1, paging=paging)
    machine.process(vcpu, [0x5000], [5])
    machine.access(CPU0, vcpu, 0x5000)
    mapped = [gfn for gfn in range(1024) if machine.mapped(vm, gfn)]
    assert len(mapped) == pages, "with four levels of the guest's tables"
    machine.flush(vm)
    for gfn in mapped:
        machine.zap(CPU0, vm, gfn)
    machine.access(CPU0, vcpu, 0x5000)  # an EPT violation for each of them
    assert machine.count(lib.COUNT_REFILLS) == pages + paging
    assert machine.violations() == {}


def test_one_report_per_stale_entry(machine: Hypervisor) -> None:
    vm = machine.vm()
    vcpu = machine.vcpu(vm, 1)
    machine.access(CPU0, vcpu, 0x5000, READ)
    machine.zap(CPU0, vm, 5)
    machine.promise(CPU0, vm, 5, lib.PROMISE_ZAP_RANGE)
    for _ in range(5):
        machine.access(CPU0, vcpu, 0x5000, READ)
    assert machine.violations() == {"stale-after-revoke": 1}


def test_a_right_granted_again_is_no_violation(machine: Hypervisor) -> None:
    vm = machine.vm()
    vcpu, other = machine.vcpu(vm, 1), machine.vcpu(vm, 2)
    machine.access(CPU0, vcpu, 0x5000, READ)
    machine.zap(CPU0, vm, 5)
    machine.promise(CPU0, vm, 5, lib.PROMISE_MEMSLOT)
    machine.access(CPU1, other, 0x5000, READ)
    machine.access(CPU0, vcpu, 0x5000, READ)
    assert machine.violations() == {}


def test_losing_only_write_is_a_revocation(machine: Hypervisor) -> None:
    vm = machine.vm()
    vcpu = machine.vcpu(vm, 1)
    machine.access(CPU0, vcpu, 0x5000, WRITE)
    machine.write_protect(CPU0, vm, 5)
    machine.access(CPU0, vcpu, 0x5000, WRITE)
    assert machine.violations() == {}, "stale writable entries before the log is read are legal"
    machine.promise(CPU0, vm, 5, lib.PROMISE_DIRTY_LOG)
    machine.access(CPU0, vcpu, 0x5000, READ)
    assert machine.violations() == {}, "the right to read is not affected"
    machine.access(CPU0, vcpu, 0x5000, WRITE)
    assert machine.violations() == {"stale-after-revoke": 1}


def test_root_page_reused_by_another_vm(machine: Hypervisor) -> None:
    first, second = machine.vm(), machine.vm()
    vcpu = machine.vcpu(first, 1)
    machine.access(CPU0, vcpu, 0x5000, READ)
    # The first VM's root dies, and its page becomes a root of the second VM: no flush in between.
    lib.ept_table_free(machine.m, CPU0, machine.roots[first])
    lib.ept_table_free(machine.m, CPU0, machine.roots[second])
    machine.new_root()
    machine.roots[second] = machine.new_root()
    assert machine.roots[second] == machine.roots[first], "last in, first out"
    stranger = machine.vcpu(second, 2)
    machine.access(CPU0, stranger, 0x5000, READ)
    # Its translation, and the paging-structure-cache entry behind it.
    assert machine.violations() == {"cross-vm": 2}
    report = machine.reports()[0]
    assert report.kinds >> lib.VIOLATION_FOREIGN_ROOT & 1


@pytest.mark.parametrize("root_frames", [1, 2])
def test_entries_of_a_dead_root_are_counted_whichever_page_it_was(root_frames: int) -> None:
    with Hypervisor(root_frames=root_frames) as machine:
        vm = machine.vm()
        root = machine.roots[vm]
        eptp = root << 12 | 3 << 3 | 6
        lib.flush_invept_single(machine.m, CPU0, vm, eptp, lib.REASON_MIGRATION)
        machine.access(CPU0, machine.vcpu(vm, 1), 0x5000, READ)
        lib.ept_table_free(machine.m, CPU0, root)
        assert machine.new_root() == root, "last in, first out"
        before = lib.counter_sum(machine.m, lib.COUNT_DEAD_ROOT_ENTRIES)
        lib.flush_invept_single(machine.m, CPU0, vm, eptp, lib.REASON_MIGRATION)
        dead = lib.counter_sum(machine.m, lib.COUNT_DEAD_ROOT_ENTRIES) - before
        assert dead > 0
        lib.flush_invept_single(machine.m, CPU0, vm, eptp, lib.REASON_MIGRATION)
        assert lib.counter_sum(machine.m, lib.COUNT_DEAD_ROOT_ENTRIES) == before + dead, "once"


def test_freed_table_behind_a_paging_structure_cache(machine: Hypervisor) -> None:
    vm = machine.vm()
    vcpu = machine.vcpu(vm, 1)
    machine.access(CPU0, vcpu, 0x5000, READ)
    sptes, tables = ffi.new("uint64_t[]", 6), ffi.new("uint32_t[]", 6)
    assert lib.tdp_mmu_get_walk(machine.m, machine.roots[vm], Level(4), Gfn(5), sptes, tables) == 1
    lib.tdp_mmu_set_spte(machine.m, CPU0, vm, Hfn(tables[2]), SpteIndex(0), Level(2), Gfn(0), 0)
    removal = ffi.new("struct tdp_removal *")
    assert lib.tdp_removal_begin(machine.m, CPU0, vm, removal, sptes[2], Level(2), Gfn(0), False) == 0
    assert lib.tdp_removal_step(machine.m, CPU0, vm, removal, 512) == 0
    assert removal.page == tables[1]
    lib.ept_table_free(machine.m, CPU0, Hfn(tables[1]))
    machine.access(CPU0, vcpu, 0x6000, READ)
    assert machine.violations() == {"walk-after-free": 1}


def test_custody_void_before_the_spte_was_installed(machine: Hypervisor) -> None:
    """A fault without mmu_invalidate_seq maps a frame that it no longer owns."""
    vm = machine.vm()
    vcpu = machine.vcpu(vm, 1)
    page = ffi.new("struct mm_page *")
    assert lib.mm_fault(machine.m, CPU0, vm, Hva(5), True, page) == 0
    machine.promise(CPU0, vm, 5, lib.PROMISE_NOTIFIER)
    machine.free(CPU0, vm, 5)
    table, index, old = machine.leaf(CPU0, vm, 5, True)
    spte = lib.make_spte(page.hfn, page.tag, Level(1), True, HostWritable(True))
    assert (
        lib.tdp_mmu_set_spte_atomic(machine.m, CPU0, vm, table, SpteIndex(index), Level(1), Gfn(5), old, spte)
        == 0
    )
    machine.access(CPU0, vcpu, 0x5000, READ)
    assert "use-after-free" in machine.violations()


def test_a_promise_is_about_what_was_taken_away_before_its_flush(machine: Hypervisor) -> None:
    """Granted again after the flush, then taken away by a zap without its flush yet: still legal."""
    vm = machine.vm()
    vcpu = machine.vcpu(vm, 1)
    machine.access(CPU0, vcpu, 0x5000, WRITE)
    machine.write_protect(CPU0, vm, 5)
    ticket = lib.oracle_ticket(machine.m, vm)
    machine.flush(vm)
    machine.access(CPU0, vcpu, 0x5000, WRITE)  # a fault gives W back
    machine.zap(CPU0, vm, 5)
    lib.oracle_revoke(machine.m, CPU0, vm, Gfn(5), Gfn(6), lib.PROMISE_DIRTY_LOG, ticket)
    machine.access(CPU0, vcpu, 0x5000, WRITE)
    assert machine.violations() == {}
    assert machine.count(lib.COUNT_LEGAL_STALE) == 1


@pytest.mark.parametrize("promise", [lib.PROMISE_NOTIFIER, lib.PROMISE_MEMSLOT, lib.PROMISE_ZAP_RANGE])
def test_a_promise_that_finds_nothing_ends_what_a_fault_has_found(
    machine: Hypervisor, promise: PromiseKind
) -> None:
    """All rights have ended by an earlier one, and a fault has looked in between."""
    vm = machine.vm()
    vcpu = machine.vcpu(vm, 1)
    machine.access(CPU0, vcpu, 0x5000, READ)
    machine.zap(CPU0, vm, 5)
    machine.promise(CPU0, vm, 5, promise)
    machine.flush(vm)
    tags = [lib.frame_host_tag_of(machine.m, frame_of(machine, vm, 5))]
    machine.promise(CPU0, vm, 5, promise)
    tags.append(lib.frame_host_tag_of(machine.m, frame_of(machine, vm, 5)))
    assert tags[0] != tags[1]


def test_a_promise_leaves_the_frames_next_user_alone(machine: Hypervisor) -> None:
    vm = machine.vm()
    vcpu = machine.vcpu(vm, 1)
    machine.access(CPU0, vcpu, 0x5000, READ)
    hfn = frame_of(machine, vm, 5)
    machine.zap(CPU0, vm, 5)
    machine.promise(CPU0, vm, 5, lib.PROMISE_NOTIFIER)
    machine.free(CPU0, vm, 5)
    tag = lib.frame_host_tag_of(machine.m, hfn)
    machine.promise(CPU0, vm, 5, lib.PROMISE_NOTIFIER)
    assert lib.frame_host_tag_of(machine.m, hfn) == tag


def frame_of(machine: Hypervisor, vm: VmId, gfn: int) -> Hfn:
    """The frame that was mapped there last."""
    hfn = ffi.new("uint32_t *")
    lib.oracle_right(machine.m, vm, Gfn(gfn), hfn)
    return Hfn(hfn[0])


def test_a_page_may_have_more_sptes_than_a_byte_counts() -> None:
    """As aliases of one page have without EPT: the right lasts until the last SPTE is gone."""
    sptes = 300
    with Hypervisor() as machine:
        machine.vm(GFNS)
        m, frame = machine.m, ffi.new("struct mm_page *")
        assert lib.mm_fault(m, CPU0, VM0, Hva(1), True, frame) == 0
        table = Hfn(lib.shadow_page_alloc(m, CPU0, lib.FRAME_TABLE))
        spte = lib.make_shadow_spte(
            frame.hfn, frame.tag, Level(1), lib.SPTE_WRITABLE | lib.SPTE_USER, HostWritable(True)
        )
        for index in range(sptes):
            lib.shadow_mmu_set_spte(m, CPU0, VM0, table, SpteIndex(index), Level(1), Gfn(1), spte)
        hfn = ffi.new("uint32_t *")
        for index in range(sptes):
            assert lib.oracle_right(m, VM0, Gfn(1), hfn) == 0b0011
            lib.shadow_mmu_set_spte(m, CPU0, VM0, table, SpteIndex(index), Level(1), Gfn(1), 0)
        assert lib.oracle_right(m, VM0, Gfn(1), hfn) == 0
