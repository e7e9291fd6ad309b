"""Loading a vCPU's VMCS on a pCPU, and clearing it before it goes."""

from __future__ import annotations

import pytest

from emulator.kvm.vmx import vmcs as vmx_vmcs
from emulator.machine.runtime import MachineMisuse
from native import lib
from tests.emulator.kvm.rig import Rig


@pytest.mark.parametrize("clears", [True, False])
def test_a_vm_is_destroyed_after_vmclear(rig: Rig, monkeypatch: pytest.MonkeyPatch, clears: bool) -> None:
    """free_loaded_vmcs() executes VMCLEAR where the VMCS is active; freeing it without that is an error."""
    guest = rig.guest(kvm := rig.vm())
    guest.write(0, 5)
    vmcs, m = guest.vcpu.loaded_vmcs.vmcs, rig.machine.m
    pcpu = rig.machine.cpus[0]
    assert lib.vmptrst(m, pcpu.id) == vmcs
    guest.run.close()
    # Halted: the sender runs its calls.
    lib.cpu_online(m, pcpu.id)
    lib.cpu_idle(m, pcpu.id)
    if clears:
        rig.destroy(kvm)
        assert lib.vmptrst(m, pcpu.id) == -1
        assert lib.vmptrld(m, pcpu.id, vmcs) == lib.MACHINE_MISUSE, "it does not exist any more"
        return
    monkeypatch.setattr(vmx_vmcs, "loaded_vmcs_clear", lambda *_: None)
    with pytest.raises(MachineMisuse, match=f"VMCS {vmcs} .* destroyed while it is active"):
        rig.destroy(kvm)


def test_another_vcpus_vmcs_is_replaced_where_it_is_current(rig: Rig) -> None:
    """Both stay active on the pCPU; which one is current changes without VMCLEAR."""
    kvm = rig.vm()
    first, second = rig.guest(kvm), rig.guest(kvm)
    for guest in (first, second, first, second):
        guest.write(0, 5)
        assert lib.vmptrst(rig.machine.m, rig.machine.cpus[0].id) == guest.vcpu.loaded_vmcs.vmcs
        assert guest.vcpu.loaded_vmcs.cpu == 0
