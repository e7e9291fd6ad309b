"""One litmus test's machine, VMs and threads, and one execution after another on it.

The machine is booted once.  Each execution begins with `Harness.reset()`: new VMs, TLBs as after a reset of
the pCPUs.  Then the caller (for real threads: emulator.litmus.runner) runs `Harness.run_init()`, each
thread's `run()`, and `Harness.run_final()`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from emulator.actors.task import VcpuTask
from emulator.explain.document import VMM
from emulator.host.memory import UserMemory
from emulator.kvm.kvm_host import (
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
)
from emulator.kvm.mmu.roots import kvm_mmu_after_set_cpuid
from emulator.kvm.structs import Kvm, KvmParams
from emulator.kvm.virt.kvm_main import (
    kvm_create_vm,
    kvm_destroy_vm,
    kvm_set_memory_region,
    kvm_vm_ioctl_create_vcpu,
    kvm_vm_ioctl_enable_manual_dirty_log,
)
from emulator.litmus.guest_ops import PowerOn
from emulator.litmus.kvm_ops import DEVICE_SLOT, LogArm, read_dirty_logs
from emulator.litmus.migration import Migration, RamSlot
from emulator.litmus.model import LitmusTest, VmSection
from emulator.litmus.ops import GuestOp, Op
from emulator.litmus.thread import LitmusThread, PcpuLock
from emulator.machine.runtime import Cpu, Machine, cpu_relax
from emulator.policy import Policy
from native import lib
from native.types import Gfn, Hva, InvalidateSeq, Level, SignalSlot


def _dirty_log_manual(mode: str) -> int:
    """Return the flags of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 for a VM's `dirty_log`.

    When they are needed, because KVM's code may be patched by then.
    """
    flags = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
    return flags | KVM_DIRTY_LOG_INITIALLY_SET if mode == "initially-set" else flags


def machine_config(test: LitmusTest, seed: int) -> dict[str, int]:
    """Return the core's configuration: TLBs that never evict, few frames of each kind."""
    pages = sum(vm.pages for vm in test.vm)
    return {
        "pcpus": test.machine.pcpus,
        # The CPU that runs init and final, RCU's, and each thread's own.
        "housekeeping": 2 + len(test.threads),
        "vms": len(test.vm) + 1,
        "vcpus": sum(vm.vcpus for vm in test.vm) + 1,
        "root_frames": test.machine.root_frames,
        "table_frames": test.machine.table_frames,
        "guest_frames": min(pages + 64, 1 << 16),
        "guest_blocks": test.machine.guest_blocks,
        "l1_ways": 4,
        "l2_entries": 0,
        "l2_ways": 12,
        "psc_entries": 0,
        "hyperv": test.machine.hyperv,
        "chaos": test.stress.chaos,
        "seed": seed,
    }


def rcu_cpu(machine: Machine) -> Cpu:
    """Return the CPU that waits for grace periods and runs callbacks."""
    return machine.cpus[machine.pcpus + 1]


def _logging(test: LitmusTest) -> frozenset[int]:
    """Return the VMs of the test with an operation that arms a dirty log."""
    sequences = (*test.parsed_init, *test.parsed_final)
    ops = [(section.vm, op) for section in test.threads.values() for op in section.parsed]
    ops += [(test.threads[name].vm, op) for name, op in sequences]
    return frozenset(vm for vm, op in ops if isinstance(op, LogArm))


@dataclass(frozen=True, slots=True)
class Alone:
    """An action of a thread, or of user space ("vmm"), while no other runs; `since`: monotonic clock."""

    name: str
    what: str
    since: float

# Exits that no execution has.
_NEVER: Final = 1 << 62


