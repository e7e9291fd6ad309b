"""Replay a workload on an emulated machine: one event after the other, as fast as possible or in time.

One thread brings about all events, so the same workload and policy always give the same counts.  vCPUs that
were in guest mode when the host changed their VM's memory stay in guest mode on their pCPUs meanwhile
(residents.py), and are interrupted where they were in the recording.  Other vCPUs are in guest mode only
while they execute an event of their own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self, cast

from emulator.actors.task import VcpuTask
from emulator.errors import BadInput
from emulator.host.memory import UserMemory
from emulator.hosttrace.workload import PLACING, Step, Workload
from emulator.kvm.kvm_host import (
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_REQ_TLB_FLUSH_CURRENT,
    X86_CR4_PGE,
    ExitToUser,
)
from emulator.kvm.mmu.mmu import kvm_mmu_zap_all_fast, kvm_zap_gfn_range
from emulator.kvm.mmu.roots import kvm_init_mmu, kvm_mmu_new_pgd
from emulator.kvm.regs import kvm_set_cr4
from emulator.kvm.reset import power_on
from emulator.kvm.smm import emulator_leave_smm, kvm_inject_smi
from emulator.kvm.structs import Kvm, KvmParams
from emulator.kvm.structs import Vcpu as KvmVcpu
from emulator.kvm.virt.kvm_main import (
    kvm_create_vm,
    kvm_destroy_vm,
    kvm_set_memory_region,
    kvm_vm_ioctl_create_vcpu,
    kvm_vm_ioctl_get_dirty_log,
)
from emulator.kvm.virt.requests import kvm_make_request
from emulator.kvm.x86_ops import KvmX86Ops
from emulator.machine.runtime import Cpu, Machine
from emulator.policy import Policy
from emulator.replay.residents import Residents
from emulator.report.result import Snapshot, read_snapshot
from native import ffi, lib
from native.types import FlushReason, Gfn, Hva

_SLOT: Final = 0
# After one of these events, tables may wait for a grace period.
_FREEING: Final = frozenset({"unmap", "zap-all", "log", "recover"})
# Turns without an instruction after which a guest is taken to be stuck.
_TURNS: Final = 200
_SPARE_FRAMES: Final = 64
_ENDS: Final = 5.0
# The longest sleep before a look at the signals.
_NAP: Final = 0.1


class Vcpu:
    """A vCPU, and the pCPU on which it ran last."""

    def __init__(self, task: VcpuTask) -> None:
        self.task = task
        self.pcpu = 0


class Replay:
    """One replay of a workload under a policy.  Call `run` once, while the context is entered.

    `speed` is that of the recorded time, 0: as fast as it goes.  Afterwards, `lag` is the most seconds that
    an event came too late, and `flush_current_calls` the number of calls of flush_tlb_current().
    """

    def __init__(self, workload: Workload, policy: Policy, speed: float = 0.0) -> None:
        self.workload = workload
        self.policy = policy
        self.speed = speed
        self.lag = 0.0
        self.flush_current_calls = 0
        self._residents = Residents()
        frames = sum(workload.pages) + _SPARE_FRAMES
        huge = {(step.vm, step.start) for step in workload.steps if step.verb == "huge"}
        blocks = len(huge.union(workload.huge))
        vcpus = sum(workload.vms)
        self.machine = Machine(
            {
                "pcpus": workload.pcpus,
                "housekeeping": 2,
                "vms": len(workload.vms),
                "vcpus": vcpus,
                "root_frames": 64 + 8 * len(workload.vms),
                "table_frames": 256 + frames // 64,
                "guest_frames": frames,
                "guest_blocks": blocks + 1,
                "l1_ways": 4,
                "l2_entries": 1536,
                "l2_ways": 12,
                "psc_entries": 32,
                "chaos": 0,
                "seed": 1,
            }
        )
        self.main = self.machine.cpus[workload.pcpus]
        self.kvms: list[Kvm] = []
        self.vcpus: list[list[Vcpu]] = []
        self._logged: set[int] = set()
        self._program = ffi.new("struct guest_op[]", 1)
        self._rcu = threading.Thread(
            target=lib.rcu_thread,
            args=(self.machine.m, self.machine.cpus[workload.pcpus + 1].id),
            daemon=True,
        )

    def __enter__(self) -> Self:
        for cpu in self.machine.cpus[self.machine.pcpus :]:
            lib.cpu_online(cpu.m, cpu.id)
        for cpu in self.machine.cpus[: self.machine.pcpus]:
            self.main.check(lib.cpu_take(cpu.m, cpu.id))
            self.main.check(lib.cpu_idle(cpu.m, cpu.id))
        self._rcu.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._residents.vacate_all()
            for vcpus in self.vcpus:
                for vcpu in vcpus:
                    self._leave(vcpu, self.machine.cpus[vcpu.pcpu])
                    vcpu.task.close()
            for kvm in self.kvms:
                kvm_destroy_vm(self.main, kvm)
        self.machine.stop()
        self._residents.end()
        self._rcu.join(_ENDS)
        if not self._rcu.is_alive():
            self.machine.destroy()

    def run(self, done: Callable[[int], bool] = lambda steps: False) -> Snapshot | None:
        """Replay all events and return the counts from the first one on; None if `done` asks to stop.

        `done` is called with the number of events so far.
        """
        for vm in range(len(self.workload.vms)):
            self._boot(vm)
        before, self.flush_current_calls = self._snapshot(), 0
        began = time.monotonic()
        for number, step in enumerate(self.workload.steps):
            if number % 1024 == 0 and done(number):
                return None
            if self.speed and not self._wait(began + step.microseconds / 1e6 / self.speed, done, number):
                return None
            if step.verb in _FREEING:
                self._reclaim()
            _DO[step.verb](self, step)
            if step.verb not in _ALONE:
                self._residents.settle()
        self._reclaim()
        return self._snapshot().since(before)

    def _wait(self, due: float, done: Callable[[int], bool], number: int) -> bool:
        """Wait until an event is due; return False if `done` asks to stop."""
        late = time.monotonic() - due
        self.lag = max(self.lag, late)
        while late < 0:
            time.sleep(min(-late, _NAP))
            if -late > _NAP and done(number):
                return False
            late = time.monotonic() - due
        return True

    def _reclaim(self) -> None:
        """Wait until RCU has freed all that it was given, so that no later event depends on its thread."""
        self.main.check(lib.rcu_barrier(self.main.m, self.main.id))

    def _snapshot(self) -> Snapshot:
        return read_snapshot(self.machine.m, vms=len(self.kvms), elapsed=self.workload.seconds)

    # --- before the recording -----------------------------------------------------------------------------

    def _boot(self, vm: int) -> None:
        """Make the VM as it was when the recording began: its vCPUs have run, its pages are mapped."""
        pages = self.workload.pages[vm]
        # With a tick at each exit, an interrupted vCPU is scheduled out until the recording has it enter.
        # Zaps do not yield: where the recording's did, it has a step for each part.
        params = KvmParams(fault_around=1, slice_accesses=1 << 30, exits_per_tick=1, resched_chunks=0)
        kvm = kvm_create_vm(self.main, pages, self.policy, params)
        kvm.mm = UserMemory(kvm)
        kvm.x86_ops = cast("KvmX86Ops", _Counting(self, kvm.x86_ops))
        self.kvms.append(kvm)
        steps = [step for step in self.workload.steps if step.vm == vm]
        for as_id in range(2 if any(step.verb == "smi" for step in steps) else 1):
            kvm_set_memory_region(self.main, kvm, _SLOT, Gfn(0), pages, Hva(0), as_id=as_id)
        self.vcpus.append([self._vcpu(kvm, pages) for _ in range(self.workload.vms[vm])])
        for owner, number in self.workload.without_pge:
            if owner == vm:
                self.vcpus[vm][number].task.vcpu.arch.cr4 &= ~X86_CR4_PGE
        new = set(self.workload.new)
        first = {step.vcpu: step.start for step in reversed(steps) if step.verb in PLACING}
        for number, vcpu in enumerate(self.vcpus[vm]):
            vcpu.pcpu = first.get(number, 0)
            if (vm, number) not in new:
                self._execute(vcpu)
        for owner, block in self.workload.huge:
            if owner == vm:
                self._back_by_huge_page(kvm, block)
        for page in self.workload.mapped[vm]:
            self._execute(self.vcpus[vm][0], "WRITE", page)

    def _vcpu(self, kvm: Kvm, pages: int) -> Vcpu:
        vcpu = kvm_vm_ioctl_create_vcpu(self.main, kvm)
        config = ffi.new("struct guest_config *", {"end_gfn": pages, "first_gfn": 0, "seed": 1})
        self.main.check(lib.guest_configure(self.main.m, vcpu.id, config))
        power_on(self.main, vcpu, paging=False, pcid=False)
        return Vcpu(VcpuTask(vcpu))

    # --- a vCPU -------------------------------------------------------------------------------------------

    def _execute(self, vcpu: Vcpu, kind: str = "SIGNAL", page: int = 0) -> None:
        """Let the guest execute one instruction: an access, or one that touches no memory."""
        self._residents.leave(vcpu.task)
        cpu = self.machine.cpus[vcpu.pcpu]
        operation = self._program[0]
        operation.kind = getattr(lib, f"GUEST_OP_{kind}")
        operation.linear = page << 12
        operation.value = lib.MACHINE_SIGNALS - 1 if kind == "SIGNAL" else 1
        self._enter(vcpu, cpu)
        number = vcpu.task.vcpu.id
        cpu.check(lib.guest_set_program(cpu.m, number, self._program, 1))
        for _ in range(_TURNS):
            state = vcpu.task.resume(cpu)
            if isinstance(state, ExitToUser) and state.reason in ("shutdown", "no-memory"):
                raise BadInput(
                    self.workload.source, f"{state.reason} at {state.gpa:#x}", "a smaller workload"
                )
            if lib.guest_program_position(cpu.m, number):
                break
        else:
            raise RuntimeError(f"a guest's {kind} of page {page:#x} does not end")
        self._leave(vcpu, cpu)

    def _enter(self, vcpu: Vcpu, cpu: Cpu) -> None:
        self._residents.leave(vcpu.task)
        self._residents.vacate(cpu)
        cpu.check(lib.cpu_take(cpu.m, cpu.id))
        vcpu.task.switch_in(cpu)

    def _leave(self, vcpu: Vcpu, cpu: Cpu) -> None:
        vcpu.task.switch_out(cpu)
        lib.cpu_idle(cpu.m, cpu.id)

    # --- events -------------------------------------------------------------------------------------------

    def _at(self, step: Step) -> Vcpu:
        return self.vcpus[step.vm][step.vcpu]

    def enter(self, step: Step) -> None:
        vcpu = self._at(step)
        if self._residents.on(self.machine.cpus[step.start]) is vcpu.task:
            return  # the recording's vCPU was interrupted, this one is not, under this policy
        self._residents.leave(vcpu.task)
        vcpu.pcpu = step.start
        self._execute(vcpu)

    def stay(self, step: Step) -> None:
        vcpu = self._at(step)
        cpu = self.machine.cpus[step.start]
        if self._residents.on(cpu) is not vcpu.task:
            self._residents.leave(vcpu.task)
            vcpu.pcpu = step.start
            self._residents.stay(cpu, vcpu.task)

    def resume(self, step: Step) -> None:
        self._residents.resume(self.kvms[step.vm].id)

    def leave(self, step: Step) -> None:
        self._residents.leave(self._at(step).task)

    def read(self, step: Step) -> None:
        self._execute(self._at(step), "READ", step.start)

    def write(self, step: Step) -> None:
        self._execute(self._at(step), "WRITE", step.start)

    def smi(self, step: Step) -> None:
        vcpu = self._at(step)
        kvm_inject_smi(self.main, vcpu.task.vcpu)
        self._execute(vcpu)

    def cr4(self, step: Step) -> None:
        vcpu = self._at(step)
        cpu = self.machine.cpus[vcpu.pcpu]
        self._enter(vcpu, cpu)
        kvm_set_cr4(cpu, vcpu.task.vcpu, vcpu.task.vcpu.arch.cr4 ^ step.start)
        self._leave(vcpu, cpu)
        self._execute(vcpu)

    def rsm(self, step: Step) -> None:
        vcpu = self._at(step)
        if not vcpu.task.vcpu.arch.smm:
            return  # the recording began in SMM
        cpu = self.machine.cpus[vcpu.pcpu]
        self._enter(vcpu, cpu)
        emulator_leave_smm(cpu, vcpu.task.vcpu)
        self._leave(vcpu, cpu)

    def vmrun(self, step: Step) -> None:
        self._switch_guest(self._at(step), nested=True)

    def vmexit(self, step: Step) -> None:
        self._switch_guest(self._at(step), nested=False)

    def _switch_guest(self, vcpu: Vcpu, nested: bool) -> None:
        """nested_svm_transition_tlb_flush() and nested_svm_load_cr3(): flush, and take the guest's own root.

        The machine has VMX, so only the role tells that the vCPU runs a nested guest.  Its root is a direct
        one, and needs no KVM_REQ_MMU_SYNC.
        """
        cpu, kvm_vcpu = self.machine.cpus[vcpu.pcpu], vcpu.task.vcpu
        self._enter(vcpu, cpu)
        kvm_vcpu.flush_current_reason = lib.REASON_GUEST
        kvm_make_request(cpu, kvm_vcpu, KVM_REQ_TLB_FLUSH_CURRENT)
        kvm_vcpu.arch.guest_mode = nested
        kvm_init_mmu(kvm_vcpu)
        kvm_vcpu.arch.guest_mode = False
        kvm_mmu_new_pgd(cpu, kvm_vcpu, kvm_vcpu.arch.cr3)
        self._leave(vcpu, cpu)
        self._execute(vcpu)

    def huge(self, step: Step) -> None:
        self._back_by_huge_page(self.kvms[step.vm], step.start)

    def _back_by_huge_page(self, kvm: Kvm, block: int) -> None:
        """Let the host touch a page of the block, and collapse it: KVM flushes if it maps a page of it."""
        page = ffi.new("struct mm_page *")
        self.main.check(lib.mm_fault(self.main.m, self.main.id, kvm.id, Hva(block), True, page))
        memory: Any = kvm.mm
        memory.collapse(self.main, Hva(block))

    def unmap(self, step: Step) -> None:
        self._memory(step).discard(self.main, Hva(step.start), Hva(step.end))

    def _memory(self, step: Step) -> Any:
        return self.kvms[step.vm].mm

    def log(self, step: Step) -> None:
        kvm = self.kvms[step.vm]
        if step.vm in self._logged:
            kvm_vm_ioctl_get_dirty_log(self.main, kvm, _SLOT, 0)
            return
        self._logged.add(step.vm)
        pages = self.workload.pages[step.vm]
        kvm_set_memory_region(self.main, kvm, _SLOT, Gfn(0), pages, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)

    def zap_all(self, step: Step) -> None:
        kvm = self.kvms[step.vm]
        with kvm.slots_lock.held(self.main):
            kvm_mmu_zap_all_fast(self.main, kvm)

    def recover(self, step: Step) -> None:
        """kvm_recover_nx_huge_pages(), which zaps tables: here all SPTEs of their blocks, with one flush."""
        kvm_zap_gfn_range(self.main, self.kvms[step.vm], Gfn(step.start), Gfn(step.end))


class _Counting:
    """A VM's struct kvm_x86_ops, which counts calls of flush_tlb_current(), with or without a root."""

    def __init__(self, replay: Replay, ops: KvmX86Ops) -> None:
        self._replay = replay
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def flush_tlb_current(self, cpu: Cpu, vcpu: KvmVcpu, reason: FlushReason) -> None:
        self._replay.flush_current_calls += 1
        self._ops.flush_tlb_current(cpu, vcpu, reason)


# Events that change nothing for vCPUs other than their own.
_ALONE: Final = frozenset({"enter", "stay", "leave", "resume"})
_DO: Final[dict[str, Callable[[Replay, Step], None]]] = {
    "enter": Replay.enter,
    "stay": Replay.stay,
    "leave": Replay.leave,
    "resume": Replay.resume,
    "read": Replay.read,
    "write": Replay.write,
    "cr4": Replay.cr4,
    "smi": Replay.smi,
    "rsm": Replay.rsm,
    "vmrun": Replay.vmrun,
    "vmexit": Replay.vmexit,
    "huge": Replay.huge,
    "unmap": Replay.unmap,
    "log": Replay.log,
    "zap-all": Replay.zap_all,
    "recover": Replay.recover,
}
