"""arch/x86/kvm/vmx/vmx.c: the flush hooks, EPT_POINTER, loading a VMCS on a pCPU, and vCPUs.

Exits: exits.py.
"""

from __future__ import annotations

from typing import Final

from emulator.kvm.accounting import flush_elided
from emulator.kvm.kvm_host import (
    EFER_LMA,
    EFER_LME,
    PG_LEVEL_256T,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_PAE,
    X86_CR4_PSE,
)
from emulator.kvm.kvm_onhyperv import ALL_PAGES, hv_flushes, hv_remote_flush_root_tdp, hv_track_root_tdp
from emulator.kvm.mmu.lockless import kvm_mmu_is_dummy_root
from emulator.kvm.mmu.roots import active_roots
from emulator.kvm.mmu.spte import root_to_sp
from emulator.kvm.mmu.structs import KvmMmuPage, KvmMmuRootInfo
from emulator.kvm.notifications import PcpuFlush, flush_begins, flush_ended
from emulator.kvm.regs import kvm_get_active_pcid
from emulator.kvm.structs import Kvm, Vcpu, is_long_mode
from emulator.kvm.virt.requests import request_tlb_flush
from emulator.kvm.vmx.vmcs import (
    LoadedVmcs,
    alloc_loaded_vmcs,
    allocate_vpid,
    free_loaded_vmcs,
    free_vpid,
    loaded_vmcs_clear,
)
from emulator.kvm.vmx.vmcs12 import NestedVmx, nested_cpu_has_vpid, nested_get_vpid02
from emulator.kvm.vmx.vmx_ops import ept_sync_context, invvpid_individual_addr, invvpid_single_context
from emulator.machine.runtime import Cpu
from native import lib
from native.types import FlushReason, Hfn, Level, VcpuId, Vpid

# EPTP (SDM vol. 3C, 25.6.11): memory type, levels - 1, accessed and dirty flags enabled, page of the root.
VMX_EPTP_MT_WB: Final = 6
VMX_EPTP_PWL_4: Final = 3 << 3
VMX_EPTP_PWL_5: Final = 4 << 3
VMX_EPTP_AD_ENABLE_BIT: Final = 1 << 6


def construct_eptp(root: KvmMmuRootInfo) -> tuple[KvmMmuPage, int]:
    """construct_eptp(): return the root's page and its EPTP.

    The EPTP follows from the root's role and not from a vCPU's state, because callers also pass roots that
    are not current.

    For a root without a shadow page the kernel warns and flushes globally; here the machine stops, as for the
    warnings of vmx_ops.py.
    """
    sp = root_to_sp(root)
    if sp is None:
        raise AssertionError(f"WARN_ON_ONCE: construct_eptp: root {root.hfn:#x} has no shadow page")
    levels = VMX_EPTP_PWL_5 if sp.role.level == PG_LEVEL_256T else VMX_EPTP_PWL_4
    ad = 0 if sp.role.ad_disabled else VMX_EPTP_AD_ENABLE_BIT
    return sp, sp.hfn << 12 | VMX_EPTP_MT_WB | levels | ad


def vmx_flush_tlb_ept_root(cpu: Cpu, kvm: Kvm, root: KvmMmuRootInfo, reason: FlushReason) -> None:
    """vmx_flush_tlb_ept_root(): execute INVEPT single-context for the root's EP4TA.

    With EPT, a vCPU has the dummy root if L1's EPT_POINTER for a nested guest leads outside of L1's memory.
    """
    if kvm_mmu_is_dummy_root(kvm, root):
        cpu.point("tlb", cpu.id, "write")
        ept_sync_context(cpu, kvm, root.hfn << 12 | VMX_EPTP_MT_WB | VMX_EPTP_PWL_4, reason)
        return
    sp, eptp = construct_eptp(root)
    flush = PcpuFlush("invept-single", root.hfn, reason, (sp,))
    flush_begins(cpu, kvm, flush)
    cpu.point("tlb", cpu.id, "write")
    ept_sync_context(cpu, kvm, eptp, reason)
    flush_ended(cpu, kvm, flush)


