"""The emulated machine of the fidelity test: its boot, its VMs, its counters."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from emulator.actors.crew import Crew
from emulator.actors.inbox import NativeFuture, adopt_thread, release_thread
from emulator.actors.pcpu import Arrive, Depart, Park, PCpu
from emulator.actors.rcu import RcuThread
from emulator.actors.task import VcpuTask
from emulator.host.memory import UserMemory
from emulator.kvm import kvm_host
from emulator.kvm.mmu.roots import kvm_mmu_reset_context
from emulator.kvm.structs import Kvm, KvmParams, Vcpu
from emulator.kvm.virt.kvm_main import (
    kvm_create_vm,
    kvm_set_memory_region,
    kvm_vm_ioctl_create_vcpu,
    kvm_vm_ioctl_enable_manual_dirty_log,
)
from emulator.machine.runtime import Machine as NativeMachine
from emulator.policy import Policy
from native import FLUSH_REASONS, FLUSH_SCOPES, ffi, lib
from native.types import CounterId, CpuId, Gfn, Hva, VcpuId
from tests.support import machine_fields

from .driver import VcpuCounts, VmCounts
from .host_mm import HostMm
from .kvm_probes import probe_kvm
from .lines import Machine
from .probes import Probes
from .program import Program
from .tables import SPACES, SPACES_32, write_tables, write_tables_32

SECONDS = 20.0
GFNS = 0x40400


@dataclass(frozen=True)
class Slot:
    """A memslot's place. User space has its memory at the same addresses, and more where no slot is."""

    gfn: int
    pages: int


SLOTS = {0: Slot(0, 128), 1: Slot(0x10000, 256), 2: Slot(0x20000, 128)}
THP_SLOTS = {**SLOTS, 1: Slot(0x40000, 1024)}


@dataclass
class Vm:
    kvm: Kvm
    slots: dict[int, Slot]
    tasks: list[VcpuTask] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)
    exists: bool = True
    running: bool = True
    protected: range = range(0)


