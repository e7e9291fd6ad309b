"""Nested VMX: VMXON and VMXOFF, the current VMCS12, and the end of a vCPU in L2."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emulator.kvm.mmu.spte import root_to_sp
from emulator.kvm.regs import sregs_of
from emulator.kvm.smm import emulator_leave_smm, kvm_inject_smi
from emulator.kvm.vmx.vmx import vmx_get_current_vpid
from native import lib
from tests.emulator.kvm.rig import Rig, online, scopes
from tests.fidelity.nested import HOME, NestedBench, Run, guest_map, guest_read, vmx

RUN = Run("test", ept=True, vpid=True, steps=())


@pytest.fixture
def bench(rig: Rig) -> Iterator[NestedBench]:
    yield NestedBench(rig, RUN, "linux-7.3")
    assert rig.violations() == {}


def test_vmxoff_gives_back_the_vpid_and_the_vmcs(bench: NestedBench) -> None:
    free = bench.rig.machine.vmx_vpids
    left = len(free)
    vpid02 = bench.vcpu.nested.vpid02
    assert vpid02 not in (0, bench.vcpu.vpid)
    for _ in range(3):
        bench.step("setup const")
        bench.step("touch")
        bench.execute(vmx("VMXOFF"))
        assert (len(free), free[-1]) == (left + 1, vpid02)
        assert bench.vcpu.nested.vmcs02 is None
        # The core has room for two VMCSs of this vCPU.
        bench.execute(vmx("VMXON"))
        assert (bench.vcpu.nested.vpid02, bench.vcpu.nested.last_vpid) == (vpid02, 0)


def test_without_a_vpid_left_nested_guests_have_that_of_l1(bench: NestedBench) -> None:
    """L1 and L2 map one linear page to pages of their own: the roots tell their translations apart."""
    vcpu, free = bench.vcpu, bench.rig.machine.vmx_vpids
    bench.execute(vmx("VMXOFF"))
    left, free[:] = list(free), []
    bench.execute(vmx("VMXON"))
    assert vcpu.nested.vpid02 == 0
    bench.step("setup const")
    bench.step("start")
    assert vmx_get_current_vpid(vcpu) == vcpu.vpid
    bench.execute(guest_map(HOME, 0x12), guest_read(HOME), vmx("VMCALL"))
    bench.execute(vmx("INVVPID", 5, 1))
    bench.execute(vmx("VMXOFF"))
    assert free == []
    free[:] = left


def test_a_vcpu_may_end_in_l2(bench: NestedBench) -> None:
    free = bench.rig.machine.vmx_vpids
    left = len(free)
    bench.step("setup const")
    bench.step("start")
    assert lib.vcpu_guest_mode(bench.rig.machine.m, bench.vcpu.id) == 1
    bench.l1.run.close()
    bench.rig.destroy(bench.kvm)
    assert len(free) == left + 2
    assert lib.frames_in_use(bench.rig.machine.m, lib.FRAME_ROOT) == 0


def test_the_current_vmcs12(bench: NestedBench) -> None:
    def current() -> tuple[int, int]:
        vmcs12 = bench.vcpu.nested.current
        return (vmcs12.number, vmcs12.virtual_processor_id) if vmcs12 is not None else (0, 0)

    bench.execute(vmx("VMPTRLD", 1), vmx("VMWRITE", 7))
    assert current() == (1, 7)
    bench.execute(vmx("VMCLEAR", 2))
    assert current() == (1, 7)
    bench.execute(vmx("VMPTRLD", 2))
    assert current() == (2, 0)
    bench.execute(vmx("VMCLEAR", 2))
    assert current() == (0, 0)
    bench.execute(vmx("VMPTRLD", 1))
    assert current() == (1, 7), "it keeps its VPID"


def test_each_vmcs_remembers_its_pcpu(bench: NestedBench) -> None:
    vcpu = bench.vcpu
    vmcs02 = vcpu.nested.vmcs02
    assert vmcs02 is not None
    bench.step("setup const")
    bench.step("round")
    assert (vcpu.vmcs01.cpu, vmcs02.cpu) == (0, 0)
    bench.step("migrate 1")
    assert (vcpu.vmcs01.cpu, vmcs02.cpu) == (1, 0)
    bench.step("start")
    assert vcpu.loaded_vmcs is vmcs02
    bench.step("migrate 2")
    assert (vcpu.vmcs01.cpu, vmcs02.cpu) == (1, 2)
    bench.step("stop")
    assert vcpu.loaded_vmcs is vcpu.vmcs01
    assert (vcpu.vmcs01.cpu, vmcs02.cpu) == (2, 2)


@pytest.mark.parametrize("ept", [True, False])
@pytest.mark.parametrize("check", ["CONTROLS", "GUEST_STATE", "MSR_LOAD"])
def test_a_vm_entry_that_fails_leaves_l1_as_it_was(rig: Rig, check: str, ept: bool) -> None:
    """L1 goes on with vmcs01 and its own root.  Only the last check comes after last_vpid was written: KVM
    has flushed vpid02 by then, and the next VM entry flushes it no more."""
    bench = NestedBench(rig, Run("test", ept=ept, vpid=True, steps=()), "linux-7.3")
    vcpu = bench.vcpu
    bench.step("setup const")
    bench.step("touch")
    bench.execute(vmx("VMWRITE", 9))
    root, registers = vcpu.root_mmu.root, sregs_of(vcpu)

    def flushes() -> int:
        return scopes(rig)["invvpid_single"]

    before = flushes()
    bench.execute(vmx("VMLAUNCH", kind=getattr(lib, f"VMENTRY_{check}")))
    assert not vcpu.arch.guest_mode
    assert lib.vcpu_guest_mode(rig.machine.m, vcpu.id) == 0
    assert vcpu.loaded_vmcs is vcpu.vmcs01
    assert vcpu.mmu is vcpu.root_mmu
    assert vcpu.root_mmu.root is root
    assert sregs_of(vcpu) == registers
    noticed = check == "MSR_LOAD"
    assert (vcpu.nested.last_vpid, flushes() - before) == ((9, 1) if noticed else (5, 0))
    bench.execute(vmx("VMLAUNCH"), guest_read(HOME), vmx("VMCALL"))
    assert (vcpu.nested.last_vpid, flushes() - before) == (9, 1)
    assert rig.violations() == {}


@pytest.mark.parametrize("vpid", ["none", "const"])
@pytest.mark.parametrize("inside", [False, True])
def test_smm_leaves_vmx_operation_and_rsm_goes_back(bench: NestedBench, inside: bool, vpid: str) -> None:
    """The handler runs with vmcs01 and SMM's root, and L2 goes on with the registers that it had."""
    vcpu, rig = bench.vcpu, bench.rig
    rig.smm_slots(bench.kvm)
    bench.step(f"setup {vpid}")
    bench.step("start" if inside else "touch")
    vmcs, registers, sp = vcpu.loaded_vmcs, sregs_of(vcpu), root_to_sp(vcpu.mmu.root)
    host_state = vcpu.nested.vmcs12().host_state
    assert (vmcs is vcpu.nested.vmcs02) == inside
    kvm_inject_smi(rig.host, vcpu)
    bench.execute()
    inner = root_to_sp(vcpu.mmu.root)
    assert (vcpu.arch.smm, vcpu.arch.guest_mode, vcpu.nested.vmxon) == (True, False, False)
    assert vcpu.loaded_vmcs is vcpu.vmcs01
    assert inner is not None
    assert (inner.role.smm, inner.role.guest_mode) == (1, False)
    cpu = rig.machine.cpus[bench.l1.pcpu]
    with online(cpu):
        emulator_leave_smm(cpu, vcpu)
    bench.execute()
    assert (vcpu.arch.smm, vcpu.arch.guest_mode, vcpu.nested.vmxon) == (False, inside, True)
    assert (vcpu.loaded_vmcs, sregs_of(vcpu), root_to_sp(vcpu.mmu.root)) == (vmcs, registers, sp)
    assert vcpu.nested.vmcs12().host_state == host_state
    assert not vcpu.nested.smm_guest_mode
    if inside:
        bench.execute(vmx("VMCALL"))
    bench.execute(vmx("VMXOFF"))