class Harness:
    """The VMs and threads of one test on a machine."""

    single = False  # KvmParams.single

    def __init__(self, test: LitmusTest, policy: Policy, machine: Machine) -> None:
        self.test = test
        self.policy = policy
        self.machine = machine
        self.main = machine.cpus[machine.pcpus]
        machine.limit_vpids(test.machine.vpids)
        self.kvms: list[Kvm] = []
        self.memories: list[UserMemory] = []
        self.migrations: list[Migration] = []
        self.logging = _logging(test)
        # The thread that each CPU works for now.
        self._on: dict[int, LitmusThread] = {}
        self.pcpu_locks = [PcpuLock(i) for i in range(machine.pcpus)]
        self.threads: dict[str, LitmusThread] = {}
        # The current operations of init or final, while no other thread runs.
        self.alone: Alone | None = None
        for number, (name, section) in enumerate(test.threads.items()):
            thread = self.threads[name] = LitmusThread(self, number, name, section)
            self._on[thread.home.id] = thread
        for cpu in machine.cpus[: machine.pcpus]:
            self.main.check(lib.cpu_take(cpu.m, cpu.id))
            self.main.check(lib.cpu_idle(cpu.m, cpu.id))
        self._init = self._grouped((*self._boots(), *test.parsed_init))
        self._final = self._grouped(test.parsed_final)
        self._compile()

    def _compile(self) -> None:
        """Compile all guest programs now, so that none is compiled while an execution runs."""
        for thread in self.threads.values():
            for stretch in thread.stretches:
                if thread.program is not None and stretch.in_guest:
                    thread.program.compiled(stretch.ops, True)
        for thread, ops in (*self._init, *self._final):
            if thread.program is not None and isinstance(ops[0], GuestOp):
                thread.program.compiled(ops, False)

    def _boots(self) -> Iterator[tuple[str, Op]]:
        """Yield the boots of guests that `init` leaves alone.

        Without EPT a boot takes hundreds of steps, and would be part of each execution that is explored.
        """
        if self.test.machine.ept:
            return
        booted = {name for name, op in self.test.parsed_init if isinstance(op, GuestOp)}
        for name, thread in self.threads.items():
            if thread.section.is_vcpu and thread.vm.paging and name not in booted:
                yield name, PowerOn(PowerOn.verb, {}, frozenset())

    def _grouped(self, ops: tuple[tuple[str, Op], ...]) -> list[tuple[LitmusThread, tuple[Op, ...]]]:
        """Return the operations with consecutive guest operations of one thread joined to stretches."""
        found: list[tuple[LitmusThread, tuple[Op, ...]]] = []
        for name, op in ops:
            thread = self.threads[name]
            together = thread.section.is_vcpu and isinstance(op, GuestOp)
            if together and found and found[-1][0] is thread and isinstance(found[-1][1][0], GuestOp):
                found[-1] = (thread, (*found[-1][1], op))
            else:
                found.append((thread, (op,)))
        return found

    # --- executions -----------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Restore the initial state, while no thread runs."""
        self.teardown()
        self.policy = self.policy.fresh()
        for cpu in self.machine.cpus[: self.machine.pcpus]:
            lib.flush_reset(cpu.m, cpu.id)
        lib.signal_reset(self.machine.m)
        for section in self.test.vm:
            self._create_vm(section)
        for thread in self.threads.values():
            thread.pcpu = thread.section.pcpu
            thread.preempt_to = -1
            if thread.section.vcpu is not None:
                vcpu = self.kvms[thread.section.vm].vcpus[thread.section.vcpu]
                thread.task = VcpuTask(vcpu)
                assert thread.program is not None
                thread.program.attach(self.main, vcpu)

    def _create_vm(self, section: VmSection) -> None:
        cpu = self.main
        params = KvmParams(
            fault_around=section.fault_around,
            prefetch=KvmParams().prefetch if section.prefetch else 0,
            chunk=section.chunk,
            single=self.single,
            resched_chunks=section.resched_chunks,
            eager_page_split=section.eager_page_split,
            mmu_pages=section.mmu_pages,
            tdp_level=Level(max(section.tdp_levels, default=4)),
            eptad=section.ept_ad,
            ept=self.test.machine.ept,
            vpid=self.test.machine.vpid,
            hyperv=self.test.machine.hyperv,
            flexpriority=section.apic,
            slice_accesses=1 << 30,
        )
        kvm = kvm_create_vm(cpu, section.gfns, self.policy, params)
        lib.mmu_invalidate_seq_init(cpu.m, kvm.id, InvalidateSeq(section.invalidations))
        self.kvms.append(kvm)
        memory = kvm.mm = UserMemory(kvm)
        self.memories.append(memory)
        slots = tuple(RamSlot(*slot) for slot in section.slots)
        migration = Migration(kvm, slots, len(self.migrations) in self.logging)
        self.memories[-1].discarded = migration.discarded
        self.migrations.append(migration)
        if section.dirty_log != "protect":
            kvm_vm_ioctl_enable_manual_dirty_log(cpu, kvm, _dirty_log_manual(section.dirty_log))
        for slot in slots:
            kvm_set_memory_region(cpu, kvm, slot.id, Gfn(0), slot.npages, Hva(0), as_id=slot.as_id)
        if section.device:
            base = section.device_gfn
            kvm_set_memory_region(cpu, kvm, DEVICE_SLOT, Gfn(base), section.device, Hva(base))
        for number in range(section.vcpus):
            vcpu = kvm_vm_ioctl_create_vcpu(cpu, kvm)
            if section.tdp_levels:
                # A guest with 48 physical address bits needs no fifth level.
                kvm_mmu_after_set_cpuid(cpu, vcpu, 48 if section.tdp_levels[number] == 4 else 52)

    def teardown(self) -> None:
        """Destroy the VMs."""
        for thread in self.threads.values():
            if thread.task is not None:
                thread.leave_pcpu()
                thread.task.close()
                thread.task = None
        for kvm in self.kvms:
            kvm_destroy_vm(self.main, kvm)
        self.kvms.clear()
        self.memories.clear()
        self.migrations.clear()

    def run_init(self) -> None:
        self._run_sequence(self._init)

    def run_final(self) -> None:
        self._run_sequence(self._final)

    def _run_sequence(self, sequence: list[tuple[LitmusThread, tuple[Op, ...]]]) -> None:
        self._tick(KvmParams().exits_per_tick)
        for thread, ops in sequence:
            self.alone = Alone(thread.name, "; ".join(op.text for op in ops), time.monotonic())
            thread.enter_pcpu()
            thread.do(ops, report=False)
            thread.leave_pcpu()
        self.alone = None
        if self.single:
            self._tick(_NEVER)

    def _tick(self, exits: int) -> None:
        """Set after how many exits the timer ticks.

        It never does in explored code, which has no time: a vCPU that faults again is in its former state.
        An operation of `init` or `final` runs by itself, where only the tick shows that it never ends.
        """
        for kvm in self.kvms:
            if kvm.params.exits_per_tick != exits:
                kvm.params = replace(kvm.params, exits_per_tick=exits)

    def end_migrations(self) -> None:
        """End the live migrations of VMs that still log, after all threads and `final`, with paused VMs."""
        for kvm, migration in zip(self.kvms, self.migrations, strict=True):
            if not migration.logs:
                continue
            self.alone = Alone(VMM, f"the last log-get of VM {kvm.id}", time.monotonic())
            if migration.image is not None:
                read_dirty_logs(self.main, kvm, migration)
            migration.finish(self.main)
        self.alone = None

    def thread_on(self, cpu: Cpu) -> LitmusThread | None:
        """Return the thread that `cpu` works for; None if there is none."""
        return self._on.get(cpu.id)

    def entered(self, cpu: Cpu, thread: LitmusThread) -> None:
        self._on[cpu.id] = thread

    # --- progress -------------------------------------------------------------------------------------------

    def progressed(self, thread: int) -> None:
        """Record that another operation of the thread is complete."""
        lib.signal_add(self.machine.m, SignalSlot(thread), 1)

    def wait_progress(self, cpu: Cpu, thread: int, n: int) -> None:
        """Sleep until the thread has completed n operations."""
        while lib.signal_get(self.machine.m, SignalSlot(thread)) < n:
            cpu_relax(cpu)

    def progress(self, thread: LitmusThread) -> int:
        """Return the number of operations that the thread has completed."""
        return int(lib.signal_get(self.machine.m, SignalSlot(thread.number)))
