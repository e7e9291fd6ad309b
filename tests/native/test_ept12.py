"""L1's EPTs for nested guests: the tables that L1 writes, and the promises of its invalidations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from native import ffi, lib
from native.types import Hva, VcpuId, WordIndex
from tests.native.hypervisor import Hypervisor
from tests.native.nested_rig import INSN, A, nested_vcpu, vmx
from tests.native.test_guest_nested import enter, leave
from tests.native.test_program import op, run
from tests.support import CPU0

INSN.update(
    {name: getattr(lib, f"GUEST_INSN_{name.upper()}") for name in ("vmwrite_eptp", "invept", "vmfunc")},
)
PAGE, GFN, OTHER = 0x20, 0x30, 0x31
RWX, LEAF = 7, 0x37


@pytest.fixture
def machine() -> Iterator[Hypervisor]:
    with Hypervisor(l2_entries=0, psc_entries=0) as h:
        yield h


def ept12(kind: str, page: int, gfn: int = 0, flags: int = 0, number: int = 1) -> dict[str, int]:
    kinds = getattr(lib, f"GUEST_OP_EPT12_{kind.upper()}")
    return {"kind": kinds, "linear": page << 12, "value": gfn, "flags": flags | number << 8}


def word(machine: Hypervisor, vcpu: VcpuId, gfn: int, index: int) -> int:
    value = ffi.new("uint64_t *")
    assert lib.mm_read_word(machine.m, CPU0, machine.vm_of[vcpu], Hva(gfn), WordIndex(index), value) == 0
    return int(value[0])


def leaf(machine: Hypervisor, vcpu: VcpuId) -> int:
    """Return the entry for PAGE in EPT 1, found by its EPTP, which the last instruction has told KVM."""
    run(machine, vcpu, vmx("vmptrld", 1))
    run(machine, vcpu, vmx("vmwrite_eptp", 1))
    assert machine.exit.linear & 0xFFF == 0x1E
    table = machine.exit.linear >> 12
    for _ in range(3):
        entry = word(machine, vcpu, table, 0)
        assert entry & 0xFFF == RWX
        table = entry >> 12
    return word(machine, vcpu, table, PAGE)


def test_l1_writes_the_tables_in_its_memory(machine: Hypervisor) -> None:
    vcpu = nested_vcpu(machine)
    run(machine, vcpu, ept12("map", PAGE, GFN))
    assert leaf(machine, vcpu) == GFN << 12 | LEAF
    run(machine, vcpu, ept12("protect", PAGE))
    assert leaf(machine, vcpu) == GFN << 12 | LEAF & ~2
    run(machine, vcpu, ept12("unmap", PAGE))
    assert leaf(machine, vcpu) == 0


def test_an_eptp_names_the_root_and_the_flags(machine: Hypervisor) -> None:
    vcpu = nested_vcpu(machine)
    run(machine, vcpu, vmx("vmptrld", 1))
    eptps = []
    for number, ad in ((1, 0), (1, 1), (2, 0), (0, 0)):
        run(machine, vcpu, vmx("vmwrite_eptp", number, ad))
        eptps.append(machine.exit.linear)
    assert eptps[1] == eptps[0] | 0x40
    assert eptps[2] >> 12 != eptps[0] >> 12
    assert eptps[3] == 0
    run(machine, vcpu, vmx("invept", 2, 1))
    assert (machine.exit.linear, machine.exit.invpcid_type) == (eptps[2], 1)


INVALIDATIONS = {
    "single": (vmx("invept", 1, 1), True),
    "another EPT": (vmx("invept", 2, 1), False),
    "global": (vmx("invept", 0, 2), True),
    "INVVPID": (vmx("invvpid", 5, 1), False),
}


@pytest.mark.parametrize("change", ["unmap", "protect", "map"])
@pytest.mark.parametrize(("insn", "covers"), INVALIDATIONS.values(), ids=INVALIDATIONS)
def test_invept_ends_what_the_nested_guest_may_use(
    machine: Hypervisor, insn: dict[str, int], covers: bool, change: str
) -> None:
    """The hypervisor here has one EPT for all and knows nothing of L1's: pages of L2 are L1's own."""
    vcpu = nested_vcpu(machine)
    ops = [ept12("map", page, page) for page in (PAGE, *range(896, 960))]
    run(machine, vcpu, *ops, vmx("vmptrld", 1))
    run(machine, vcpu, vmx("vmwrite_eptp", 1))
    enter(machine, vcpu, 1, 5)
    run(machine, vcpu, op("map", A, PAGE), op("write", A))
    leave(machine, vcpu)
    run(machine, vcpu, ept12(change, PAGE, OTHER))
    lib.vcpu_set_guest_mode(machine.m, vcpu, 1)
    run(machine, vcpu, op("write", A))
    assert machine.violations() == {}, "before an invalidation"
    lib.vcpu_set_guest_mode(machine.m, vcpu, 0)
    run(machine, vcpu, insn)
    lib.vcpu_set_guest_mode(machine.m, vcpu, 1)
    run(machine, vcpu, op("write", A))
    assert set(machine.violations()) == ({"l1-stale"} if covers else set())


@pytest.mark.parametrize("mapped", [False, True])
def test_a_violation_ends_the_use_of_a_page_that_is_mapped(machine: Hypervisor, mapped: bool) -> None:
    vcpu = nested_vcpu(machine)
    ops = [ept12("map", page, page) for page in (PAGE, *range(896, 960))]
    run(machine, vcpu, *ops, vmx("vmptrld", 1))
    run(machine, vcpu, vmx("vmwrite_eptp", 1))
    enter(machine, vcpu, 1, 5)
    run(machine, vcpu, op("map", A, PAGE), op("write", A))
    leave(machine, vcpu)
    run(machine, vcpu, ept12("map", PAGE, OTHER))
    lib.vcpu_set_guest_mode(machine.m, vcpu, 1)
    assert not lib.vcpu_handles_violation(machine.m, vcpu)
    lib.vcpu_nested_ept_violation(machine.m, vcpu, PAGE << 12, mapped)
    lib.vcpu_set_guest_mode(machine.m, vcpu, 0)
    assert lib.vcpu_handles_violation(machine.m, vcpu)
    # L1 resumes its guest before the program goes on.
    assert run(machine, vcpu, op("read", A)) == lib.EXIT_INSTRUCTION
    assert machine.exit.access == lib.GUEST_INSN_VMLAUNCH
    lib.vcpu_set_guest_mode(machine.m, vcpu, 1)
    run(machine, vcpu, op("read", A))
    assert set(machine.violations()) == ({"l1-stale"} if mapped else set())


@pytest.mark.parametrize("number", [1, 2])
def test_vmfunc_ends_the_use_of_another_ept(machine: Hypervisor, number: int) -> None:
    """A switch to the EPT in use changes nothing."""
    vcpu = nested_vcpu(machine)
    for ept, gfn in ((1, GFN), (2, OTHER)):
        run(machine, vcpu, *(ept12("map", page, page, number=ept) for page in range(896, 960)))
        run(machine, vcpu, ept12("map", GFN, gfn, number=ept))
    run(machine, vcpu, vmx("vmptrld", 1))
    run(machine, vcpu, vmx("vmwrite_eptp", 1))
    enter(machine, vcpu, 1, 5)
    run(machine, vcpu, op("map", A, GFN), op("read", A))
    assert run(machine, vcpu, vmx("vmfunc", number)) == lib.EXIT_INSTRUCTION
    assert (machine.exit.access, machine.exit.linear & 0xFFF) == (lib.GUEST_INSN_VMFUNC, 0x1E)
    run(machine, vcpu, op("read", A))
    assert set(machine.violations()) == ({"l1-stale"} if number == 2 else set())


def test_in_smm_l1_handles_no_exit_of_its_guest(machine: Hypervisor) -> None:
    vcpu = nested_vcpu(machine)
    run(machine, vcpu, ept12("map", PAGE, GFN), vmx("vmptrld", 1))
    run(machine, vcpu, vmx("vmwrite_eptp", 1))
    enter(machine, vcpu, 1, 5)
    lib.vcpu_nested_ept_violation(machine.m, vcpu, OTHER << 12, False)
    lib.vcpu_set_guest_mode(machine.m, vcpu, 0)
    handles = []
    for smm in (True, False):
        lib.vcpu_set_smm(machine.m, vcpu, smm)
        handles.append(bool(lib.vcpu_handles_violation(machine.m, vcpu)))
    assert handles == [False, True]


def test_an_entry_of_level_2_maps_2_mib(machine: Hypervisor) -> None:
    vcpu = nested_vcpu(machine)
    huge = lib.GUEST_OP_HUGE
    run(machine, vcpu, ept12("map", 0x200, 0x200, huge))
    run(machine, vcpu, vmx("vmptrld", 1))
    run(machine, vcpu, vmx("vmwrite_eptp", 1))
    table = machine.exit.linear >> 12
    for _ in range(2):
        table = word(machine, vcpu, table, 0) >> 12
    assert word(machine, vcpu, table, 1) == 0x200 << 12 | LEAF | 0x80
    # A page of them: the whole entry changes.
    run(machine, vcpu, ept12("protect", 0x2FF))
    assert word(machine, vcpu, table, 1) == 0x200 << 12 | (LEAF & ~2) | 0x80
    run(machine, vcpu, ept12("unmap", 0x210))
    assert word(machine, vcpu, table, 1) == 0


def test_l1_splits_no_entry_of_level_2(machine: Hypervisor) -> None:
    vcpu = nested_vcpu(machine)
    run(machine, vcpu, ept12("map", 0x200, 0x200, lib.GUEST_OP_HUGE))
    assert run(machine, vcpu, ept12("map", 0x210, 0x30)) == lib.EXIT_TRIPLE_FAULT
