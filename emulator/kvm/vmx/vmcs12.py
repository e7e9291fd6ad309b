"""arch/x86/kvm/vmx/vmcs12.h, nested.h, vmx.h: the VMCSs that L1 keeps, and KVM's state of nested VMX."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from native.types import Gfn, Vpid

if TYPE_CHECKING:
    from emulator.kvm.structs import Vcpu
    from emulator.kvm.vmx.vmcs import LoadedVmcs


class ControlRegisters(NamedTuple):
    """The fields of a VMCS's guest-state or host-state area that decide about roots."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    pdptrs: tuple[int, int, int, int]


class Vmcs12:
    """struct vmcs12: the VMCS of a nested guest (L2), in L1's memory.

    number: stands for its address, and is the nested guest's number.  ept_pointer: EPT_POINTER; 0: L1 has no
    EPT for L2, so L2's guest-physical addresses are L1's.  apic_access_gfn: the page of APIC_ACCESS_ADDR; 0:
    "virtualize APIC accesses" is 0.  guest_state: L2's control registers while L1 runs; None before the first
    VM entry to L2.  host_state: L1's control registers while L2 runs.
    """

    __slots__ = (
        "apic_access_gfn",
        "ept_pointer",
        "guest_state",
        "host_state",
        "number",
        "virtual_processor_id",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.virtual_processor_id = 0
        self.ept_pointer = 0
        self.apic_access_gfn = Gfn(0)
        self.guest_state: ControlRegisters | None = None
        self.host_state: ControlRegisters | None = None


class NestedVmx:
    """struct nested_vmx.

    vmcs12s: the VMCSs in L1's memory.  current: that of the last VMPTRLD (current_vmptr), or None.
    vpid02 stands for every VPID that L1 gives to its guests; last_vpid is the one that it stood for last.
    smm_vmxon, smm_guest_mode: what vmxon and is_guest_mode() were before SMM, for RSM.
    """

    __slots__ = (
        "current",
        "last_vpid",
        "smm_guest_mode",
        "smm_vmxon",
        "vmcs02",
        "vmcs12s",
        "vmxon",
        "vpid02",
    )

    def __init__(self) -> None:
        self.vmxon = False
        self.vmcs12s: dict[int, Vmcs12] = {}
        self.current: Vmcs12 | None = None
        self.vmcs02: LoadedVmcs | None = None
        self.vpid02 = Vpid(0)
        self.last_vpid = 0
        self.smm_vmxon = False
        self.smm_guest_mode = False

    def vmcs12(self) -> Vmcs12:
        """get_vmcs12()"""
        assert self.current is not None
        return self.current


def nested_cpu_has_vpid(vmcs12: Vmcs12) -> bool:
    """nested_cpu_has_vpid(): return whether L1 has given its guest a VPID."""
    return vmcs12.virtual_processor_id != 0


def nested_cpu_has_ept(vmcs12: Vmcs12) -> bool:
    """nested_cpu_has_ept(): return whether L1 has enabled EPT for L2."""
    return vmcs12.ept_pointer != 0


def nested_cpu_virtualizes_apic(vmcs12: Vmcs12) -> bool:
    """nested_cpu_has2(SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES)"""
    return vmcs12.apic_access_gfn != 0


def nested_get_vpid02(vcpu: Vcpu) -> Vpid:
    """nested_get_vpid02(): return the VPID of nested guests that have one; L1's where none was left."""
    return vcpu.nested.vpid02 or vcpu.vpid
