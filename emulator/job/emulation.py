"""Boots a scenario (the native machine, its VMs, guests and actors), and takes it all down again.

    with Emulation(scenario, policy, seed=1) as emulation:
        emulation.start()
        ...

Leaving the context stops every actor within two seconds, whatever happened, and frees the machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from emulator.actors.chaos import Chaos
from emulator.actors.crew import Crew
from emulator.actors.host import Host, host_pacer
from emulator.actors.inbox import adopt_thread, release_thread
from emulator.actors.ioctl_caller import RAM_SLOT, SECOND_SLOT, IoctlCaller, kvm_pacer
from emulator.actors.pcpu import PCpu
from emulator.actors.rcu import RcuThread
from emulator.actors.scheduler import Place, Scheduler
from emulator.actors.task import VcpuTask
from emulator.errors import BadInput
from emulator.host.memory import UserMemory
from emulator.kvm.reset import power_on
from emulator.kvm.structs import Kvm, KvmParams, Vcpu
from emulator.kvm.virt.kvm_main import kvm_create_vm, kvm_set_memory_region, kvm_vm_ioctl_create_vcpu
from emulator.machine.runtime import HPAGE_PMD_NR, Cpu, Machine, OutOfMemory
from emulator.policy import Policy
from emulator.policy.suitable import check_suits
from emulator.scenario.config import PAGES_PER_MIB, Scenario, VmSection
from emulator.scenario.workload import Workload
from emulator.traces import Trace, TraceError
from emulator.traces import embedded as embedded_traces
from emulator.traces import load as load_trace
from native import ffi, lib
from native.types import Gfn, Hva

if TYPE_CHECKING:
    from pykka import ActorRef

    from native._native import U64, MachinePtr

# The slot that is deleted and created again: this many pages per vCPU.
SECOND_SLOT_PAGES = 256
# Pages that an SMI handler looks at.
SMI_PAGES = 64
# Python's switch interval, in seconds.  A pCPU that leaves the guest waits at most so long for each thread
# that computes in Python; the default of 5 ms would be several time slices.
SWITCH_INTERVAL = 0.0005
SWITCH_THREADS = 100


@dataclass(frozen=True, slots=True)
class Layout:
    """Guest-physical memory of a VM, in pages: RAM from 0 on, then the second slot, 2 MiB aligned.

    Each vCPU's guest OS hands out its own pages of both, but the pages of different vCPUs lie side by side.
    So the vCPUs share EPT tables, as in an SMP guest, and a change in a table concerns entries that other
    vCPUs have cached.
    """

    ram: int
    second: int
    vcpus: int

    @property
    def second_base(self) -> int:
        return -(-self.ram // HPAGE_PMD_NR) * HPAGE_PMD_NR

    @property
    def gfns(self) -> int:
        return -(-(self.second_base + self.second) // HPAGE_PMD_NR) * HPAGE_PMD_NR


def layout_of(vm: VmSection) -> Layout:
    """Return a VM's layout.  Only a disturbed VM has a second slot: no ioctl deletes a slot of other VMs."""
    second = SECOND_SLOT_PAGES * vm.vcpus if vm.disturbed else 0
    return Layout(vm.memory * PAGES_PER_MIB, second, vm.vcpus)