def vmx_flush_tlb_all(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """vmx_flush_tlb_all(): execute INVEPT global, which drops the entries of every VM on this pCPU.

    Neither INVVPID nor VM entry drops guest-physical mappings.  Without EPT there are none, and INVVPID
    all-context takes its place; without VPIDs VM entry drops everything.
    """
    if not vcpu.kvm.params.ept:
        vpid_sync_vcpu_global(cpu, vcpu, reason)
        return
    roots = tuple(root.sp for root in active_roots(vcpu) if root.sp is not None)
    flush = PcpuFlush("invept-global", -1, reason, roots)
    cpu.stat(vcpu.kvm.id, lib.STAT_FLUSH_ALL)
    flush_begins(cpu, vcpu.kvm, flush)
    cpu.point("tlb", cpu.id, "write")
    lib.flush_invept_global(cpu.m, cpu.id, vcpu.kvm.id, reason)
    flush_ended(cpu, vcpu.kvm, flush)


def vmx_flush_tlb_current(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """vmx_flush_tlb_current(): execute INVEPT single on the current root, if there is one; without EPT,
    INVVPID.  Decision hv_local_flush, on Hyper-V."""
    if vcpu.mmu.root is None:
        return
    cpu.stat(vcpu.kvm.id, lib.STAT_FLUSH_CURRENT)
    if not vcpu.kvm.params.ept:
        vpid_sync_context(cpu, vcpu, reason)
        return
    if hv_flushes(vcpu.kvm) and vcpu.kvm.policy.hv_local_flush(cpu, vcpu) == "hypercall":
        hv_remote_flush_root_tdp(cpu, vcpu.kvm, vcpu.mmu.root.hfn, ALL_PAGES, reason)
        return
    vmx_flush_tlb_ept_root(cpu, vcpu.kvm, vcpu.mmu.root, reason)


def vmx_flush_tlb_guest(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """vmx_flush_tlb_guest(): execute INVVPID single-context on the current VPID, never INVEPT."""
    cpu.stat(vcpu.kvm.id, lib.STAT_FLUSH_GUEST)
    vpid_sync_context(cpu, vcpu, reason)


def vmx_flush_tlb_gva(cpu: Cpu, vcpu: Vcpu, addr: int) -> None:
    """vmx_flush_tlb_gva(): execute INVVPID individual-address on the current VPID."""
    vpid_sync_vcpu_addr(cpu, vcpu.kvm, vmx_get_current_vpid(vcpu), addr)


def vmx_get_current_vpid(vcpu: Vcpu) -> Vpid:
    """vmx_get_current_vpid(): return the VPID that the vCPU runs with now, as L1 or as L2."""
    if vcpu.arch.guest_mode and nested_cpu_has_vpid(vcpu.nested.vmcs12()):
        return nested_get_vpid02(vcpu)
    return vcpu.vpid


def vpid_sync_context(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """vpid_sync_context() of the current VPID."""
    vpid_sync(cpu, vcpu.kvm, vmx_get_current_vpid(vcpu), reason)


def vpid_sync(cpu: Cpu, kvm: Kvm, vpid: Vpid, reason: FlushReason) -> None:
    """vpid_sync_context(): execute INVVPID single-context; nothing for VPID 0, which VM entry flushes."""
    if not vpid:
        return
    flush = PcpuFlush("invvpid-single", vpid, reason)
    flush_begins(cpu, kvm, flush)
    cpu.point("tlb", cpu.id, "write")
    invvpid_single_context(cpu, kvm, vpid, reason)
    flush_ended(cpu, kvm, flush)


def vpid_sync_vcpu_addr(cpu: Cpu, kvm: Kvm, vpid: Vpid, addr: int) -> None:
    """vpid_sync_vcpu_addr(): execute INVVPID individual-address; nothing for VPID 0."""
    if not vpid:
        return
    flush = PcpuFlush("invvpid-address", vpid, lib.REASON_GUEST)
    flush_begins(cpu, kvm, flush)
    cpu.point("tlb", cpu.id, "write")
    invvpid_individual_addr(cpu, kvm, vpid, addr, lib.REASON_GUEST)
    flush_ended(cpu, kvm, flush)


def vpid_sync_vcpu_global(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """vpid_sync_vcpu_global(): execute INVVPID all-context; nothing without VPIDs."""
    cpu.stat(vcpu.kvm.id, lib.STAT_FLUSH_ALL)
    if not vcpu.kvm.params.vpid:
        return
    flush = PcpuFlush("invvpid-all", -1, reason)
    flush_begins(cpu, vcpu.kvm, flush)
    cpu.point("tlb", cpu.id, "write")
    lib.flush_invvpid_all(cpu.m, cpu.id, vcpu.kvm.id, reason)
    flush_ended(cpu, vcpu.kvm, flush)


def vmx_load_mmu_pgd(cpu: Cpu, vcpu: Vcpu, root_hfn: Hfn, root_level: Level) -> None:
    """vmx_load_mmu_pgd(): write EPT_POINTER; without EPT GUEST_CR3, with the guest's PCID."""
    if not vcpu.kvm.params.ept:
        lib.vmcs_write_guest_cr3(cpu.m, vcpu.loaded_vmcs.vmcs, root_hfn, kvm_get_active_pcid(vcpu))
        return
    hv_track_root_tdp(cpu, vcpu, root_hfn)
    if vcpu.mmu.root_role.direct:
        lib.vmcs_write_eptp(cpu.m, vcpu.loaded_vmcs.vmcs, root_hfn, root_level)
    else:
        lib.vmcs_write_nested_eptp(cpu.m, vcpu.loaded_vmcs.vmcs, root_hfn, root_level)


def vmx_vcpu_load_vmcs(cpu: Cpu, vcpu: Vcpu) -> None:
    """vmx_vcpu_load_vmcs(): load the VMCS; if it was loaded on another pCPU before, flush for the migration.

    The pCPU is compared with loaded_vmcs.cpu, not with vcpu->cpu, so a return to the pCPU on which the vCPU
    ran last makes no flush.  Any other pCPU may hold two kinds of stale entries: of SPTEs that KVM changed
    while the vCPU was elsewhere, and of translations that the guest invalidated natively there.
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
    if answer == "all-contexts":
        request_tlb_flush(cpu, vcpu, lib.REASON_MIGRATION)
    elif answer == "none":
        flush_elided(cpu, kvm, lib.REASON_MIGRATION, vcpu.id)


def migration_vpid(cpu: Cpu, vcpu: Vcpu) -> None:
    """Flush the combined mappings under the VPID of this VMCS, of every root.  Decision `migration_vpid`."""
    if vcpu.kvm.policy.migration_vpid(cpu, vcpu) == "invvpid":
        vpid_sync(cpu, vcpu.kvm, vpid_of_vmcs(vcpu), lib.REASON_MIGRATION)


def vpid_of_vmcs(vcpu: Vcpu) -> Vpid:
    """Return the VPID with which the loaded VMCS is entered.

    vmcs02 is loaded before the vCPU counts as in guest mode, so vmx_get_current_vpid() does not tell.
    """
    nested = vcpu.loaded_vmcs is vcpu.nested.vmcs02 and nested_cpu_has_vpid(vcpu.nested.vmcs12())
    return nested_get_vpid02(vcpu) if nested else vcpu.vpid


def vmx_switch_vmcs(cpu: Cpu, vcpu: Vcpu, vmcs: LoadedVmcs) -> None:
    """vmx_switch_vmcs(): switch between vmcs01 and vmcs02.

    Each remembers its own pCPU, so a vCPU that has moved flushes once for each of the two.
    """
    vcpu.loaded_vmcs = vmcs
    vmx_vcpu_load_vmcs(cpu, vcpu)


# --- vCPUs --------------------------------------------------------------------------------------------------


def vmx_vcpu_create(cpu: Cpu, kvm: Kvm) -> Vcpu:
    """vmx_vcpu_create(): make the vCPU with a VPID and a VMCS, which is loaded nowhere yet."""
    vpid = allocate_vpid(kvm.machine) if kvm.params.vpid else Vpid(0)
    number = VcpuId(cpu.check(lib.vcpu_create(cpu.m, kvm.id)))
    vmcs01 = alloc_loaded_vmcs(cpu, number, vpid, ept=kvm.params.ept)
    return Vcpu(kvm, number, vpid, vmcs01, NestedVmx())


def vmx_vcpu_free(cpu: Cpu, vcpu: Vcpu) -> None:
    """vmx_vcpu_free(): free the VMCS, and let the VPID be reused.  Nested VMX has been left (nested.py)."""
    free_loaded_vmcs(cpu, vcpu.kvm.id, vcpu.vmcs01)
    if vcpu.vpid:
        free_vpid(vcpu.kvm.machine, vcpu.vpid)


def vmx_vcpu_reset(cpu: Cpu, vcpu: Vcpu) -> None:
    """vmx_vcpu_reset() ends with vpid_sync_context(): execute INVVPID single at once, without a request."""
    vpid_sync_context(cpu, vcpu, lib.REASON_GUEST)


def vmx_set_cr0(cpu: Cpu, vcpu: Vcpu, old_cr0: int, cr0: int) -> None:
    """vmx_set_cr0(), with an unrestricted guest: turn its paging on or off, and set or clear its CR0.WP.

    The core's guest hears nothing in SMM and during RSM, because it has no paging there.  Clearing CR0.PG
    invalidates all linear mappings, and while it is clear none is cached.  So either change of the bit
    invalidates all that the guest has changed before.
    """
    arch = vcpu.arch
    if arch.efer & EFER_LME and (cr0 ^ old_cr0) & X86_CR0_PG:
        # enter_lmode(), exit_lmode()
        arch.efer = arch.efer | EFER_LMA if cr0 & X86_CR0_PG else arch.efer & ~EFER_LMA
    lib.vcpu_set_wp(cpu.m, vcpu.id, bool(cr0 & X86_CR0_WP))
    if (cr0 ^ old_cr0) & X86_CR0_PG and not vcpu.arch.smm and not vcpu.arch.leaving_smm:
        lib.vcpu_set_paging(cpu.m, vcpu.id, bool(cr0 & X86_CR0_PG))
        lib.guest_invalidates_all(cpu.m, vcpu.id)
        set_table_format(cpu, vcpu)


def vmx_set_cr4(cpu: Cpu, vcpu: Vcpu) -> None:
    """vmx_set_cr4(): let the hardware walk the guest's tables in another mode."""
    if not vcpu.arch.smm and not vcpu.arch.leaving_smm:
        set_table_format(cpu, vcpu)


def set_table_format(cpu: Cpu, vcpu: Vcpu) -> None:
    """Set the hardware's paging mode from the guest's registers (SDM vol. 3A, 4.1.1)."""
    cr4 = vcpu.arch.cr4
    if is_long_mode(vcpu):
        tables = lib.GUEST_TABLES_64
    elif cr4 & X86_CR4_PAE:
        tables = lib.GUEST_TABLES_PAE
    else:
        tables = lib.GUEST_TABLES_32_PSE if cr4 & X86_CR4_PSE else lib.GUEST_TABLES_32
    lib.vcpu_set_tables(cpu.m, vcpu.id, tables)