class EmulatedMachine:
    """The calling thread is a housekeeping CPU, boots the machine and makes the ioctls."""

    def __init__(self, machine: Machine, vcpus: int, policy: Policy, probes: Probes) -> None:
        self.config = machine
        self.tables = machine.tables or not machine.ept
        self.spaces = SPACES_32 if machine.bits32 else SPACES
        self.vcpus = vcpus
        self.policy = policy
        self.probes = probes
        self.vms: list[Vm] = []
        vms = max(machine.vms, 1)
        self.pcpus = vms * vcpus + 1
        self.native = NativeMachine(
            machine_fields(
                pcpus=self.pcpus,
                housekeeping=2,
                vms=vms,
                vcpus=vms * vcpus,
                root_frames=64,
                table_frames=512,
                guest_frames=4096,
                guest_blocks=8,
            )
        )
        self.cpu = self.native.cpus[self.pcpus]
        self.mm = HostMm(self.cpu)
        self.crew = Crew(self.native, self.cpu)
        self.refs: list[Any] = []

    def start(self) -> None:
        probe_kvm(self.probes)
        adopt_thread(self.cpu)
        RcuThread.start(self.crew, self.native.cpus[self.pcpus + 1])
        self.refs = [PCpu.start(self.crew, self.native.cpus[i]) for i in range(self.pcpus)]
        for _ in range(self.config.vms):
            self.create_vm()
        self.settle()

    def close(self) -> None:
        for task in (task for vm in self.vms for task in vm.tasks):
            task.vcpu.immediate_exit = True
        self.crew.stop()
        late = self.crew.join(SECONDS)
        release_thread()
        if late:
            raise RuntimeError(f"threads that did not end: {late}")
        self.native.destroy()
        if self.crew.deaths:
            raise RuntimeError("\n".join(f"{death}\n{death.traceback}" for death in self.crew.deaths))

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            if self.crew.deaths:
                raise RuntimeError(str(self.crew.deaths[0]))
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {SECONDS:.0f} s for {what}")
            time.sleep(0.0005)

    def settle(self) -> None:
        for vm in self.vms:
            if vm.running:
                self.whole_round(vm)

    def counts(self, vm: int) -> VmCounts:
        if vm >= len(self.vms):
            return VmCounts()
        kvm, count = self.vms[vm].kvm, self.probes.count
        requests = {name: count(name, kvm.id) for name in self.probes.names("request ", kvm.id)}
        counts = VmCounts(
            count("remote_tlb_flush_requests", kvm.id),
            Counter({name.removeprefix("request "): n for name, n in requests.items()}),
            count("yields", kvm.id),
            count("refaults", kvm.id),
            self._executed(kvm),
            tuple(
                VcpuCounts(
                    flush_all=count("flush_all", task.vcpu.id),
                    flush_current=count("flush_current", task.vcpu.id),
                    flush_guest=count("flush_guest", task.vcpu.id),
                    tlb_flush=count("tlb_flush", task.vcpu.id),
                    kvm_mmu_load=count("kvm_mmu_load", task.vcpu.id),
                )
                for task in self.vms[vm].tasks
            ),
        )
        if self.vms[vm].exists:
            self._cross_check(kvm, counts)
        return counts

    def _executed(self, kvm: Kvm) -> Counter[str]:
        reasons, scopes = len(FLUSH_REASONS), len(FLUSH_SCOPES)
        size = self.native.config["vms"] * scopes * reasons
        flushes, necessary = ffi.new("uint64_t[]", size), ffi.new("uint64_t[]", size)
        lib.flushes_sum(self.native.m, flushes, necessary)
        first = kvm.id * scopes * reasons
        return Counter(
            {
                scope: sum(flushes[first + i * reasons + reason] for reason in range(reasons))
                for i, scope in enumerate(FLUSH_SCOPES)
            }
        )

    def whole_round(self, vm: Vm) -> None:
        """Every vCPU has gone through its loop, or is at a page that it may not write to in the host.

        When all have been seen there, no fault is left that makes requests.  But a vCPU may have taken a
        request off and be in the middle of its flush: all go round, or take three more exits, once more.
        """
        for _ in range(2):
            self._go_round(vm)

    def _go_round(self, vm: Vm) -> None:
        exits = [self._exits(task) for task in vm.tasks]
        for program in vm.programs:
            program.mark()

        def done() -> bool:
            return all(
                (program.rounds() >= 2 or (self._exits(task) >= before + 3 and self._is_stuck(vm, task)))
                and not lib.kvm_requests(self.native.m, task.vcpu.id)
                for task, program, before in zip(vm.tasks, vm.programs, exits, strict=True)
            )

        self.wait(done, f"the vCPUs of VM {vm.kvm.id} to go round")

    @staticmethod
    def _is_stuck(vm: Vm, task: VcpuTask) -> bool:
        """Its last exit was a fault on a page that user space has protected; it takes that over and over."""
        last = task.vcpu.exit
        return (last.gpa or last.linear) >> 12 in vm.protected

    def _exits(self, task: VcpuTask) -> int:
        return self.probes.count("exits", task.vcpu.id)

    def _cross_check(self, kvm: Kvm, counts: VmCounts) -> None:
        """KVM's own statistics and the probes count independently. (KVM's flush_current has only those that
        had a root to flush.)"""
        own = {
            lib.STAT_REMOTE_TLB_FLUSH_REQUESTS: counts.remote_tlb_flush_requests,
            lib.STAT_MAKE_ALL_CPUS_REQUEST: counts.requests.total(),
            lib.STAT_FLUSH_ALL: sum(vcpu.flush_all for vcpu in counts.vcpus),
            lib.STAT_FLUSH_GUEST: sum(vcpu.flush_guest for vcpu in counts.vcpus),
            lib.STAT_TLB_FLUSH: sum(vcpu.tlb_flush for vcpu in counts.vcpus),
            lib.STAT_MMU_LOAD: sum(vcpu.kvm_mmu_load for vcpu in counts.vcpus),
        }
        stats = {stat: lib.vm_stat(self.native.m, kvm.id, stat) for stat in own}
        assert stats == own, f"{kvm!r}: statistics {stats}, probes {own}"

    def move(self, task: VcpuTask, pcpu: int) -> None:
        if task.pcpu == pcpu:
            return
        self.refs[task.pcpu].tell(Depart(task, self.refs[pcpu]))
        self.wait(lambda: task.pcpu == pcpu, f"{task} on pCPU {pcpu}")

    def leave_kvm_run(self, vm: Vm) -> None:
        """A signal: KVM_RUN returns, and the thread does not call it again."""
        for task in vm.tasks:
            task.vcpu.immediate_exit = True
        self.wait(
            lambda: not any(task.vcpu.loaded or task.scheduled_out for task in vm.tasks), "KVM_RUN to return"
        )
        for task in vm.tasks:
            parked: NativeFuture[None] = NativeFuture()
            self.refs[task.pcpu].tell(Park(task, parked))
            parked.get()
        vm.running = False

    def create_vm(self) -> None:
        """Returns after each vCPU's first entry, and a round of its guest."""
        eagerly = not self.config.lazy_split
        params = KvmParams(
            fault_around=1,
            resched_chunks=0,
            eager_page_split=eagerly,
            host_takes_time=True,
            ept=self.config.ept,
        )
        kvm = kvm_create_vm(self.cpu, GFNS, self.policy, params)
        kvm.mm = UserMemory(kvm)
        lib.mm_set_zero_page(self.cpu.m, kvm.id, True)
        vm = Vm(kvm, dict(THP_SLOTS if self.config.thp else SLOTS))
        if self.config.manual_protect:
            flags = kvm_host.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | kvm_host.KVM_DIRTY_LOG_INITIALLY_SET
            kvm_vm_ioctl_enable_manual_dirty_log(self.cpu, kvm, flags)
        for number, slot in vm.slots.items():
            self.set_slot(vm, number, slot)
        if self.config.thp and not self.config.host_4k:
            self.mm.make_huge(kvm, vm.slots[1].gfn, vm.slots[1].pages)
        if self.tables:
            (write_tables_32 if self.config.bits32 else write_tables)(self.cpu, kvm)
        for _ in range(self.vcpus):
            vcpu = kvm_vm_ioctl_create_vcpu(self.cpu, kvm)
            self._set_registers(vcpu)
            vm.programs.append(self._program(vm, vcpu.id))
            vm.tasks.append(VcpuTask(vcpu))
        first = len(self.vms) * self.vcpus
        self.vms.append(vm)
        for i, task in enumerate(vm.tasks, first):
            self.refs[i].tell(Arrive(task))
        self.wait(lambda: all(task.pcpu >= 0 for task in vm.tasks), "the vCPUs to be placed")
        self.whole_round(vm)

    def _program(self, vm: Vm, vcpu: VcpuId) -> Program:
        share = vm.slots[0].pages // self.vcpus
        first = len(vm.programs) * share
        return Program(
            self.native.m,
            vcpu,
            guest_os=self.config.guest_os,
            first_gfn=first,
            end_gfn=first + share,
            tables=self.spaces[0] if self.tables else None,
        )

    def _set_registers(self, vcpu: Vcpu) -> None:
        """Set the registers of a guest that is in its mode already; the recorded ones had no global pages."""
        vcpu.arch.cr4 = kvm_host.X86_CR4_PSE if self.config.bits32 else kvm_host.X86_CR4_PAE
        if self.config.bits32:
            vcpu.arch.efer = 0
        vcpu.kvm.x86_ops.set_cr4(self.cpu, vcpu)
        if not self.config.ept:
            vcpu.arch.cr3 = self.spaces[0] << 12
            kvm_mmu_reset_context(self.cpu, vcpu)

    def set_slot(self, vm: Vm, number: int, slot: Slot, flags: int = 0) -> None:
        hva = (THP_SLOTS if self.config.thp else SLOTS)[number].gfn
        kvm_set_memory_region(self.cpu, vm.kvm, number, Gfn(slot.gfn), slot.pages, Hva(hva), flags)

    def counter(self, cpu: CpuId, counter: CounterId) -> int:
        values = ffi.new("uint64_t[]", lib.COUNTERS)
        lib.counters_read(self.native.m, cpu, values)
        return int(values[counter])
