"""Nested guests: what VMX instructions invalidate, and whose translations a guest may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from native import lib
from native.types import Level, VcpuId, Vpid
from tests.native.hypervisor import Hypervisor
from tests.native.nested_rig import A, B, nested_vcpu, vmx
from tests.native.test_program import go_on, op, run
from tests.support import CPU0, CPU1

GLOBAL = lib.GUEST_OP_GLOBAL
GFN, OTHER, L1_GFN = 0x10, 0x11, 0x12


@pytest.fixture
def machine() -> Iterator[Hypervisor]:
    with Hypervisor(l2_entries=0, psc_entries=0) as h:
        yield h


def enter(machine: Hypervisor, vcpu: VcpuId, number: int, vpid: int = 0) -> None:
    """VM entry of a nested guest, as KVM emulates it, without a flush."""
    for ops in ([vmx("vmptrld", number)], [vmx("vmwrite", vpid)], [vmx("vmlaunch")]):
        assert run(machine, vcpu, *ops) == lib.EXIT_INSTRUCTION
    lib.vcpu_set_guest_mode(machine.m, vcpu, number)


def leave(machine: Hypervisor, vcpu: VcpuId) -> None:
    assert run(machine, vcpu, vmx("vmcall")) == lib.EXIT_INSTRUCTION
    lib.vcpu_set_guest_mode(machine.m, vcpu, 0)


def drop(machine: Hypervisor, vcpu: VcpuId) -> None:
    machine.flush(machine.vm_of[vcpu])


def test_an_instruction_exits_with_its_operands(machine: Hypervisor) -> None:
    vcpu = nested_vcpu(machine)
    run(machine, vcpu, vmx("vmptrld", 1))
    assert (machine.exit.access, machine.exit.linear) == (lib.GUEST_INSN_VMPTRLD, 1)
    run(machine, vcpu, vmx("invvpid", 7, 3, 0x8_0000_0001))
    assert machine.exit.access == lib.GUEST_INSN_INVVPID
    assert machine.exit.linear == 0xFFFF_8000_0000_1000
    assert (machine.exit.invpcid_type, machine.exit.invpcid_pcid) == (3, 7)


def test_all_guests_of_a_vcpu_execute_one_program(machine: Hypervisor) -> None:
    vcpu = nested_vcpu(machine)
    ops = [vmx("vmptrld", 1), vmx("vmlaunch"), op("exit", 0, 5), vmx("vmcall"), op("exit", 0, 6)]
    assert run(machine, vcpu, *ops) == lib.EXIT_INSTRUCTION
    for number, position in ((0, 2), (1, 3)):
        lib.vcpu_set_guest_mode(machine.m, vcpu, number)
        go_on(machine, vcpu)
        assert lib.guest_program_position(machine.m, vcpu) == position
        assert lib.vcpu_guest_mode(machine.m, vcpu) == number


@pytest.mark.parametrize("number", [0, lib.NESTED_GUESTS + 1, 1])
def test_a_nested_guest_has_a_number_of_its_own(machine: Hypervisor, number: int) -> None:
    vcpu = nested_vcpu(machine)
    assert lib.guest_create_nested(machine.m, vcpu, number) == lib.MACHINE_MISUSE


def test_tables_of_nested_guests_are_their_own(machine: Hypervisor) -> None:
    vcpu = nested_vcpu(machine)
    run(machine, vcpu, op("map", A, L1_GFN), op("write", A))
    enter(machine, vcpu, 1, 5)
    drop(machine, vcpu)
    run(machine, vcpu, op("map", A, GFN), op("write", A))
    assert machine.mapped(machine.vm_of[vcpu], GFN)
    leave(machine, vcpu)
    drop(machine, vcpu)
    run(machine, vcpu, op("read", A))
    assert machine.violations() == {}


# --- L1's promises ------------------------------------------------------------------------------------------

INVALIDATIONS = {
    "address": (vmx("invvpid", 5, 0, A), True),
    "another address": (vmx("invvpid", 5, 0, B), False),
    "single": (vmx("invvpid", 5, 1), True),
    "another VPID": (vmx("invvpid", 6, 1), False),
    "all": (vmx("invvpid", 0, 2), True),
    "retaining globals": (vmx("invvpid", 5, 3), True),
    "VMCLEAR": (vmx("vmclear", 1), False),
}


@pytest.mark.parametrize(("insn", "covers"), INVALIDATIONS.values(), ids=INVALIDATIONS)
def test_invvpid_ends_what_the_nested_guest_may_use(
    machine: Hypervisor, insn: dict[str, int], covers: bool
) -> None:
    vcpu = nested_vcpu(machine)
    enter(machine, vcpu, 1, 5)
    run(machine, vcpu, op("map", A, GFN), op("read", A), op("map", A, OTHER))
    leave(machine, vcpu)
    run(machine, vcpu, insn)
    lib.vcpu_set_guest_mode(machine.m, vcpu, 1)
    run(machine, vcpu, op("read", A))
    assert machine.violations() == ({"l1-stale": 1} if covers else {})


@pytest.mark.parametrize(("kind", "covers"), [(0, True), (1, True), (2, True), (3, False)])
def test_global_mappings_survive_type_3_alone(machine: Hypervisor, kind: int, covers: bool) -> None:
    vcpu = nested_vcpu(machine)
    enter(machine, vcpu, 1, 5)
    run(machine, vcpu, op("map", A, GFN, GLOBAL), op("read", A), op("map", A, OTHER))
    leave(machine, vcpu)
    run(machine, vcpu, vmx("invvpid", 5, kind, A))
    lib.vcpu_set_guest_mode(machine.m, vcpu, 1)
    run(machine, vcpu, op("read", A))
    assert machine.violations() == ({"l1-stale": 1} if covers else {})


def test_the_nested_guests_own_invalidation_is_its_own_promise(machine: Hypervisor) -> None:
    vcpu = nested_vcpu(machine)
    enter(machine, vcpu, 1, 5)
    run(machine, vcpu, op("map", A, GFN), op("read", A))
    # On another pCPU, so that the translation is still cached on this one.
    run(machine, vcpu, op("map", A, OTHER), op("invlpg", A), cpu=CPU1)
    run(machine, vcpu, op("read", A))
    assert machine.violations() == {"guest-stale": 1}


@pytest.mark.parametrize("vpid", [0, 5])
def test_entries_and_exits_without_a_vpid_invalidate_both_levels(machine: Hypervisor, vpid: int) -> None:
    vcpu = nested_vcpu(machine)
    run(machine, vcpu, op("map", A, GFN), op("read", A), op("map", A, OTHER))
    enter(machine, vcpu, 1, vpid)
    run(machine, vcpu, op("map", B, GFN), op("read", B), op("map", B, OTHER))
    leave(machine, vcpu)
    run(machine, vcpu, op("read", A))
    enter(machine, vcpu, 1, vpid)
    run(machine, vcpu, op("read", B))
    # After a stale use the walk meets the other level's pointers to tables.
    assert set(machine.violations()) == (set() if vpid else {"guest-stale", "l1-stale", "cross-guest"})


@pytest.mark.parametrize(("check", "ends"), [("CONTROLS", False), ("GUEST_STATE", True), ("MSR_LOAD", True)])
@pytest.mark.parametrize("vpid", [0, 5])
def test_an_entry_that_fails_invalidates_once_it_loads_state(
    machine: Hypervisor, check: str, ends: bool, vpid: int
) -> None:
    vcpu = nested_vcpu(machine)
    run(machine, vcpu, op("map", A, GFN), op("read", A), op("map", A, OTHER), vmx("vmptrld", 1))
    run(machine, vcpu, vmx("vmwrite", vpid))
    run(machine, vcpu, vmx("vmlaunch", kind=getattr(lib, f"VMENTRY_{check}")))
    assert machine.exit.invpcid_type == getattr(lib, f"VMENTRY_{check}")
    assert lib.vcpu_guest_mode(machine.m, vcpu) == 0
    run(machine, vcpu, op("read", A))
    assert set(machine.violations()) == ({"guest-stale"} if ends and not vpid else set())


# --- the guest that filled a translation --------------------------------------------------------------------


@pytest.mark.parametrize("first", ["L1", "L2"])
def test_no_guest_uses_what_another_level_has_filled(machine: Hypervisor, first: str) -> None:
    vcpu = nested_vcpu(machine)
    other = 1 if first == "L1" else 0
    run(machine, vcpu, vmx("vmptrld", 1))
    lib.vcpu_set_guest_mode(machine.m, vcpu, 1 - other)
    run(machine, vcpu, op("map", A, GFN), op("read", A))
    lib.vcpu_set_guest_mode(machine.m, vcpu, other)
    run(machine, vcpu, op("map", A, OTHER), op("read", A))
    assert set(machine.violations()) == {"cross-guest"}


def test_nor_a_pointer_to_another_levels_table(machine: Hypervisor) -> None:
    """B is unknown to the TLB, but L1's walk has cached the table that maps it."""
    vcpu = nested_vcpu(machine)
    run(machine, vcpu, vmx("vmptrld", 1))
    lib.vcpu_set_guest_mode(machine.m, vcpu, 1)
    run(machine, vcpu, op("map", B, GFN), op("read", B))
    drop(machine, vcpu)
    lib.vcpu_set_guest_mode(machine.m, vcpu, 0)
    run(machine, vcpu, op("map", A, GFN), op("read", A))
    lib.vcpu_set_guest_mode(machine.m, vcpu, 1)
    run(machine, vcpu, op("read", B))
    assert set(machine.violations()) == {"cross-guest"}


