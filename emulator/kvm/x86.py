"""arch/x86/kvm/x86.c: entering the guest, exits, and KVM_RUN.

`vcpu_run` is a generator, because a vCPU's thread can be preempted in the middle of KVM's code, moved to
another pCPU, and resumed there where it stopped.  It yields a `RunYield` wherever that may happen or the vCPU
cannot go on, and is resumed by `send(cpu)` with the pCPU that its thread is on by then.  In between, the
scheduler that moves it calls kvm_sched_out on the old pCPU and kvm_sched_in on the new one.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Final

from emulator.kvm.host_work import vcpus_went_on
from emulator.kvm.kvm_host import (
    EXITING_GUEST_MODE,
    HALTED,
    IN_GUEST_MODE,
    KVM_REQ_APIC_PAGE_RELOAD,
    KVM_REQ_EVENT,
    KVM_REQ_LOAD_MMU_PGD,
    KVM_REQ_MMU_FREE_OBSOLETE_ROOTS,
    KVM_REQ_MMU_SYNC,
    KVM_REQ_SMI,
    KVM_REQ_TLB_FLUSH,
    KVM_REQ_VM_DEAD,
    OUTSIDE_GUEST_MODE,
    PREEMPTIBLE,
    READY,
    RESCHED,
    ExitToUser,
    RunYield,
)
from emulator.kvm.lapic import kvm_vcpu_reload_apic_access_page
from emulator.kvm.mmu.roots import kvm_mmu_free_obsolete_roots, kvm_mmu_load_pgd, kvm_mmu_reload
from emulator.kvm.mmu.sync import kvm_mmu_sync_roots
from emulator.kvm.reset import kvm_apic_accept_events
from emulator.kvm.smm import enter_smm, process_smi
from emulator.kvm.structs import Vcpu, kvm_memslots_have_rmaps
from emulator.kvm.tlb import kvm_service_local_tlb_flush_requests, kvm_vcpu_flush_tlb_all
from emulator.kvm.virt.requests import kvm_check_request, kvm_test_request, set_mode
from emulator.kvm.virt.vcpu import vcpu_load, vcpu_put
from emulator.machine.runtime import Cpu, MachineStopped, OutOfFrames, smp_mb
from native import ffi, lib

# The guest's slice or its program has ended.
_SLICE_ENDS: Final = (lib.EXIT_PREEMPTION_TIMER, lib.EXIT_PROGRAM, lib.EXIT_PROGRAM_END)
_ATTENTION_WORK: Final[int] = lib.ATTENTION_MESSAGE | lib.ATTENTION_RESCHED | lib.ATTENTION_STOP

# Names the place where interrupts were disabled; allocated once, because the core keeps the pointer.
_ENTER: Final = ffi.new("char[]", b"vcpu_enter_guest")

# Result of vcpu_enter_guest: the Cpu that the thread is on, and why KVM_RUN ends (None: it goes on).
Entered = tuple[Cpu, ExitToUser | None]

# --- entry --------------------------------------------------------------------------------------------------


def serve_requests(cpu: Cpu, vcpu: Vcpu) -> ExitToUser | None:
    """Service requests in the order of vcpu_enter_guest()'s request block."""
    if kvm_test_request(cpu, vcpu, KVM_REQ_VM_DEAD):
        return ExitToUser("shutdown")
    if kvm_check_request(cpu, vcpu, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS):
        kvm_mmu_free_obsolete_roots(cpu, vcpu)
    if kvm_memslots_have_rmaps(vcpu.kvm) and kvm_check_request(cpu, vcpu, KVM_REQ_MMU_SYNC):
        kvm_mmu_sync_roots(cpu, vcpu)
    if kvm_check_request(cpu, vcpu, KVM_REQ_LOAD_MMU_PGD):
        kvm_mmu_load_pgd(cpu, vcpu)
    if kvm_check_request(cpu, vcpu, KVM_REQ_TLB_FLUSH):
        kvm_vcpu_flush_tlb_all(cpu, vcpu)
        if vcpu.kvm.params.host_takes_time:
            vcpus_went_on(vcpu.kvm)
    kvm_service_local_tlb_flush_requests(cpu, vcpu)
    if kvm_check_request(cpu, vcpu, KVM_REQ_SMI):
        process_smi(vcpu)
    if kvm_check_request(cpu, vcpu, KVM_REQ_APIC_PAGE_RELOAD):
        kvm_vcpu_reload_apic_access_page(cpu, vcpu)
    if kvm_check_request(cpu, vcpu, KVM_REQ_EVENT):
        kvm_apic_accept_events(cpu, vcpu)
    return None


