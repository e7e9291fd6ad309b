"""arch/x86/kvm/vmx/vmx.c: the flush hooks, EPT_POINTER, VPIDs, and loading a VMCS on a pCPU."""

from __future__ import annotations

from typing import Final, Literal

from emulator.kvm.accounting import flush_elided
from emulator.kvm.decisions import Tracking
from emulator.kvm.kvm_host import KVM_REQ_TLB_FLUSH, PG_LEVEL_256T
from emulator.kvm.mmu.root_tracking import active_roots, mmu_roots, root_tlb_gen_is_old, test_and_set_flushed
from emulator.kvm.structs import Kvm, KvmMmu, KvmMmuPage, Vcpu
from emulator.kvm.virt.requests import kvm_make_request
from emulator.kvm.vmx.vmcs import free_loaded_vmcs, free_vpid, loaded_vmcs_clear
from emulator.machine.runtime import Cpu
from native import lib
from native.types import FlushReason, Hfn

# EPTP (SDM vol. 3C, 25.6.11): memory type, levels - 1, accessed and dirty flags enabled, page of the root.
VMX_EPTP_MT_WB: Final = 6
VMX_EPTP_PWL_4: Final = 3 << 3
VMX_EPTP_PWL_5: Final = 4 << 3
VMX_EPTP_AD_ENABLE_BIT: Final = 1 << 6
# INVALID_PAGE: the result of construct_eptp() for a root without a shadow page.
INVALID_EPTP: Final = -1


def root_to_sp(root: KvmMmuPage) -> KvmMmuPage | None:
    """root_to_sp(): return None for a root that has no shadow page (a dummy root, PAE roots)."""
    return None if root.special else root


