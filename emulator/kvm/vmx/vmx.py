"""arch/x86/kvm/vmx/vmx.c: the flush hooks, EPT_POINTER, loading a VMCS on a pCPU, vCPUs, and exits."""

from __future__ import annotations

from typing import Final

from emulator.kvm.accounting import flush_elided
from emulator.kvm.emulate import emulate_store
from emulator.kvm.kvm_host import (
    EFER_LMA,
    EFER_LME,
    PG_LEVEL_256T,
    X86_CR0_PG,
    X86_CR4_PAE,
    X86_CR4_PSE,
    ExitToUser,
)
from emulator.kvm.mmu.fault import (
    EFAULT,
    ENOMEM,
    RET_PF_EMULATE,
    RET_PF_RETRY,
    RET_PF_WRITE_PROTECTED,
)
from emulator.kvm.mmu.page_fault import kvm_mmu_page_fault
from emulator.kvm.mmu.roots import active_roots
from emulator.kvm.mmu.spte import root_to_sp
from emulator.kvm.mmu.structs import KvmMmuPage, KvmMmuRootInfo
from emulator.kvm.notifications import PcpuFlush, flush_begins, flush_ended
from emulator.kvm.regs import (
    kvm_get_active_pcid,
    kvm_handle_invpcid,
    kvm_mmu_invlpg,
    kvm_set_cr0,
    kvm_set_cr3,
    kvm_set_cr4,
    set_efer,
)
from emulator.kvm.smm import emulator_leave_smm
from emulator.kvm.structs import Kvm, Vcpu, is_long_mode
from emulator.kvm.virt.requests import request_tlb_flush
from emulator.kvm.vmx.vmcs import (
    alloc_loaded_vmcs,
    allocate_vpid,
    free_loaded_vmcs,
    free_vpid,
    loaded_vmcs_clear,
)
from emulator.kvm.vmx.vmx_ops import ept_sync_context, invvpid_individual_addr, invvpid_single_context
from emulator.machine.runtime import Cpu, MachineError, cpu_relax
from native import lib
from native.types import FlushReason, Hfn, VcpuId, Vpid

# EPTP (SDM vol. 3C, 25.6.11): memory type, levels - 1, accessed and dirty flags enabled, page of the root.
VMX_EPTP_MT_WB: Final = 6
VMX_EPTP_PWL_4: Final = 3 << 3
VMX_EPTP_PWL_5: Final = 4 << 3
VMX_EPTP_AD_ENABLE_BIT: Final = 1 << 6


def construct_eptp(root: KvmMmuRootInfo) -> tuple[KvmMmuPage, int]:
    """construct_eptp(): return the root's page, and the EPTP of its role; not of a vCPU's state, because
    callers also pass roots that are not current.

    For a root without a shadow page the kernel warns and flushes globally; here the machine stops, as for the
    warnings of vmx_ops.py.
    """
    sp = root_to_sp(root)
    if sp is None:
        raise AssertionError(f"WARN_ON_ONCE: construct_eptp: root {root.hfn:#x} has no shadow page")
    levels = VMX_EPTP_PWL_5 if sp.role.level == PG_LEVEL_256T else VMX_EPTP_PWL_4
    return sp, sp.hfn << 12 | VMX_EPTP_MT_WB | levels | VMX_EPTP_AD_ENABLE_BIT


def vmx_flush_tlb_ept_root(cpu: Cpu, kvm: Kvm, root: KvmMmuRootInfo, reason: FlushReason) -> None:
    """vmx_flush_tlb_ept_root(): execute INVEPT single."""
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
    INVVPID."""
    if vcpu.mmu.root is None:
        return
    cpu.stat(vcpu.kvm.id, lib.STAT_FLUSH_CURRENT)
    if not vcpu.kvm.params.ept:
        vpid_sync_context(cpu, vcpu, reason)
        return
    vmx_flush_tlb_ept_root(cpu, vcpu.kvm, vcpu.mmu.root, reason)


def vmx_flush_tlb_guest(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """vmx_flush_tlb_guest(): execute INVVPID single-context on the current VPID, never INVEPT."""
    cpu.stat(vcpu.kvm.id, lib.STAT_FLUSH_GUEST)
    vpid_sync_context(cpu, vcpu, reason)


def vmx_flush_tlb_gva(cpu: Cpu, vcpu: Vcpu, addr: int) -> None:
    """vmx_flush_tlb_gva(): execute INVVPID individual-address."""
    if not vcpu.vpid:
        return
    flush = PcpuFlush("invvpid-address", vcpu.vpid, lib.REASON_GUEST)
    flush_begins(cpu, vcpu.kvm, flush)
    cpu.point("tlb", cpu.id, "write")
    invvpid_individual_addr(cpu, vcpu.kvm, vcpu.vpid, addr, lib.REASON_GUEST)
    flush_ended(cpu, vcpu.kvm, flush)


def vpid_sync_context(cpu: Cpu, vcpu: Vcpu, reason: FlushReason) -> None:
    """vpid_sync_context(): execute INVVPID single-context; nothing for VPID 0, which VM entry flushes."""
    if not vcpu.vpid:
        return
    flush = PcpuFlush("invvpid-single", vcpu.vpid, reason)
    flush_begins(cpu, vcpu.kvm, flush)
    cpu.point("tlb", cpu.id, "write")
    invvpid_single_context(cpu, vcpu.kvm, vcpu.vpid, reason)
    flush_ended(cpu, vcpu.kvm, flush)


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


def vmx_load_mmu_pgd(cpu: Cpu, vcpu: Vcpu, root_hfn: Hfn, root_level: int) -> None:
    """vmx_load_mmu_pgd(): write EPT_POINTER; without EPT GUEST_CR3, with the guest's PCID."""
    if not vcpu.kvm.params.ept:
        lib.vmcs_write_guest_cr3(cpu.m, vcpu.loaded_vmcs.vmcs, root_hfn, kvm_get_active_pcid(vcpu))
        return
    lib.vmcs_write_eptp(cpu.m, vcpu.loaded_vmcs.vmcs, root_hfn, root_level)