@pytest.mark.parametrize(("vpids", "shared"), [((5, 6), False), ((5, 5), True), ((0, 0), False)])
def test_nested_guests_share_what_has_one_vpid(
    machine: Hypervisor, vpids: tuple[int, int], shared: bool
) -> None:
    vcpu = nested_vcpu(machine, 2)
    enter(machine, vcpu, 1, vpids[0])
    run(machine, vcpu, op("map", A, GFN), op("read", A))
    lib.vcpu_set_guest_mode(machine.m, vcpu, 0)
    enter(machine, vcpu, 2, vpids[1])
    run(machine, vcpu, op("map", A, OTHER), op("read", A))
    assert set(machine.violations()) == (set() if shared else {"cross-guest"})


def test_nor_may_the_nested_guests_of_two_vcpus(machine: Hypervisor) -> None:
    """Both have VPID 5 of their L1, and the processor's VPID of one was the other's."""
    first = nested_vcpu(machine)
    second = nested_vcpu(machine, vm=machine.vm_of[first])
    enter(machine, first, 1, 5)
    run(machine, first, op("map", A, GFN), op("read", A))
    enter(machine, second, 1, 5)
    run(machine, second, op("map", A, OTHER), op("read", A))
    assert set(machine.violations()) == {"cross-guest"}