def machine_config(scenario: Scenario, seed: int, chaos: int, unbounded: bool) -> dict[str, int]:
    """Return the fields of the core's `struct machine_config`, sized for the scenario.

    Guest frames: every page mapped singly, and a block for each 2 MiB that khugepaged may collapse.  Tables:
    a VM's tree may exist several times, as invalid roots and in RCU's hands.
    """
    geometry = scenario.machine.geometry
    layouts = [layout_of(vm) for vm in scenario.vm for _ in range(vm.count)]
    gfns = sum(layout.gfns for layout in layouts)
    disturbed = sum(layout_of(vm).gfns * vm.count for vm in scenario.vm if vm.disturbed)
    return {
        "pcpus": scenario.machine.pcpus,
        "housekeeping": housekeeping_cpus(scenario),
        "vms": scenario.vms,
        "vcpus": scenario.vcpus,
        "root_frames": 64 + 32 * scenario.vms,
        "table_frames": 1024 + 8 * sum(layout.gfns // HPAGE_PMD_NR + 4 for layout in layouts),
        "guest_frames": gfns + 1024,
        "guest_blocks": disturbed // HPAGE_PMD_NR if scenario.host.collapse else 0,
        "l1_ways": 4,
        "l2_entries": 0 if unbounded else geometry.l2_entries,
        "l2_ways": geometry.l2_ways,
        "psc_entries": 0 if unbounded else geometry.psc_entries,
        "chaos": chaos,
        "seed": seed,
    }


def housekeeping_cpus(scenario: Scenario) -> int:
    """Return the number of CPUs that are no pCPUs: one for each other thread, and one for the thread that
    boots the machine."""
    return scenario.threads - scenario.machine.pcpus + 1


class Emulation:
    """A booted scenario."""

    def __init__(
        self,
        scenario: Scenario,
        policy: Policy,
        *,
        seed: int = 0,
        chaos: int = 0,
        unbounded: bool = False,
        params: KvmParams | None = None,
        pace: float = 0,
    ) -> None:
        check_suits(policy, scenario.name, ept=scenario.machine.ept)
        self.scenario = scenario
        self.policy = policy
        self.params = replace(
            params or KvmParams(),
            host_takes_time=True,
            ept=scenario.machine.ept,
            vpid=scenario.machine.vpid,
        )
        if scenario.kvm.mmu_pages:
            self.params = replace(self.params, mmu_pages=scenario.kvm.mmu_pages)
        self._rng = Random(seed)
        # The guests replay these arrays, so they must live as long as the machine.
        self._traces: dict[tuple[str, int], Trace] = {}
        self._handlers: dict[tuple[int, ...], tuple[U64, int]] = {}
        config = machine_config(scenario, seed, chaos, unbounded)
        try:
            self.machine = Machine(config)
        except OutOfMemory as error:
            raise BadInput(scenario.name, str(error), "memory for the scenario's machine") from error
        if chaos:
            self.machine.install(Chaos(chaos, seed, len(self.machine.cpus)))
        self._free_cpus = iter(self.machine.cpus[self.machine.pcpus :])
        main = next(self._free_cpus)
        self.crew = Crew(self.machine, main)
        self.workload = Workload(scenario, self._clock(pace))
        self.vms: list[Kvm] = []
        # The VMs that the host and KVM's ioctls act on.
        self.disturbed: list[Kvm] = []
        self.memories: list[UserMemory] = []  # of the VMs that are disturbed
        self.tasks: list[VcpuTask] = []
        # The pCPUs on which each task may run.
        self.homes: list[range] = []
        self.pcpus: list[ActorRef[Any]] = []
        self._switch_interval = sys.getswitchinterval()
        self._next_own = 0
        self._started = self._stopped = False
        try:
            self._create_vms(main)
        except BaseException:
            self.machine.destroy()
            raise

    @property
    def m(self) -> MachinePtr:
        """Return the native machine."""
        return self.machine.m

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        late = self.stop()
        if late:
            # An actor has not ended and may still use the machine: leak it rather than free it under the
            # actor.
            return
        for task in self.tasks:
            task.close()
        self.machine.destroy()

    # --- boot ------------------------------------------------------------------------------------------

    def _create_vms(self, cpu: Cpu) -> None:
        for section in self.scenario.vm:
            traces = cycle(self._traces_of(section))
            for _ in range(section.count):
                self._create_vm(cpu, section, traces)

    def _create_vm(self, cpu: Cpu, section: VmSection, traces: Iterator[Trace]) -> None:
        layout = layout_of(section)
        kvm = kvm_create_vm(cpu, layout.gfns, self.policy, self.params)
        memory = kvm.mm = UserMemory(kvm)
        self.vms.append(kvm)
        kvm_set_memory_region(cpu, kvm, RAM_SLOT, Gfn(0), layout.ram, Hva(0))
        if section.disturbed:
            self.disturbed.append(kvm)
            self.memories.append(memory)
            kvm_set_memory_region(
                cpu, kvm, SECOND_SLOT, Gfn(layout.second_base), layout.second, Hva(layout.second_base)
            )
        if section.disturbed and self.scenario.kvm.smis:
            # Map the guest's RAM at the same gfns in the SMM address space.
            kvm_set_memory_region(cpu, kvm, RAM_SLOT, Gfn(0), layout.ram, Hva(0), as_id=1)
        home = self._home(section)
        threads = section.threads and not self.params.ept
        for i in range(section.vcpus):
            vcpu = kvm_vm_ioctl_create_vcpu(cpu, kvm)
            if not i or not threads:
                processes = list(islice(traces, section.processes))
            self._furnish(cpu, vcpu, section, layout, 0 if threads else i, processes)
            if i and threads:
                lib.guest_run_threads(cpu.m, vcpu.id, kvm.vcpus[0].id)
            power_on(cpu, vcpu, paging=True, pcid=section.pcid)
            if section.disturbed and self.scenario.kvm.smis:
                lib.guest_set_smi_handler(cpu.m, vcpu.id, *self._smi_handler(layout, processes))
            self.tasks.append(VcpuTask(vcpu, section.halt))
            self.homes.append(home)

    def _home(self, section: VmSection) -> range:
        """Return the pCPUs of the next VM: its own, counted from 0 on, or the shared ones behind all of
        these."""
        if section.placement == "shared":
            return range(self.scenario.own_pcpus, self.machine.pcpus)
        first = self._next_own
        self._next_own += section.vcpus
        return range(first, self._next_own)

    def _furnish(
        self, cpu: Cpu, vcpu: Vcpu, section: VmSection, layout: Layout, i: int, processes: list[Trace]
    ) -> None:
        """Give a vCPU its guest OS and processes, each of which runs the next trace."""
        config = ffi.new(
            "struct guest_config *",
            {
                "first_gfn": 0,
                "end_gfn": layout.ram,
                "stride": 0 if section.threads and not self.params.ept else layout.vcpus,
                "phase": i,
                "mmio_gfn": layout.second_base,
                "mmio_end_gfn": layout.second_base + layout.second,
                "switch_every": section.switch_every,
                "unmap_every": section.unmap_every,
                "protect_every": section.protect_every,
                "table_every": section.table_every,
                "wp_every": section.wp_every,
                "hugepages": section.guest_huge_pages,
                "pcid": section.pcid,
                "paging": 1,
                "batch": section.flush_batch,
                "interrupts_off": section.interrupts_off,
                "own_kernel": section.own_kernel_tables,
                "file_pages": section.file_pages,
                "halt_every": section.halt_every,
                "halt_us": 0 if section.halt_exits else max(1, int(section.halt * 1e6)),
                "seed": self._rng.getrandbits(31),
            },
        )
        cpu.check(lib.guest_configure(cpu.m, vcpu.id, config))
        for trace in processes:
            records = ffi.from_buffer("uint64_t[]", trace.records)
            pages = ffi.from_buffer("uint64_t[]", trace.pages)
            cpu.check(
                lib.guest_add_process(cpu.m, vcpu.id, records, len(trace.records), pages, len(trace.pages))
            )

    def _smi_handler(self, layout: Layout, processes: list[Trace]) -> tuple[U64, int]:
        """Return the SMI handler's accesses.  It runs without paging, and reads pages all over the guest's
        RAM without writing any.

        The first pages have numbers that the processes use for linear pages, too: a translation of a linear
        page must not serve an access to the physical page of the same number.
        """
        linear = sorted({int(page) for trace in processes for page in trace.pages if page < layout.ram})
        pages = linear[:SMI_PAGES] + list(range(0, layout.ram, max(1, layout.ram // SMI_PAGES)))
        if (key := tuple(pages)) not in self._handlers:
            gpas = [page << 12 | page % 64 * 8 for page in pages]
            self._handlers[key] = ffi.new("uint64_t[]", gpas), len(gpas)
        return self._handlers[key]

    def _traces_of(self, section: VmSection) -> list[Trace]:
        names = section.traces or tuple(info.name for info in embedded_traces())
        return [self._trace(name, section.records) for name in names]

    def _trace(self, name: str, records: int) -> Trace:
        if (name, records) not in self._traces:
            path = self.scenario.directory / name
            try:
                trace = load_trace(path if path.suffix else name)
            except TraceError as error:
                raise BadInput(f"{self.scenario.name}: vm.traces", str(error)) from error
            self._traces[name, records] = trace.first(records) if records else trace
        return self._traces[name, records]

    # --- running ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start all actors; the vCPUs run from the end of this call on."""
        self._started = True
        # Every thread that waits for the GIL wakes up once an interval to request it.  With many threads
        # these requests would take all the time, so the interval grows with the square of their number.
        sys.setswitchinterval(SWITCH_INTERVAL * max(1.0, self.scenario.threads / SWITCH_THREADS) ** 2)
        RcuThread.start(self.crew, next(self._free_cpus))
        self.pcpus = [PCpu.start(self.crew, cpu) for cpu in self.machine.cpus[: self.machine.pcpus]]
        scheduler = Scheduler.start(
            self.crew,
            next(self._free_cpus),
            self.pcpus,
            self.workload,
            self.scenario.scheduler.mode,
            self._seeded(),
        )
        scheduler.tell(Place(tuple(zip(self.tasks, self.homes, strict=True))))
        for kvm in self.disturbed:
            rng = self._seeded()
            pacer = kvm_pacer(self.workload, len(self.disturbed), rng)
            IoctlCaller.start(self.crew, next(self._free_cpus), kvm, scheduler, pacer, rng)
        for i in range(self.scenario.host.actors):
            rng = self._seeded()
            pacer = host_pacer(self.workload, self.scenario.host.actors, rng)
            Host.start(
                self.crew, next(self._free_cpus), i, self.memories, self.scenario.host.pages, pacer, rng
            )

    def _clock(self, pace: float) -> Callable[[], float] | None:
        """Return a clock by which all guests together make `pace` accesses a second; None without a pace."""
        m = self.machine.m
        return (lambda: lib.counter_sum(m, lib.COUNT_ACCESSES) / pace) if pace else None

    def _seeded(self) -> Random:
        return Random(self._rng.getrandbits(64))

    def adopt(self) -> None:
        """Make the calling thread the machine's main CPU until `release`."""
        adopt_thread(self.crew.main)

    def release(self) -> None:
        release_thread()

    def stop(self) -> list[str]:
        """Stop everything; return the names of actors that did not end in time.

        May be called twice.  The second call does not wait again for actors that were late.
        """
        self.crew.stop()
        late = self.crew.join(0 if self._stopped else None)
        self._stopped = True
        if self._started:
            self._started = False
            sys.setswitchinterval(self._switch_interval)
        return late
