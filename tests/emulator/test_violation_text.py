"""Reports of violations without EPT: the tags of linear mappings, and the flush that was missing."""

from __future__ import annotations

from emulator.report.violation import ReportCollector
from native import lib
from native.types import Gfn
from tests.native.shadow_hypervisor import READ, ShadowHypervisor, Space, Translation
from tests.support import CPU0, VM0


def text_of(machine: ShadowHypervisor) -> str:
    collector = ReportCollector(machine.m)
    collector.poll()
    assert len(collector)
    return collector.report(0, {}, ()).text


def test_a_linear_mapping_has_no_ep4ta() -> None:
    with ShadowHypervisor() as machine:
        vcpu = machine.vcpu(machine.vm(), 3, paging=0)
        machine.map_linear(CPU0, VM0, machine.space[vcpu], 5, Translation(7, True, True))
        machine.access(CPU0, vcpu, 0x5000, READ)
        text = text_of(machine)
        assert text.startswith("guest-stale: read by vCPU 0 of VM 0")
        assert "linear, page 0x5, VPID 3, PCID 0\n" in text
        assert "missing: the synchronization of KVM's table, or the INVVPID" in text


def test_the_vpid_of_another_vcpu() -> None:
    with ShadowHypervisor() as machine:
        first = machine.vcpu(machine.vm(), 3, paging=0)
        machine.access(CPU0, first, 0x5000)
        second = machine.vcpu(VM0, 3, paging=0)
        machine.tree[Space(second, False, 0)] = machine.tree[Space(first, False, 0)]
        machine.switch(second, Space(second, False, 0), 0)
        machine.access(CPU0, second, 0x5000)
        assert "missing: the flush when the VPID's new vCPU first ran" in text_of(machine)


def test_a_store_that_kvm_has_missed() -> None:
    with ShadowHypervisor() as machine:
        vcpu = machine.vcpu(machine.vm(), 3, paging=0)
        machine.map_linear(CPU0, VM0, machine.space[vcpu], 5, Translation(5, True, True))
        assert lib.oracle_track_writes(machine.m, CPU0, VM0, Gfn(5), True) == 0
        machine.access(CPU0, vcpu, 0x5000, lib.ACCESS_WRITE)
        text = text_of(machine)
        assert text.startswith("missed-guest-write: write by vCPU 0")
        assert "missing: the write-protection of the table" in text
