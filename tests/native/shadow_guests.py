"""Guests for tests without EPT: an OS with processes, and one in real mode."""

from __future__ import annotations

from native import lib
from native.types import AccessKind, Gva, VcpuId
from tests.native.shadow_hypervisor import READ, ShadowHypervisor
from tests.support import CPU0

PAGES = [0x1000 + i for i in range(64)]


def record(page: int, kind: int = READ, offset: int = 0) -> int:
    return kind << 62 | page << 12 | offset


RECORDS = [record(PAGES[(7 * i) % 64], i % 3 == 0, 8 * (i % 512)) for i in range(512)]


def guest(machine: ShadowHypervisor, *, processes: int = 1, vpid: int = 1, **config: int) -> VcpuId:
    """A vCPU whose OS runs processes, powered on."""
    vm = machine.vm(gfns=2048)
    vcpu = machine.vcpu(vm, vpid, **({"paging": 1, "end_gfn": 2048, "pcid": 0} | config))
    for _ in range(processes):
        machine.process(vcpu, RECORDS, PAGES)
    machine.power_on(vcpu)
    return vcpu


def bare(machine: ShadowHypervisor, paging: int = 0) -> VcpuId:
    """A vCPU in real mode whose shadow tables the test fills itself."""
    return machine.vcpu(machine.vm(), 1, paging=paging)


def canonical(linear: int) -> int:
    return linear | 0xFFFF << 48 if linear >> 47 & 1 else linear


def fault(machine: ShadowHypervisor, vcpu: VcpuId, linear: int, kind: int) -> int:
    """One access, which must fault; returns its error code."""
    machine.enter(CPU0, vcpu)
    assert (
        lib.guest_access(machine.m, CPU0, vcpu, Gva(linear), AccessKind(kind), machine.exit)
        == lib.EXIT_EXCEPTION
    )
    assert machine.exit.linear == canonical(linear)
    assert machine.exit.access == kind
    return int(machine.exit.error_code)


MAP, UNMAP, INVLPG, R, W_ = (
    getattr(lib, f"GUEST_OP_{name}") for name in ("MAP", "UNMAP", "INVLPG", "READ", "WRITE")
)
LINEAR = PAGES[3] << 12
