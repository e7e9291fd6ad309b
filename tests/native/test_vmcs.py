"""VMCSs: active on one pCPU at most, current by VMPTRLD, and the context with which guest mode runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from native import ffi, lib
from native.types import AccessKind, CpuId, Gva, Level, VcpuId, VmcsId, Vpid
from tests.native.hypervisor import READ, Hypervisor
from tests.support import CPU0, CPU1, VM0

HOUSEKEEPING = CpuId(2)


@pytest.fixture
def machine() -> Iterator[Hypervisor]:
    with Hypervisor() as h:
        h.vm()
        yield h


def error(machine: Hypervisor, cpu: CpuId) -> str:
    return ffi.string(lib.machine_error_text(machine.m, cpu)).decode()


def entry(machine: Hypervisor, cpu: CpuId, vcpu: VcpuId) -> int:
    """VM entry without VMPTRLD, and one access that is cached or exits."""
    lib.local_irq_disable(machine.m, cpu, b"test")
    lib.vcpu_set_mode(machine.m, vcpu, lib.IN_GUEST_MODE)
    return int(lib.guest_access(machine.m, cpu, vcpu, Gva(0x5000), AccessKind(READ), machine.exit))


def vmclear_by_ipi(machine: Hypervisor, target: CpuId, vmcs: VmcsId) -> None:
    m = machine.m
    assert (
        lib.smp_call_function_single(m, HOUSEKEEPING, target, lib.IPI_VMCS_CLEAR, vmcs, lib.IPI_NO_WAIT) == 1
    )
    assert lib.ipi_drain(m, target) == 1


def test_vmptrld_makes_current_and_vmclear_makes_nothing_current(machine: Hypervisor) -> None:
    first, second = (machine.vmcs[machine.vcpu(VM0, vpid)] for vpid in (1, 2))
    assert lib.vmptrst(machine.m, CPU0) == -1
    for vmcs in (first, second, first):
        assert lib.vmptrld(machine.m, CPU0, vmcs) == 0
        assert lib.vmptrst(machine.m, CPU0) == vmcs
    assert lib.vmclear(machine.m, CPU0, second) == 0
    assert lib.vmptrst(machine.m, CPU0) == first, "active is not current"
    assert lib.vmclear(machine.m, CPU0, first) == 0
    assert lib.vmptrst(machine.m, CPU0) == -1


def test_a_vmcs_is_active_on_one_pcpu_at_most(machine: Hypervisor) -> None:
    vmcs = machine.vmcs[machine.vcpu(VM0, 1)]
    assert lib.vmptrld(machine.m, CPU0, vmcs) == 0
    assert lib.vmptrld(machine.m, CPU1, vmcs) == lib.MACHINE_MISUSE
    found = "which is active on CPU 0: VMCLEAR must run there first"
    assert error(machine, CPU1) == f"VMPTRLD on CPU 1 of VMCS {vmcs}, {found}"
    assert lib.vmclear(machine.m, CPU1, vmcs) == lib.MACHINE_MISUSE
    assert error(machine, CPU1) == f"VMCLEAR on CPU 1 of VMCS {vmcs}, which is active on CPU 0"
    assert lib.vmptrst(machine.m, CPU0) == vmcs
    vmclear_by_ipi(machine, CPU0, vmcs)
    assert lib.vmptrst(machine.m, CPU0) == -1
    assert lib.vmptrld(machine.m, CPU1, vmcs) == 0


def test_a_vmcs_that_is_active_cannot_be_destroyed(machine: Hypervisor) -> None:
    vmcs = machine.vmcs[machine.vcpu(VM0, 1)]
    other = VmcsId(lib.vmcs_create(machine.m, VcpuId(0), Vpid(7)))
    assert lib.vmptrld(machine.m, CPU0, vmcs) == 0
    assert lib.vmptrld(machine.m, CPU0, other) == 0
    assert lib.vmcs_destroy(machine.m, HOUSEKEEPING, vmcs) == lib.MACHINE_MISUSE, "not current, but active"
    assert "while it is active on CPU 0" in error(machine, HOUSEKEEPING)
    vmclear_by_ipi(machine, CPU0, vmcs)
    assert lib.vmcs_destroy(machine.m, HOUSEKEEPING, vmcs) == 0
    assert lib.vmcs_destroy(machine.m, HOUSEKEEPING, vmcs) == lib.MACHINE_MISUSE
    assert error(machine, HOUSEKEEPING) == f"CPU 2: there is no VMCS {vmcs}"
    assert lib.vmptrst(machine.m, CPU0) == other


def test_the_ipi_leaves_a_vmcs_alone_that_is_active_elsewhere(machine: Hypervisor) -> None:
    vmcs = machine.vmcs[machine.vcpu(VM0, 1)]
    assert lib.vmptrld(machine.m, CPU0, vmcs) == 0
    vmclear_by_ipi(machine, CPU1, vmcs)
    assert lib.vmptrst(machine.m, CPU0) == vmcs
    assert lib.vmptrld(machine.m, CPU1, vmcs) == lib.MACHINE_MISUSE


def test_an_offline_pcpu_holds_no_vmcs_back(machine: Hypervisor) -> None:
    """It runs no VMCLEAR; a VMCS that was loaded elsewhere meanwhile is not current when it is back."""
    vcpu = machine.vcpu(VM0, 1)
    vmcs = machine.vmcs[vcpu]
    assert lib.vmptrld(machine.m, CPU0, vmcs) == 0
    lib.cpu_offline(machine.m, CPU0)
    assert lib.vmptrld(machine.m, CPU1, vmcs) == 0
    lib.cpu_online(machine.m, CPU0)
    assert lib.vmptrst(machine.m, CPU0) == -1
    assert entry(machine, CPU0, vcpu) == lib.MACHINE_MISUSE


def test_entry_needs_a_current_vmcs_of_the_vcpu(machine: Hypervisor) -> None:
    vcpu, other = machine.vcpu(VM0, 1), machine.vcpu(VM0, 2)
    expected = f"VM entry on CPU 0, where no VMCS of vCPU {vcpu} is current"
    assert entry(machine, CPU0, vcpu) == lib.MACHINE_MISUSE
    assert error(machine, CPU0) == expected
    lib.vmptrld(machine.m, CPU0, machine.vmcs[other])
    assert entry(machine, CPU0, vcpu) == lib.MACHINE_MISUSE
    assert error(machine, CPU0) == expected
    lib.vmptrld(machine.m, CPU0, machine.vmcs[vcpu])
    assert entry(machine, CPU0, vcpu) == lib.EXIT_EPT_VIOLATION


@pytest.mark.parametrize("paging", [0, 1])
def test_guest_mode_runs_with_the_context_of_the_current_vmcs(machine: Hypervisor, paging: int) -> None:
    """The mappings of a vCPU's two VMCSs, as those of L1 and L2, bear each VMCS's VPID and EP4TA, and come
    from its root."""
    vcpu = machine.vcpu(VM0, 1, paging=paging)
    machine.process(vcpu, [0x5000], [5])
    first, second = machine.vmcs[vcpu], VmcsId(lib.vmcs_create(machine.m, vcpu, Vpid(2)))
    roots = {first: machine.roots[VM0], second: machine.new_root()}
    lib.vmcs_write_eptp(machine.m, second, roots[second], Level(4))
    for vmcs in (first, second):
        machine.vmcs[vcpu], machine.roots[VM0] = vmcs, roots[vmcs]
        machine.access(CPU0, vcpu, 0x5000)
    entries = ffi.new("struct tlb_entry[]", 64)
    tlb = lib.cpu_tlb(machine.m, CPU0)
    found = [entries[i] for i in range(lib.tlb_dump(tlb, entries, 64))]
    combined = {(e.vpid, e.ep4ta) for e in found if e.kind == lib.KIND_COMBINED}
    assert {e.ep4ta for e in found} == set(roots.values())
    assert combined == ({(1, roots[first]), (2, roots[second])} if paging else set())
    assert machine.violations() == {}


def test_numbers_are_used_again(machine: Hypervisor) -> None:
    vcpu = machine.vcpu(VM0, 1)
    created = [VmcsId(lib.vmcs_create(machine.m, vcpu, Vpid(vpid))) for vpid in range(2, 9)]
    assert lib.vmcs_create(machine.m, vcpu, Vpid(9)) == lib.MACHINE_NOMEM, "two for each of four vCPUs"
    assert lib.vmcs_destroy(machine.m, CPU0, created[3]) == 0
    assert lib.vmcs_create(machine.m, vcpu, Vpid(9)) == created[3]
    assert lib.vmcs_create(machine.m, VcpuId(3), Vpid(9)) == lib.MACHINE_MISUSE, "no such vCPU"