def kvm_check_and_inject_events(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_check_and_inject_events(): enter SMM if an SMI is pending."""
    if vcpu.arch.smi_pending and not vcpu.arch.smm:
        vcpu.arch.smi_pending = False
        enter_smm(cpu, vcpu)


def kvm_vcpu_exit_request(cpu: Cpu, vcpu: Vcpu) -> bool:
    """kvm_vcpu_exit_request(): check mode and requests a last time before VM entry, with interrupts off and
    mode IN_GUEST_MODE.

    An earlier request is seen here; the sender of a later one finds the mode and interrupts the pCPU.
    Pending work, the CPU's attention, is tested last: by guest_run, before the first access.
    """
    cpu.point("mode", vcpu.id, "read")
    if lib.vcpu_mode(cpu.m, vcpu.id) == EXITING_GUEST_MODE:
        return True
    cpu.point("requests", vcpu.id, "read")
    return bool(lib.kvm_requests(cpu.m, vcpu.id))


def vcpu_enter_guest(cpu: Cpu, vcpu: Vcpu) -> Generator[RunYield, Cpu, Entered]:
    """vcpu_enter_guest(): service requests and load the root; then, with interrupts off, set the mode, check
    requests again, run the guest, and handle the exit.

    It is preemptible up to local_irq_disable() (include/linux/irqflags.h), so a flush may have been made on a
    pCPU that the vCPU has left since.  The migration must make up for that.
    """
    cpu.point("requests", vcpu.id, "read")
    if lib.kvm_requests(cpu.m, vcpu.id):
        leave = serve_requests(cpu, vcpu)
        if leave is not None:
            return cpu, leave
        cpu = yield PREEMPTIBLE
    if vcpu.arch.smi_pending:
        kvm_check_and_inject_events(cpu, vcpu)
    try:
        loaded = kvm_mmu_reload(cpu, vcpu)
    except OutOfFrames:
        return cpu, ExitToUser("no-memory")
    if loaded:
        cpu = yield PREEMPTIBLE

    cpu.check(lib.local_irq_disable(cpu.m, cpu.id, _ENTER))
    try:
        if not _enter_with_irqs_off(cpu, vcpu):
            return cpu, None
    except BaseException:
        _unwind_entry(cpu, vcpu)
        raise
    # guest_run has set mode OUTSIDE_GUEST_MODE and then enabled interrupts.
    kvm_vcpu_srcu_read_lock(cpu, vcpu)
    return cpu, vcpu.kvm.x86_ops.handle_exit(cpu, vcpu)


def _enter_with_irqs_off(cpu: Cpu, vcpu: Vcpu) -> bool:
    """Run from after local_irq_disable() to VM exit; return False if the last check found a request and the
    entry was cancelled.

    Decision entry_order: the mode is set first, so that the sender of a request made after the check finds
    IN_GUEST_MODE and interrupts; the interrupt stays pending until VM entry and causes an exit at once.
    Without the barrier in between, the mode may become visible only after the check.
    """
    before_entry = vcpu.kvm.heard.before_entry
    if vcpu.kvm.policy.entry_order(cpu, vcpu) == "mode-then-requests":
        set_mode(cpu, vcpu, IN_GUEST_MODE)
        kvm_vcpu_srcu_read_unlock(cpu, vcpu)
        smp_mb__after_srcu_read_unlock(cpu)
        if before_entry is not None:
            before_entry(cpu, vcpu)
        cancelled = kvm_vcpu_exit_request(cpu, vcpu)
    else:
        if before_entry is not None:
            before_entry(cpu, vcpu)
        cancelled = kvm_vcpu_exit_request(cpu, vcpu)
        kvm_vcpu_srcu_read_unlock(cpu, vcpu)
        set_mode(cpu, vcpu, IN_GUEST_MODE)
    if cancelled:
        set_mode(cpu, vcpu, OUTSIDE_GUEST_MODE)
        cpu.check(lib.local_irq_enable(cpu.m, cpu.id))
        kvm_vcpu_srcu_read_lock(cpu, vcpu)
        return False
    budget = vcpu.kvm.params.slice_accesses
    cpu.point("guest", vcpu.id, "write")
    cpu.check(lib.guest_run(cpu.m, cpu.id, vcpu.id, budget, vcpu.exit))
    return True


def _unwind_entry(cpu: Cpu, vcpu: Vcpu) -> None:
    """Unwind an exception between local_irq_disable() and the exit, to the state after cancel_injection."""
    lib.vcpu_set_mode(cpu.m, vcpu.id, OUTSIDE_GUEST_MODE)
    if lib.irqs_disabled(cpu.m, cpu.id):
        lib.local_irq_enable(cpu.m, cpu.id)


# --- KVM_RUN ------------------------------------------------------------------------------------------------


def kvm_vcpu_srcu_read_lock(cpu: Cpu, vcpu: Vcpu) -> None:
    """kvm_vcpu_srcu_read_lock(): take SRCU, which is held while KVM handles the vCPU, never in guest mode."""
    vcpu.srcu_idx = cpu.check(lib.srcu_read_lock(cpu.m, cpu.id, vcpu.kvm.id))


def kvm_vcpu_srcu_read_unlock(cpu: Cpu, vcpu: Vcpu) -> None:
    index, vcpu.srcu_idx = vcpu.srcu_idx, -1
    lib.srcu_read_unlock(cpu.m, cpu.id, vcpu.kvm.id, index)


def smp_mb__after_srcu_read_unlock(cpu: Cpu) -> None:
    """smp_mb__after_srcu_read_unlock() (include/linux/srcu.h): complete the unlock to a full barrier."""
    smp_mb(cpu)


def xfer_to_guest_mode_work_pending(vcpu: Vcpu, exits: int) -> bool:
    """__xfer_to_guest_mode_work_pending() (include/linux/entry-virt.h): return whether a signal or
    need_resched() is pending.

    Raise MachineStopped if the machine stops: a vCPU that only runs and faults reaches no wait that would.
    """
    exit_info = vcpu.exit
    attention = exit_info.attention & _ATTENTION_WORK
    if attention & lib.ATTENTION_STOP:
        raise MachineStopped
    if attention or vcpu.immediate_exit or exits >= vcpu.kvm.params.exits_per_tick:
        return True
    return exit_info.reason in _SLICE_ENDS


def kvm_vcpu_ioctl_run(cpu: Cpu, vcpu: Vcpu) -> Generator[RunYield, Cpu, Entered]:
    """kvm_arch_vcpu_ioctl_run() and its loop vcpu_run()."""
    kvm_vcpu_srcu_read_lock(cpu, vcpu)
    exits = 0
    vcpu.exit.attention = 0
    vcpu.exit.reason = lib.EXIT_MESSAGE
    try:
        while not vcpu.immediate_exit:
            cpu, leave = yield from vcpu_enter_guest(cpu, vcpu)
            if leave is not None:
                return cpu, leave
            exits += 1
            halted = vcpu.exit.reason == lib.EXIT_HLT
            if halted or xfer_to_guest_mode_work_pending(vcpu, exits):
                # Hold nothing: kvm_vcpu_block(), or xfer_to_guest_mode_handle_work() (kernel/entry/virt.c).
                kvm_vcpu_srcu_read_unlock(cpu, vcpu)
                vcpu.exit.reason = lib.EXIT_MESSAGE
                vcpu.exit.attention = 0
                exits = 0
                cpu = yield HALTED if halted else RESCHED
                kvm_vcpu_srcu_read_lock(cpu, vcpu)
        return cpu, ExitToUser("intr")
    finally:
        # An abandoned generator is closed when it is collected, perhaps after the machine is gone.
        if vcpu.srcu_idx >= 0 and cpu.m:
            kvm_vcpu_srcu_read_unlock(cpu, vcpu)


def vcpu_run(vcpu: Vcpu, state: RunYield = READY) -> Generator[RunYield, Cpu, None]:
    """Run a vCPU's thread, which calls KVM_RUN again and again.

    Start it with `next()`, which yields `state`, then `send(cpu)` each time with the Cpu that it is on.
    `state` is READY, or the state (but not PREEMPTIBLE) of the stopped thread that this one replaces.
    At READY and ExitToUser the vCPU is not loaded.  At PREEMPTIBLE, RESCHED and HALTED it is loaded: before
    the thread moves to another pCPU, or another vCPU runs on this one, call kvm_sched_out(cpu, vcpu), and
    kvm_sched_in(cpu, vcpu) before it is resumed.  At PREEMPTIBLE it holds SRCU, so park a vCPU at one of the
    other states.  The generator never returns; close() ends it.
    """
    assert state is not PREEMPTIBLE
    while True:
        cpu = yield state
        if isinstance(state, ExitToUser) and state.reason == "mmio":
            # User space has emulated the access (complete_emulated_mmio).
            lib.guest_skip(cpu.m, vcpu.id)
        if not vcpu.loaded:
            vcpu_load(cpu, vcpu)
        # From HALTED and RESCHED the loop of KVM_RUN goes on as it begins.
        cpu, leave = yield from kvm_vcpu_ioctl_run(cpu, vcpu)
        vcpu_put(cpu, vcpu)
        assert leave is not None
        state = leave
