"""Boots a scenario (the native machine, its VMs, guests and actors), and takes it all down again.

    with Emulation(scenario, policy, seed=1) as emulation:
        emulation.start()
        ...

Leaving the context stops every actor within two seconds, whatever happened, and frees the machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
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
from emulator.job.guests import Guests, layout_of
from emulator.kvm.reset import power_on
from emulator.kvm.structs import Kvm, KvmParams
from emulator.kvm.virt.kvm_main import kvm_create_vm, kvm_set_memory_region, kvm_vm_ioctl_create_vcpu
from emulator.machine.runtime import HPAGE_PMD_NR, Cpu, Machine, OutOfMemory
from emulator.policy import Policy
from emulator.policy.suitable import check_suits
from emulator.scenario.config import Scenario
from emulator.scenario.sections import VmSection
from emulator.scenario.workload import Workload
from native import lib
from native.types import Gfn, Hva

if TYPE_CHECKING:
    from pykka import ActorRef

    from emulator.traces import Trace
    from native._native import MachinePtr

# Python's switch interval, in seconds.  A pCPU that leaves the guest waits at most so long for each thread
# that computes in Python; the default of 5 ms would be several time slices.
SWITCH_INTERVAL = 0.0005
SWITCH_THREADS = 100


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
        "hyperv": scenario.machine.hyperv,
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
        check_suits(policy, scenario.name, **scenario.kind_of_host)
        self.scenario = scenario
        self.policy = policy
        self.params = replace(
            params or KvmParams(),
            host_takes_time=True,
            ept=scenario.machine.ept,
            vpid=scenario.machine.vpid,
            hyperv=scenario.machine.hyperv,
        )
        if scenario.kvm.mmu_pages:
            self.params = replace(self.params, mmu_pages=scenario.kvm.mmu_pages)
        self._rng = Random(seed)
        self._guests = Guests(scenario, self._rng)
        config = machine_config(scenario, seed, chaos, unbounded)
        try:
            self.machine = Machine(config)
        except OutOfMemory as error:
            raise BadInput(scenario.name, str(error), "memory for the scenario's machine") from error
        if chaos or scenario.machine.delays:
            self.machine.install(Chaos(chaos, seed, len(self.machine.cpus), scenario.machine.delays))
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
        lib.machine_trim(self.m)  # of all that decoding the traces took for a while

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
            traces = cycle(self._guests.traces_of(section))
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
        for _ in range(section.vcpus):
            vcpu = kvm_vm_ioctl_create_vcpu(cpu, kvm)
            self._guests.furnish(cpu, vcpu, section, traces)
            power_on(cpu, vcpu, paging=True, pcid=section.pcid)
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
            gone = self.scenario.kvm.slot_gone
            IoctlCaller.start(self.crew, next(self._free_cpus), kvm, scheduler, pacer, rng, gone)
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

    def hold_mmu(self) -> None:
        """Take the mmu_lock of every VM for write, for good: no thread that is stopped from here on is
        within it.

        Other threads hold one of these locks at most, and serve calls while they wait for it.
        """
        main = self.crew.main
        for kvm in self.vms:
            main.check(lib.mmu_write_lock(main.m, main.id, kvm.id))

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
