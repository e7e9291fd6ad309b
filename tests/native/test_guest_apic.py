"""The APIC-access page: which accesses exit, and which use of a cached translation is reported for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from native import ffi, lib
from native.types import Hfn, Hva, VcpuId, Vpid, WordIndex
from tests.native.hypervisor import Hypervisor
from tests.native.test_program import go_on, op, position, run
from tests.support import CPU0

PAGE, OTHER = 0x10, 0x11
END = lib.EXIT_PROGRAM_END
EXITS = lib.EXIT_APIC_ACCESS


@pytest.fixture
def machine() -> Iterator[Hypervisor]:
    with Hypervisor(l2_entries=0, psc_entries=0) as h:
        yield h


@pytest.fixture
def vcpu(machine: Hypervisor) -> VcpuId:
    """A vCPU without paging; its pages have SPTEs, and are not cached."""
    vcpu = machine.vcpu(machine.vm(1024), 1, first_gfn=960, end_gfn=1024)
    assert run(machine, vcpu, op("read", PAGE), op("read", OTHER)) == END
    machine.flush(machine.vm_of[vcpu])
    return vcpu


def virtualize(machine: Hypervisor, vcpu: VcpuId, page: int) -> None:
    """Make this the APIC-access page of the vCPU's VMCS; 0: none."""
    hfn = machine.map(CPU0, machine.vm_of[vcpu], page) if page else Hfn(0)
    lib.vmcs_write_apic_page(machine.m, machine.vmcs[vcpu], hfn)


def word(machine: Hypervisor, vcpu: VcpuId) -> int:
    """The first word of the page in memory."""
    value = ffi.new("uint64_t *")
    assert lib.mm_read_word(machine.m, CPU0, machine.vm_of[vcpu], Hva(PAGE), WordIndex(0), value) == 0
    return int(value[0])


def apic(kind: str, page: int = PAGE) -> dict[str, int]:
    return {**op(kind, page), "flags": lib.GUEST_OP_APIC}


@pytest.mark.parametrize("kind", ["read", "write"])
def test_an_access_to_the_page_exits_once_and_no_other_does(
    machine: Hypervisor, vcpu: VcpuId, kind: str
) -> None:
    virtualize(machine, vcpu, PAGE)
    assert run(machine, vcpu, apic(kind), op(kind, OTHER)) == EXITS
    assert (machine.exit.gpa >> 12, machine.exit.access) == (PAGE, int(kind == "write"))
    assert position(machine, vcpu) == 1
    assert go_on(machine, vcpu) == END
    assert machine.violations() == {}


def test_a_store_to_the_page_does_not_reach_memory(machine: Hypervisor, vcpu: VcpuId) -> None:
    assert run(machine, vcpu, op("read", PAGE), op("write", PAGE)) == END
    before = word(machine, vcpu)
    virtualize(machine, vcpu, PAGE)
    machine.flush(machine.vm_of[vcpu])
    assert run(machine, vcpu, apic("write")) == EXITS
    assert word(machine, vcpu) == before
    virtualize(machine, vcpu, 0)
    assert run(machine, vcpu, op("write", PAGE)) == END
    assert word(machine, vcpu) != before


# The page of each fill, then that of the use; an access to the APIC or to memory; a flush in between.
CASES = [
    ("virtualization begins", 0, PAGE, True, False),
    ("virtualization begins", 0, PAGE, True, True),
    ("another page", OTHER, PAGE, True, False),
    ("another page", OTHER, PAGE, True, True),
    ("the page is memory again", PAGE, OTHER, False, False),
    ("the page is memory again", PAGE, OTHER, False, True),
    ("virtualization ends", PAGE, 0, False, False),
    ("another page of no concern", OTHER, 0x12, False, False),
]


@pytest.mark.parametrize(("what", "before", "after", "is_apic", "flush"), CASES)
def test_a_translation_is_used_as_it_was_cached(
    machine: Hypervisor, vcpu: VcpuId, what: str, before: int, after: int, is_apic: bool, flush: bool
) -> None:
    virtualize(machine, vcpu, before)
    fill = apic("read") if before == PAGE else op("read", PAGE)
    assert run(machine, vcpu, fill) in (EXITS, END)
    virtualize(machine, vcpu, after)
    if flush:
        machine.flush(machine.vm_of[vcpu])
    averted = machine.count(lib.COUNT_AVERTED)
    assert run(machine, vcpu, apic("read") if is_apic else op("read", PAGE)) == (EXITS if is_apic else END)
    stale = after != 0 and PAGE in (before, after)
    assert machine.violations() == ({"apic-stale": 1} if stale and not flush else {})
    assert machine.count(lib.COUNT_AVERTED) - averted == (stale and flush)


def test_a_combined_mapping_is_of_the_page_of_the_guest_physical_one(machine: Hypervisor) -> None:
    """INVVPID leaves guest-physical mappings, from which the next walk fills."""
    vcpu = machine.vcpu(machine.vm(1024), 1, first_gfn=960, end_gfn=1024, paging=1, pcid=0)
    machine.process(vcpu, [], [0x100])
    assert run(machine, vcpu, op("map", 0x100, PAGE), op("read", 0x100)) == END
    virtualize(machine, vcpu, PAGE)
    lib.flush_invvpid_single(machine.m, CPU0, machine.vm_of[vcpu], Vpid(1), lib.REASON_OTHER)
    assert run(machine, vcpu, apic("read", 0x100)) == EXITS
    assert machine.violations() == {"apic-stale": 1}
    machine.flush(machine.vm_of[vcpu])
    assert run(machine, vcpu, apic("read", 0x100)) == EXITS
    assert machine.violations() == {"apic-stale": 1}


def test_an_access_that_meets_its_page_cached_as_memory_is_counted(machine: Hypervisor, vcpu: VcpuId) -> None:
    def aliases() -> int:
        return lib.counter_sum(machine.m, lib.COUNT_APIC_ALIASES)

    assert run(machine, vcpu, op("read", PAGE)) == END
    virtualize(machine, vcpu, PAGE)
    run(machine, vcpu, apic("read"))
    assert aliases() == 1
    machine.flush(machine.vm_of[vcpu])
    run(machine, vcpu, apic("read"), apic("read"))
    assert aliases() == 1