def construct_eptp(cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> int:
    """construct_eptp(): build the EPTP from the root's role, not from a vCPU's state, because callers also
    pass roots that are not current."""
    sp = root_to_sp(root)
    if sp is None:
        warn_on_once(cpu, kvm, "construct_eptp: the root has no shadow page")
        return INVALID_EPTP
    levels = VMX_EPTP_PWL_5 if sp.role.level == PG_LEVEL_256T else VMX_EPTP_PWL_4
    return sp.hfn << 12 | VMX_EPTP_MT_WB | levels | VMX_EPTP_AD_ENABLE_BIT


def warn_on_once(cpu: Cpu, kvm: Kvm, what: str) -> None:
    """WARN_ON_ONCE(): keep the warning with the VM, because threads of pCPUs do not print."""
    kvm.warned.add(what)


def vmx_flush_tlb_ept_root(cpu: Cpu, kvm: Kvm, root: KvmMmuPage, reason: FlushReason) -> None:
    """vmx_flush_tlb_ept_root(): execute INVEPT single, or global if the root has no EPTP."""
    eptp = construct_eptp(cpu, kvm, root)
    cpu.point("tlb", cpu.id, "write")
    if eptp != INVALID_EPTP:
        lib.flush_invept_single(cpu.m, cpu.id, kvm.id, Hfn(eptp >> 12), reason)
    else:
        lib.flush_invept_global(cpu.m, cpu.id, kvm.id, reason)


def vmx_flush_tlb_all(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """vmx_flush_tlb_all(): execute INVEPT global, which drops the entries of every VM on this pCPU.

    Neither INVVPID nor VM entry drops guest-physical mappings.  Mutant P7: INVVPID.
    """
    cpu.stat(vcpu.kvm.id, lib.STAT_FLUSH_ALL)
    cpu.point("tlb", cpu.id, "write")
    if "P7" in vcpu.kvm.policy.bugs:
        lib.flush_invvpid_single(cpu.m, cpu.id, vcpu.kvm.id, vcpu.vpid, reason)
    else:
        lib.flush_invept_global(cpu.m, cpu.id, vcpu.kvm.id, reason)


def vmx_flush_tlb_current(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """vmx_flush_tlb_current(): execute INVEPT single on the current root; do nothing without one."""
    if vcpu.mmu.root is None:
        return
    cpu.stat(vcpu.kvm.id, lib.STAT_FLUSH_CURRENT)
    vmx_flush_tlb_ept_root(cpu, vcpu.kvm, vcpu.mmu.root, reason)


def vmx_flush_tlb_roots(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """Execute INVEPT single on each root that this vCPU can use without kvm_mmu_load, as proposed on the list
    in 2025."""
    for root in active_roots(vcpu):
        vmx_flush_tlb_ept_root(cpu, vcpu.kvm, root, reason)


def vmx_flush_tlb_old_roots(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """Execute INVEPT single on each of these roots if its generation moved on since this pCPU flushed it."""
    for root in active_roots(vcpu):
        if test_and_set_flushed(cpu, root, "root-tlb-gen"):
            flush_elided(cpu, vcpu.kvm, reason, root.hfn)
        else:
            vmx_flush_tlb_ept_root(cpu, vcpu.kvm, root, reason)


def vmx_flush_tlb_guest(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """vmx_flush_tlb_guest(): execute INVVPID single-context on the current VPID, never INVEPT.

    Mutant P8 executes INVEPT single on the current root, which drops the required entries and others.
    """
    cpu.stat(vcpu.kvm.id, lib.STAT_FLUSH_GUEST)
    if "P8" in vcpu.kvm.policy.bugs and vcpu.mmu.root is not None:
        vmx_flush_tlb_ept_root(cpu, vcpu.kvm, vcpu.mmu.root, reason)
        return
    cpu.point("tlb", cpu.id, "write")
    lib.flush_invvpid_single(cpu.m, cpu.id, vcpu.kvm.id, vcpu.vpid, reason)


def vmx_load_mmu_pgd(cpu: Cpu, vcpu: Vcpu, root: KvmMmuPage) -> None:
    """vmx_load_mmu_pgd(): write EPT_POINTER."""
    lib.vmcs_write_eptp(cpu.m, vcpu.loaded_vmcs.vmcs, root.hfn, root.role.level)


def vmx_vcpu_load_vmcs(cpu: Cpu, vcpu: Vcpu) -> None:
    """vmx_vcpu_load_vmcs(): load the VMCS; if it was loaded on another pCPU before, flush for the migration.

    The check is of loaded_vmcs.cpu, not of vcpu->cpu, so coming back to the pCPU on which the vCPU ran last
    is free.  This pCPU may hold two kinds of stale entries: those of SPTEs that KVM changed, and those that
    the guest invalidated natively, while the vCPU was elsewhere.
    """
    last = vcpu.loaded_vmcs.cpu
    if last != cpu.id:
        loaded_vmcs_clear(cpu, vcpu.kvm.id, vcpu.loaded_vmcs)
    # Another VMCS may be current here, even where this one is still active.
    cpu.check(lib.vmptrld(cpu.m, cpu.id, vcpu.loaded_vmcs.vmcs))
    if last == cpu.id:
        return
    cpu.event(lib.EVENT_LOAD, vcpu.id, last & 0xFFFFFFFF)
    if last != -1:
        cpu.stat(vcpu.kvm.id, lib.STAT_MIGRATIONS)
    migration_ept(cpu, vcpu)
    migration_vpid(cpu, vcpu)
    vcpu.loaded_vmcs.cpu = cpu.id


def migration_ept(cpu: Cpu, vcpu: Vcpu) -> None:
    """Flush guest-physical mappings, and with them the combined ones.  Decision `migration`.

    Roots that are neither current nor cached need no flush here: they become current through kvm_mmu_load.
    """
    kvm = vcpu.kvm
    answer = kvm.policy.migration(cpu, vcpu)
    vcpu.loaded_vmcs.by_generation = answer == "root-tlb-gen"
    if answer == "all-contexts":
        request_tlb_flush(cpu, vcpu, lib.REASON_MIGRATION)
    elif answer == "none":
        flush_elided(cpu, kvm, lib.REASON_MIGRATION, vcpu.id)
    else:
        vmx_flush_ept_on_pcpu_migration(cpu, vcpu, vcpu.root_mmu, answer)
        vmx_flush_ept_on_pcpu_migration(cpu, vcpu, vcpu.guest_mmu, answer)


def vmx_flush_ept_on_pcpu_migration(
    cpu: Cpu, vcpu: Vcpu, mmu: KvmMmu, answer: Literal["active-roots"] | Tracking
) -> None:
    """vmx_flush_ept_on_pcpu_migration(), proposed in August 2025: flush current and previous roots, with
    preemption off.

    A policy that tracks roots flushes only those that need it.  Generations are checked again before VM
    entry, so a previous root need not be flushed until it is used.  Mutant P24: previous roots left out.
    """
    roots = mmu_roots(mmu)
    if answer == "root-tlb-gen" or "P24" in vcpu.kvm.policy.bugs:
        roots = [root for root in roots if root is mmu.root]
    for root in roots:
        if answer != "active-roots" and test_and_set_flushed(cpu, root, answer):
            flush_elided(cpu, vcpu.kvm, lib.REASON_MIGRATION, root.hfn)
        else:
            vmx_flush_tlb_ept_root(cpu, vcpu.kvm, root, lib.REASON_MIGRATION)


def migration_vpid(cpu: Cpu, vcpu: Vcpu) -> None:
    """Flush the combined mappings under this vCPU's VPID, of every root.  Decision `migration_vpid`."""
    if vcpu.kvm.policy.migration_vpid(cpu, vcpu) == "invvpid":
        cpu.point("tlb", cpu.id, "write")
        lib.flush_invvpid_single(cpu.m, cpu.id, vcpu.kvm.id, vcpu.vpid, lib.REASON_MIGRATION)


def vmx_flush_tlb_before_entry(cpu: Cpu, vcpu: Vcpu) -> None:
    """Flush the current root if its generation is old, with interrupts off and mode IN_GUEST_MODE.

    Under migration=root-tlb-gen only, and however the root became current.  Mutant R1 skips the check.
    """
    kvm = vcpu.kvm
    if not vcpu.loaded_vmcs.by_generation or "R1" in kvm.policy.bugs:
        return
    if root_tlb_gen_is_old(cpu, vcpu):
        assert vcpu.mmu.root is not None
        vmx_flush_tlb_ept_root(cpu, kvm, vcpu.mmu.root, lib.REASON_MIGRATION)


def request_tlb_flush(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """Make KVM_REQ_TLB_FLUSH of the vCPU that is being loaded."""
    lib.vcpu_add_flush_reason(cpu.m, vcpu.id, reason)
    kvm_make_request(cpu, vcpu, KVM_REQ_TLB_FLUSH)


def vmx_vcpu_free(cpu: Cpu, kvm: Kvm, vcpu: Vcpu) -> None:
    """vmx_vcpu_free(): free the VMCS, and let the VPID be reused."""
    free_loaded_vmcs(cpu, kvm.id, vcpu.loaded_vmcs)
    free_vpid(kvm.machine, vcpu.vpid)
