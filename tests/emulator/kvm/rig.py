"""A machine driven by hand: one thread plays all CPUs, guests do one access at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from emulator.host.memory import UserMemory
from emulator.kvm.kvm_host import PREEMPTIBLE, RESCHED, X86_CR4_PSE, ExitToUser, RunYield
from emulator.kvm.smm import kvm_inject_smi
from emulator.kvm.structs import Kvm, KvmParams, Vcpu
from emulator.kvm.virt.kvm_main import (
    kvm_create_vm,
    kvm_destroy_vm,
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
    kvm_sched_in,
    kvm_sched_out,
    kvm_set_memory_region,
    kvm_vm_ioctl_create_vcpu,
)
from emulator.kvm.x86 import vcpu_run
from emulator.machine.runtime import Cpu, Machine
from emulator.policy import Policy
from emulator.policy.patch import KvmPatch
from native import FLUSH_REASONS, FLUSH_SCOPES, VIOLATION_KINDS, VM_STAT_NAMES, ffi, lib
from native.types import CpuId, Gfn, GuestInsn, Hva, PromiseKind, VmStat

GFNS = 4096
SLOT = 0
HANDLER = 16

CONFIG = {
    "pcpus": 3,
    "housekeeping": 3,
    "vms": 4,
    "vcpus": 8,
    "root_frames": 4,
    "table_frames": 256,
    "guest_frames": 3 * GFNS,
    "guest_blocks": 8,
    "l1_ways": 4,
    "l2_entries": 0,
    "l2_ways": 12,
    "psc_entries": 0,
    "chaos": 0,
    "seed": 1,
}


@contextmanager
def online(cpu: Cpu) -> Iterator[None]:
    """One thread plays several pCPUs: calls to those that it does not play at the moment are served for them,
    as for any CPU that is offline."""
    lib.cpu_online(cpu.m, cpu.id)
    try:
        yield
    finally:
        lib.cpu_offline(cpu.m, cpu.id)


class Guest:
    """One vCPU's thread.  Its process is a single record that tests rewrite, or one that walks over
    `pages`."""

    def __init__(self, rig: Rig, kvm: Kvm, pages: int = 1, **config: int) -> None:
        self.rig = rig
        self.vcpu: Vcpu = kvm_vm_ioctl_create_vcpu(rig.host, kvm)
        self.on: Cpu | None = None
        self.scheduled_out = False
        self.preempted = False  # inside KVM_RUN
        settings = {"first_gfn": 0, "end_gfn": GFNS, "seed": 1, **config}
        self._config = ffi.new("struct guest_config *", settings)
        rig.host.check(lib.guest_configure(rig.machine.m, self.vcpu.id, self._config))
        # Written and read in turn.
        self.records = ffi.new("uint64_t[]", [page << 12 | (page & 1) << 62 for page in range(pages)])
        self.pages = ffi.new("uint64_t[]", list(range(pages)))
        rig.host.check(
            lib.guest_add_process(rig.machine.m, self.vcpu.id, self.records, pages, self.pages, pages)
        )
        # The SMI handler's work, one access after the other.
        self.handler = ffi.new("uint64_t[]", HANDLER)
        lib.guest_set_smi_handler(rig.machine.m, self.vcpu.id, self.handler, 0)
        self.run = vcpu_run(self.vcpu)
        next(self.run)

    def resume(self, pcpu: int) -> RunYield:
        """Go on on that pCPU, moving there if need be; a vCPU that is loaded there makes room."""
        cpu = self.rig.machine.cpus[pcpu]
        if self.vcpu.loaded and self.on is not cpu:
            assert self.on is not None
            kvm_sched_out(self.on, self.vcpu)
        if cpu.vcpu is not None and cpu.vcpu is not self.vcpu:
            kvm_sched_out(cpu, cpu.vcpu)
        self.on = cpu
        with online(cpu):
            if self.preempted and not self.vcpu.loaded:
                kvm_sched_in(cpu, self.vcpu)
            state = self.run.send(cpu)
        self.preempted = not isinstance(state, ExitToUser)
        return state

    def access(self, pcpu: int, gfn: int, kind: int) -> RunYield:
        """One access, with all exits that it takes."""
        self.records[0] = kind << 62 | gfn << 12
        return self.next_slice(pcpu)

    def run_slices(self, pcpu: int, slices: int) -> None:
        while slices:
            slices -= self.resume(pcpu) is RESCHED

    def enter_smm(self, pcpu: int, *gfns: int) -> None:
        """An SMI; the handler reads the first of these pages.  Each `resume` reads one more, and after the
        last one comes RSM."""
        self.set_handler(*gfns)
        kvm_inject_smi(self.rig.host, self.vcpu)
        if gfns:
            self.next_slice(pcpu)

    def set_handler(self, *gfns: int) -> None:
        for i, gfn in enumerate(gfns):
            self.handler[i] = gfn << 12
        lib.guest_set_smi_handler(self.rig.machine.m, self.vcpu.id, self.handler, len(gfns))

    def next_slice(self, pcpu: int) -> RunYield:
        """One access, with all exits that it takes."""
        while True:
            state = self.resume(pcpu)
            if state is not PREEMPTIBLE:
                return state

    def execute(self, pcpu: int, insn: int, operand: int) -> None:
        """An instruction that exits, and one access."""
        assert lib.guest_execute(self.rig.machine.m, self.vcpu.id, GuestInsn(insn), operand) == 0
        self.next_slice(pcpu)
        assert lib.guest_executed(self.rig.machine.m, self.vcpu.id)

    def write(self, pcpu: int, gfn: int) -> RunYield:
        return self.access(pcpu, gfn, lib.ACCESS_WRITE)

    def read(self, pcpu: int, gfn: int) -> RunYield:
        return self.access(pcpu, gfn, lib.ACCESS_READ)


class Rig:
    """`host` is the CPU of the ioctl caller and of the host's memory management, `other` a second one."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.host, self.other = machine.cpus[machine.pcpus : machine.pcpus + 2]
        for cpu in (self.host, self.other):
            lib.cpu_online(machine.m, cpu.id)
        self.vms: list[Kvm] = []
        self.patch: KvmPatch | None = None
        self.live = ExitStack()

    def vm(self, policy: Policy | None = None, slot: bool = True, **params: Any) -> Kvm:
        defaults: dict[str, Any] = {"slice_accesses": 1, "fault_around": 0, "resched_chunks": 0}
        policy = policy or Policy()
        self._use(policy.patch)
        kvm = kvm_create_vm(self.host, GFNS, policy, KvmParams(**{**defaults, **params}))
        kvm.mm = UserMemory(kvm)
        self.vms.append(kvm)
        if slot:
            kvm_set_memory_region(self.host, kvm, SLOT, Gfn(0), GFNS, Hva(0))
        return kvm

    def _use(self, patch: KvmPatch | None) -> None:
        """Make patched code KVM's until the rig ends.  All VMs of a rig run the same code."""
        if self.vms:
            assert patch == self.patch
        elif patch != self.patch:
            self.live.close()
            self.patch = patch
            if patch is not None:
                self.live.enter_context(patch.live())

    def smm_slots(self, kvm: Kvm) -> None:
        """SMM sees the same memory."""
        kvm_set_memory_region(self.host, kvm, SLOT, Gfn(0), GFNS, Hva(0), as_id=1)

    def guest(self, kvm: Kvm, **config: int) -> Guest:
        return Guest(self, kvm, **config)

    def destroy(self, kvm: Kvm) -> None:
        self.vms.remove(kvm)
        kvm_destroy_vm(self.host, kvm)

    def unmap(self, kvm: Kvm, start: int, end: int, promise: PromiseKind = lib.PROMISE_NOTIFIER) -> None:
        kvm_mmu_notifier_invalidate_range_start(self.host, kvm, Hva(start), Hva(end), promise)
        lib.mm_unmap(self.machine.m, self.host.id, kvm.id, Hva(start), Hva(end), True)
        kvm_mmu_notifier_invalidate_range_end(self.host, kvm, Hva(start), Hva(end))

    def protect(self, kvm: Kvm, start: int, end: int, writable: int) -> None:
        promise = lib.PROMISE_NOTIFIER_WRITE
        kvm_mmu_notifier_invalidate_range_start(self.host, kvm, Hva(start), Hva(end), promise)
        lib.mm_protect(self.machine.m, self.host.id, kvm.id, Hva(start), Hva(end), bool(writable))
        kvm_mmu_notifier_invalidate_range_end(self.host, kvm, Hva(start), Hva(end))

    def collapse(self, kvm: Kvm, start: int) -> None:
        kvm_mmu_notifier_invalidate_range_start(self.host, kvm, Hva(start), Hva(start + 512))
        assert lib.mm_collapse(self.machine.m, self.host.id, kvm.id, Hva(start)) == 0
        kvm_mmu_notifier_invalidate_range_end(self.host, kvm, Hva(start), Hva(start + 512))

    def stats(self, kvm: Kvm) -> dict[str, int]:
        return {name: lib.vm_stat(self.machine.m, kvm.id, VmStat(i)) for i, name in enumerate(VM_STAT_NAMES)}

    @contextmanager
    def counting(self, kvm: Kvm) -> Iterator[dict[str, int]]:
        """Statistics of the VM that the block changed, without the zeros."""
        before, changed = self.stats(kvm), dict[str, int]()
        yield changed
        after = self.stats(kvm)
        changed.update({name: after[name] - before[name] for name in after if after[name] != before[name]})

    def violations(self) -> dict[str, int]:
        counts = ffi.new("uint64_t[]", len(VIOLATION_KINDS))
        lib.oracle_counts(self.machine.m, counts)
        return {kind: n for kind, n in zip(VIOLATION_KINDS, counts, strict=True) if n}

    def counter(self, counter: int) -> int:
        values = ffi.new("uint64_t[]", lib.COUNTERS)
        lib.counters_sum(self.machine.m, values)
        return int(values[counter])

    def rcu(self) -> None:
        """All callbacks queued so far have run."""
        self.host.check(lib.rcu_barrier(self.machine.m, self.host.id))


