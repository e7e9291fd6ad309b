"""A vCPU with nested guests, under a hypervisor with one root and one VPID for all, and without flushes."""

from __future__ import annotations

from typing import Final

from native import ffi, lib
from native.types import VcpuId, VmId
from tests.native.hypervisor import Hypervisor

# Pages that every guest may map.
A: Final = 0x100
B: Final = 0x101
INSN: Final = {
    name: getattr(lib, f"GUEST_INSN_{name.upper()}")
    for name in ("vmptrld", "vmclear", "vmwrite", "vmlaunch", "vmcall", "invvpid", "vmxoff")
}


def vmx(insn: str, value: int = 0, kind: int = 0, page: int = 0) -> dict[str, int]:
    flags = INSN[insn] | kind << 8
    return {"kind": lib.GUEST_OP_VMX, "linear": page << 12, "value": value, "flags": flags}


def nested_vcpu(machine: Hypervisor, numbers: int = 1, vm: int = -1, **guest: int) -> VcpuId:
    """A vCPU, of a new VM if none is given, with so many nested guests; each has tables of its own."""
    settings = {"paging": 1, "pcid": 0, **guest}
    above = 1024 if vm < 0 else 512
    of = machine.vm(1024) if vm < 0 else VmId(vm)
    vcpu = machine.vcpu(of, 1, first_gfn=above - 64, end_gfn=above, **settings)
    machine.process(vcpu, [], [A, B])
    for number in range(1, numbers + 1):
        assert lib.guest_create_nested(machine.m, vcpu, number) == 0
        lib.vcpu_set_guest_mode(machine.m, vcpu, number)
        end = above - 64 * number
        values = {"first_gfn": end - 64, "end_gfn": end, "seed": 1, **settings}
        lib.guest_configure(machine.m, vcpu, ffi.new("struct guest_config *", values))
        machine.process(vcpu, [], [A, B])
        lib.vcpu_set_guest_mode(machine.m, vcpu, 0)
    return vcpu
