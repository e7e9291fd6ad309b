"""Reports of violations of nested guests: the guest that filled the entry, and the one that used it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emulator.report.result import Report
from emulator.report.violation import ReportCollector
from native import lib
from native.types import VcpuId
from tests.native.hypervisor import Hypervisor
from tests.native.nested_rig import A, nested_vcpu, vmx
from tests.native.test_program import op, run
from tests.support import CPU0

GFN, OTHER = 0x10, 0x11


@pytest.fixture
def machine() -> Iterator[Hypervisor]:
    with Hypervisor(l2_entries=0, psc_entries=0) as h:
        yield h


def report_of(machine: Hypervisor) -> Report:
    collector = ReportCollector(machine.m)
    collector.poll()
    return collector.report(0, {}, ())


def l2_maps_and_reads(machine: Hypervisor, vcpu: VcpuId, vpid: int) -> None:
    for insn in (vmx("vmptrld", 1), vmx("vmwrite", vpid)):
        run(machine, vcpu, insn)
    lib.vcpu_set_guest_mode(machine.m, vcpu, 1)
    run(machine, vcpu, op("map", A, GFN), op("read", A))


def test_l2_uses_a_mapping_that_l1_has_invalidated(machine: Hypervisor) -> None:
    vcpu = nested_vcpu(machine)
    l2_maps_and_reads(machine, vcpu, 5)
    run(machine, vcpu, op("map", A, OTHER))
    lib.vcpu_set_guest_mode(machine.m, vcpu, 0)
    run(machine, vcpu, vmx("invvpid", 5, 1))
    lib.vcpu_set_guest_mode(machine.m, vcpu, 1)
    run(machine, vcpu, op("read", A))
    report = report_of(machine)
    assert report.text.startswith(
        "l1-stale: read by vCPU 0 of VM 0 in nested guest 1 with VPID 5 of L1's on CPU 0\n"
    )
    assert "\n  filled by: vCPU 0 of VM 0 in nested guest 1 with VPID 5 of L1's on CPU 0, " in report.text
    assert "\n  revoked: L1 invalidated it (INVVPID, or a VM entry or VM exit" in report.text
    assert "\n  missing: the flush of the nested guest's VPID for L1's invalidation\n" in f"{report.text}\n"


def test_l1_uses_a_mapping_of_l2(machine: Hypervisor) -> None:
    vcpu = nested_vcpu(machine)
    l2_maps_and_reads(machine, vcpu, 0)
    lib.vcpu_set_guest_mode(machine.m, vcpu, 0)
    run(machine, vcpu, op("map", A, OTHER), op("read", A))
    report = report_of(machine)
    assert report.text.startswith("cross-guest: read by vCPU 0 of VM 0 in L1 on CPU 0\n")
    assert "\n  filled by: vCPU 0 of VM 0 in nested guest 1 on CPU 0, " in report.text
    assert "\n  revoked: never this guest's\n" in report.text
    assert "missing: tags that tell L1 and L2 apart (role.guest_mode, vpid02)" in report.text


def test_without_nested_guests_no_level_is_told(machine: Hypervisor) -> None:
    vcpu = nested_vcpu(machine, numbers=0)
    run(machine, vcpu, op("map", A, GFN), op("read", A))
    machine.zap(CPU0, machine.vm_of[vcpu], GFN)
    machine.promise(CPU0, machine.vm_of[vcpu], GFN, lib.PROMISE_NOTIFIER)
    run(machine, vcpu, op("read", A))
    report = report_of(machine)
    assert report.text.startswith("stale-after-revoke: read by vCPU 0 of VM 0 on CPU 0\n")
    assert "nested" not in report.details
    assert "nested" not in report.details["entry"]