def scopes(rig: Rig) -> dict[str, int]:
    """Flushes so far, by scope."""
    size = rig.machine.config["vms"] * len(FLUSH_SCOPES) * len(FLUSH_REASONS)
    flushes, necessary = ffi.new("uint64_t[]", size), ffi.new("uint64_t[]", size)
    lib.flushes_sum(rig.machine.m, flushes, necessary)
    n = len(FLUSH_REASONS)
    return {
        scope: sum(flushes[(vm * len(FLUSH_SCOPES) + i) * n + r] for vm in range(4) for r in range(n))
        for i, scope in enumerate(FLUSH_SCOPES)
    }


@contextmanager
def running_rig(**config: int) -> Iterator[Rig]:
    machine = Machine({**CONFIG, **config})
    rcu_cpu = machine.cpus[-1]
    rcu = threading.Thread(target=lib.rcu_thread, args=(machine.m, rcu_cpu.id))
    rcu.start()
    rig = Rig(machine)
    try:
        yield rig
        for kvm in list(rig.vms):
            rig.destroy(kvm)
    finally:
        machine.stop()
        rcu.join()
        machine.destroy()
        rig.live.close()


@contextmanager
def at_point(rig: Rig, cpu: int, kind: str, mode: str, action: Callable[[], object]) -> Iterator[None]:
    """Do `action` once, when that CPU passes the next point of this kind; it must."""
    fired: list[int] = []

    def hook(at: Cpu, what: str, obj: object, access: str) -> None:
        if at.id == cpu and (what, access) == (kind, mode) and not fired:
            fired.append(at.id)
            action()

    rig.machine.install(hook)
    try:
        yield
        assert fired
    finally:
        rig.machine.install(None)