def vmx_vcpu_load_vmcs(cpu: Cpu, vcpu: Vcpu) -> None:
    """vmx_vcpu_load_vmcs(): load the VMCS; if it was loaded on another pCPU before, flush for the migration.

    Compared is loaded_vmcs.cpu, not vcpu->cpu, so a return to the pCPU on which the vCPU ran last makes no
    flush.  Any other pCPU may hold two kinds of stale entries: of SPTEs that KVM changed while the vCPU was
    elsewhere, and of translations that the guest invalidated natively there.
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
    """Flush the combined mappings under this vCPU's VPID, of every root.  Decision `migration_vpid`."""
    if vcpu.kvm.policy.migration_vpid(cpu, vcpu) == "invvpid":
        vpid_sync_context(cpu, vcpu, lib.REASON_MIGRATION)


# --- vCPUs --------------------------------------------------------------------------------------------------


def vmx_vcpu_create(cpu: Cpu, kvm: Kvm) -> Vcpu:
    """vmx_vcpu_create(): make the vCPU with a VPID and a VMCS, which is loaded nowhere yet."""
    vpid = allocate_vpid(kvm.machine) if kvm.params.vpid else Vpid(0)
    number = VcpuId(cpu.check(lib.vcpu_create(cpu.m, kvm.id)))
    return Vcpu(kvm, number, vpid, alloc_loaded_vmcs(cpu, number, vpid, ept=kvm.params.ept))


def vmx_vcpu_free(cpu: Cpu, vcpu: Vcpu) -> None:
    """vmx_vcpu_free(): free the VMCS, and let the VPID be reused."""
    free_loaded_vmcs(cpu, vcpu.kvm.id, vcpu.loaded_vmcs)
    if vcpu.vpid:
        free_vpid(vcpu.kvm.machine, vcpu.vpid)


def vmx_vcpu_reset(cpu: Cpu, vcpu: Vcpu) -> None:
    """vmx_vcpu_reset() ends with vpid_sync_context(): execute INVVPID single at once, without a request."""
    vpid_sync_context(cpu, vcpu, lib.REASON_GUEST)


def vmx_set_cr0(cpu: Cpu, vcpu: Vcpu, old_cr0: int, cr0: int) -> None:
    """vmx_set_cr0(), with an unrestricted guest: turn its paging on or off.

    In SMM and during RSM nothing is told to the guest, because it has no paging there.  Clearing CR0.PG
    invalidates all, and without paging nothing is cached; so what the guest has changed until it sets CR0.PG
    again is invalidated, too.
    """
    arch = vcpu.arch
    if arch.efer & EFER_LME and (cr0 ^ old_cr0) & X86_CR0_PG:
        # enter_lmode(), exit_lmode()
        arch.efer = arch.efer | EFER_LMA if cr0 & X86_CR0_PG else arch.efer & ~EFER_LMA
    if (cr0 ^ old_cr0) & X86_CR0_PG and not vcpu.arch.smm and not vcpu.arch.leaving_smm:
        lib.vcpu_set_paging(cpu.m, vcpu.id, bool(cr0 & X86_CR0_PG))
        lib.guest_invalidates_all(cpu.m, vcpu.id)
        set_table_format(cpu, vcpu)


def vmx_set_cr4(cpu: Cpu, vcpu: Vcpu) -> None:
    """vmx_set_cr4(): let the hardware walk the guest's tables in another mode."""
    if not vcpu.arch.smm and not vcpu.arch.leaving_smm:
        set_table_format(cpu, vcpu)


