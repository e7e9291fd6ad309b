"""arch/x86/kvm/vmx/vmx_ops.h: INVEPT and INVVPID, and KVM's notice of one that fails."""

from __future__ import annotations

from typing import Final

from emulator.kvm.structs import Kvm
from emulator.machine.runtime import Cpu
from native import lib
from native.types import FlushReason, LinearPage, Vpid

VMX_EPT_EXTENT_CONTEXT: Final = 1
VMX_VPID_EXTENT_INDIVIDUAL_ADDR: Final = 0
VMX_VPID_EXTENT_SINGLE_CONTEXT: Final = 1
VMX_VPID_EXTENT_SINGLE_NON_GLOBAL: Final = 3


def ept_sync_context(cpu: Cpu, kvm: Kvm, eptp: int, reason: FlushReason) -> None:
    """ept_sync_context(): execute INVEPT single-context."""
    if lib.flush_invept_single(cpu.m, cpu.id, kvm.id, eptp, reason):
        invept_error(VMX_EPT_EXTENT_CONTEXT, eptp)


def invvpid_single_context(cpu: Cpu, kvm: Kvm, vpid: Vpid, reason: FlushReason) -> None:
    """Execute INVVPID single-context, as __invvpid() does."""
    if lib.flush_invvpid_single(cpu.m, cpu.id, kvm.id, vpid, reason):
        invvpid_error(VMX_VPID_EXTENT_SINGLE_CONTEXT, vpid, 0)


def invvpid_individual_addr(cpu: Cpu, kvm: Kvm, vpid: Vpid, gva: int, reason: FlushReason) -> None:
    """Execute INVVPID individual-address, as __invvpid() does."""
    if lib.flush_invvpid_address(cpu.m, cpu.id, kvm.id, vpid, LinearPage(gva >> 12), reason):
        invvpid_error(VMX_VPID_EXTENT_INDIVIDUAL_ADDR, vpid, gva)


def invvpid_single_non_global(cpu: Cpu, kvm: Kvm, vpid: Vpid, reason: FlushReason) -> None:
    """Execute INVVPID single-context-retaining-globals, as __invvpid() would."""
    if lib.flush_invvpid_retain_globals(cpu.m, cpu.id, kvm.id, vpid, reason):
        invvpid_error(VMX_VPID_EXTENT_SINGLE_NON_GLOBAL, vpid, 0)


# A failed instruction (VMfail) has invalidated nothing.  The kernel's WARN_ONCE is where the machine stops,
# as under panic_on_warn: nothing that follows is worth a verdict.


def invept_error(ext: int, eptp: int) -> None:
    """Stop with the warning of invept_error()."""
    raise AssertionError(f"WARN_ONCE: invept failed: ext={ext:#x} eptp={eptp:#x}")


def invvpid_error(ext: int, vpid: Vpid, gva: int) -> None:
    """Stop with the warning of invvpid_error()."""
    raise AssertionError(f"WARN_ONCE: invvpid failed: ext={ext:#x} vpid={vpid} gva={gva:#x}")