def unmap_while_entering(rig: Rig, kvm: Kvm, guest: Guest, kind: str, before: Callable[[], object]) -> None:
    """Unmap pages 0 to 63; at the unmapper's first point `kind` the vCPU does `before`, reads page 5 on pCPU
    0, and is in guest mode until the flush is over."""
    in_guest, go_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=guest.read, args=(0, 5))

    def hook(at: Cpu, what: str, obj: object, access: str) -> None:
        if at is rig.host and (what, access) == (kind, "write") and not thread.ident:
            before()
            thread.start()
            assert in_guest.wait(10)
        elif at.id == 0 and what == "guest":
            in_guest.set()
            # If another CPU waits for it to leave, it must not wait.
            go_on.wait(0.3)

    rig.machine.install(hook)
    rig.unmap(kvm, 0, 64)
    go_on.set()
    thread.join()
    rig.machine.install(None)


def recreate_slot(rig: Rig, kvm: Kvm) -> None:
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), 0, Hva(0))
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0))


def page_is_a_root_again(
    rig: Rig, guest: Guest, pcpu: int, reader: Callable[[], AbstractContextManager[object]] = nullcontext
) -> None:
    """Slots come and go, and the guest writes on that pCPU to page 70, each time inside `reader()`, until the
    page of its root is that of its root again."""
    assert guest.vcpu.mmu.root is not None
    first = guest.vcpu.mmu.root.hfn
    for _ in range(200):
        recreate_slot(rig, guest.vcpu.kvm)
        with reader():
            guest.write(pcpu, 70)
        rig.rcu()
        if guest.vcpu.mmu.root.hfn == first:
            return
    raise AssertionError("the page did not become a root again")


def cr4_toggle(rig: Rig, guest: Guest) -> None:
    guest.execute(0, lib.GUEST_INSN_MOV_CR4, guest.vcpu.arch.cr4 ^ X86_CR4_PSE)


@contextmanager
def idle_pcpus(rig: Rig, *pcpus: CpuId) -> Iterator[None]:
    """Threads of pCPUs that run nothing and serve calls."""
    threads = []
    for pcpu in pcpus:
        lib.cpu_online(rig.machine.m, pcpu)
        threads.append(threading.Thread(target=lib.cpu_halt, args=(rig.machine.m, pcpu, 0)))
        threads[-1].start()
    yield
    for pcpu, thread in zip(pcpus, threads, strict=True):
        lib.cpu_notify(rig.machine.m, pcpu, lib.ATTENTION_RESCHED)
        thread.join()
        lib.cpu_clear_attention(rig.machine.m, pcpu, lib.ATTENTION_RESCHED)
        lib.cpu_offline(rig.machine.m, pcpu)