def set_table_format(cpu: Cpu, vcpu: Vcpu) -> None:
    """Tell the hardware in which of the paging modes it is (SDM vol. 3A, 4.1.1)."""
    cr4 = vcpu.arch.cr4
    if is_long_mode(vcpu):
        tables = lib.GUEST_TABLES_64
    elif cr4 & X86_CR4_PAE:
        tables = lib.GUEST_TABLES_PAE
    else:
        tables = lib.GUEST_TABLES_32_PSE if cr4 & X86_CR4_PSE else lib.GUEST_TABLES_32
    lib.vcpu_set_tables(cpu.m, vcpu.id, tables)


# --- exits --------------------------------------------------------------------------------------------------


def vmx_handle_exit(cpu: Cpu, vcpu: Vcpu) -> ExitToUser | None:
    """vmx_handle_exit(): handle the exit; return why KVM_RUN ends, or None to enter again."""
    reason = vcpu.exit.reason
    cpu.stat(vcpu.kvm.id, lib.STAT_EXITS)
    if reason == lib.EXIT_EPT_VIOLATION:
        return handle_ept_violation(cpu, vcpu)
    if reason == lib.EXIT_EXCEPTION:
        return vmx_handle_page_fault(cpu, vcpu)
    if reason == lib.EXIT_INSTRUCTION:
        return handle_instruction(cpu, vcpu, vcpu.exit.access, vcpu.exit.linear)
    if reason == lib.EXIT_TRIPLE_FAULT:
        return ExitToUser("shutdown")
    if reason == lib.EXIT_EPT_MISCONFIG:
        raise MachineError(f"EPT misconfiguration of {vcpu!r} at {vcpu.exit.gpa:#x}")
    return None


def handle_ept_violation(cpu: Cpu, vcpu: Vcpu) -> ExitToUser | None:
    """handle_ept_violation()"""
    exit_info = vcpu.exit
    gpa, access = exit_info.gpa, exit_info.access
    r = kvm_mmu_page_fault(cpu, vcpu, gpa, access, bool(exit_info.rights))
    if r == RET_PF_RETRY:
        # The guest will fault again at once, as long as the invalidation is in progress.
        cpu_relax(cpu)
    return exit_after_fault(r, gpa, access)


def vmx_handle_page_fault(cpu: Cpu, vcpu: Vcpu) -> ExitToUser | None:
    """vmx_handle_page_fault(): handle the guest's #PF, which exits without EPT.

    A store to a guest's table that must stay read-only is emulated.
    """
    exit_info = vcpu.exit
    linear, access, error_code = exit_info.linear, exit_info.access, exit_info.error_code
    present = bool(error_code & lib.PFERR_PRESENT)
    r = kvm_mmu_page_fault(cpu, vcpu, linear, access, present, error_code)
    if r == RET_PF_WRITE_PROTECTED:
        r = emulate_store(cpu, vcpu, linear, error_code)
    if r == RET_PF_RETRY:
        cpu_relax(cpu)
    return exit_after_fault(r, linear, access)


def exit_after_fault(r: int, addr: int, access: int) -> ExitToUser | None:
    """Return why KVM_RUN ends after a fault with the result `r`, or None to enter again."""
    if r == RET_PF_EMULATE:
        return ExitToUser("mmio", addr, access == lib.ACCESS_WRITE)
    if r == EFAULT:
        return ExitToUser("fault", addr, access == lib.ACCESS_WRITE)
    if r == ENOMEM:
        return ExitToUser("no-memory", addr)
    return None


def handle_instruction(cpu: Cpu, vcpu: Vcpu, insn: int, operand: int) -> ExitToUser | None:
    """handle_cr(), and the emulation of other instructions that exit; return why KVM_RUN ends.

    A general-protection fault ends it (kvm_complete_insn_gp): the guest's OS handles none, so that a third
    fault follows.
    """
    if insn == lib.GUEST_INSN_RSM:
        emulator_leave_smm(cpu, vcpu)
    elif insn == lib.GUEST_INSN_INVLPG:
        kvm_mmu_invlpg(cpu, vcpu, operand)
    elif insn == lib.GUEST_INSN_INVPCID:
        kvm_handle_invpcid(cpu, vcpu, vcpu.exit.invpcid_type, vcpu.exit.invpcid_pcid, operand)
    elif not handle_cr(cpu, vcpu, insn, operand):
        return ExitToUser("shutdown")
    return None


def handle_cr(cpu: Cpu, vcpu: Vcpu, insn: int, value: int) -> bool:
    """handle_cr(), kvm_emulate_wrmsr(): handle an exit by MOV to a control register, or WRMSR of EFER; return
    False if the guest gets a general-protection fault."""
    if insn == lib.GUEST_INSN_MOV_CR0:
        return kvm_set_cr0(cpu, vcpu, value)
    if insn == lib.GUEST_INSN_MOV_CR3:
        return kvm_set_cr3(cpu, vcpu, value)
    if insn == lib.GUEST_INSN_WRMSR_EFER:
        return set_efer(cpu, vcpu, value)
    return kvm_set_cr4(cpu, vcpu, value)