def test_a_combined_mapping_is_the_vcpus_whose_tables_it_comes_from(machine: Hypervisor) -> None:
    """The guest-physical page behind it was cached by another vCPU."""
    first = nested_vcpu(machine)
    second = nested_vcpu(machine, vm=machine.vm_of[first])
    run(machine, first, op("map", A, GFN), op("read", A))
    lib.flush_invvpid_single(machine.m, CPU0, machine.vm_of[first], Vpid(1), lib.REASON_GUEST)
    run(machine, second, op("map", A, GFN), op("read", A))
    run(machine, second, op("map", A, OTHER), op("invlpg", A), cpu=CPU1)
    run(machine, second, op("read", A))
    assert machine.violations() == {"guest-stale": 1}


def test_guest_physical_mappings_are_of_the_ept_alone(machine: Hypervisor) -> None:
    """Without paging linear addresses are guest-physical; one EPT serves all guests."""
    vcpu = nested_vcpu(machine, 2, paging=0)
    for number in (0, 1, 2, 0, 1):
        lib.vcpu_set_guest_mode(machine.m, vcpu, number)
        run(machine, vcpu, op("read", A), op("write", A))
    assert machine.violations() == {}
    # Only the first guest has walked.
    assert machine.count(lib.COUNT_GPA_MISSES) == 2


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_zapped_page_is_judged_in_every_guest(machine: Hypervisor, number: int) -> None:
    vcpu = nested_vcpu(machine, 2, paging=0)
    run(machine, vcpu, op("read", A))
    machine.zap(CPU0, machine.vm_of[vcpu], A)
    machine.promise(CPU0, machine.vm_of[vcpu], A, lib.PROMISE_NOTIFIER)
    lib.vcpu_set_guest_mode(machine.m, vcpu, number)
    run(machine, vcpu, op("read", A))
    assert machine.violations() == {"stale-after-revoke": 1}


def test_a_root_that_has_become_another_one_is_known_in_every_guest(machine: Hypervisor) -> None:
    """The life of the root page is told apart from the guest that filled an entry."""
    vcpu = nested_vcpu(machine, 1, paging=0)
    vm = machine.vm_of[vcpu]
    run(machine, vcpu, op("read", A))
    lib.ept_table_free(machine.m, CPU0, machine.roots[vm])
    root = machine.new_root()
    assert root == machine.roots[vm], "recycled"
    lib.vmcs_write_eptp(machine.m, machine.vmcs[vcpu], root, Level(4))
    lib.vcpu_set_guest_mode(machine.m, vcpu, 1)
    run(machine, vcpu, op("read", A))
    assert "foreign-root" in machine.violations()


def test_a_nested_guest_may_use_the_guest_physical_page_behind_its_own_mapping(machine: Hypervisor) -> None:
    """L1 has cached it; the rights are those of the EPT, whichever guest they are used by."""
    vcpu = nested_vcpu(machine)
    run(machine, vcpu, op("map", A, GFN), op("write", A))
    lib.flush_invvpid_single(machine.m, CPU0, machine.vm_of[vcpu], Vpid(1), lib.REASON_GUEST)
    enter(machine, vcpu, 1, 5)
    run(machine, vcpu, op("map", A, GFN, lib.GUEST_OP_DIRTY), op("read", A), op("write", A), op("read", A))
    assert machine.violations() == {}
