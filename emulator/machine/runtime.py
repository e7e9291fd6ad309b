"""The machine as KVM's code sees it: CPUs, errors, ordering points, RCU, and how Python waits.

The native core takes the acting CPU as an argument; here that CPU is an object, `Cpu`, and every function of
`emulator.kvm` takes it first.  A pCPU's thread owns its `Cpu`; other threads own a housekeeping one.

All waiting in Python is done here and in `emulator.machine.locks`, by `cpu_wait_event`, which releases the
GIL, keeps running the calls that other CPUs queue for this one, and returns when the machine stops.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

from emulator.points import PointKind
from native import ffi, lib
from native.types import CpuId, EventKind, HistogramId, VmId, VmStat, Vpid

if TYPE_CHECKING:
    from native._native import MachinePtr

Mode = Literal["read", "write"]
# Called at an ordering point with the acting CPU, the kind of object, the object, and the access.
Hook = Callable[["Cpu", PointKind, object, Mode], None]

# How long cpu_relax() naps.
RELAX_MICROSECONDS: Final = 50
# Cpu.mmu_lock_held
READ: Final = 1
WRITE: Final = 2
# The most neighbours that one fault maps (emulator.kvm.mmu.page_fault): the length of the scratch arrays.
FAULT_AROUND_MAX: Final = 64
# The 4K pages of one of the host's huge pages.
HPAGE_PMD_NR: Final[int] = lib.BLOCK_FRAMES


class MachineError(Exception):
    """A native call failed."""


class MachineStopped(MachineError):
    """The machine stops, and the thread must unwind."""


class CpuOffline(MachineError):
    """This CPU was taken offline under its thread."""


class MachineMisuse(MachineError):
    """A wait where waiting is forbidden: interrupts off, inside RCU, under a lock."""


class OutOfMemory(MemoryError):
    """The process itself has no memory left for a machine, which no policy or test can cause."""


class OutOfFrames(MachineError):
    """No host frame of the wanted kind is left."""


class TryAgain(MachineError):
    """A try form did not succeed; callers that expect this check the return value instead."""


# Kind, field of the configuration, purpose.  A litmus test's [machine] has keys of the same names.
_FRAME_KINDS = (
    (lib.FRAME_ROOT, "root_frames", "EPT roots"),
    (lib.FRAME_TABLE, "table_frames", "EPT tables"),
    (lib.FRAME_GUEST, "guest_frames", "pages of guests, which the VMs' sizes give"),
    (lib.FRAME_BLOCK, "guest_blocks", "huge pages of guests"),
)


class Machine:
    """Owns the native machine.

    `cpus[i]` is CPU i: first the pCPUs, `pcpus` of them, then the housekeeping CPUs, on which ioctl callers
    and the host's memory management run.  `config` holds the fields of the core's `struct machine_config`.
    `vpids`: the number of VPIDs; `vmx_vpids`: those that are free.  stopping: waits end by MachineStopped.
    `m`: the native machine.
    """

    __slots__ = ("config", "cpus", "m", "vmx_vpids", "vpids")

    def __init__(self, config: Mapping[str, int]) -> None:
        self.config = dict(config)
        error = ffi.new("char[]", 200)
        self.m: MachinePtr = lib.machine_create(ffi.new("struct machine_config *", self.config), error, 200)
        if self.m == ffi.NULL:
            raise OutOfMemory(ffi.string(error).decode() or "the machine could not be built")
        pcpus = self.config["pcpus"]
        self.cpus = [Cpu(self, i, i < pcpus) for i in range(pcpus + self.config["housekeeping"])]
        # VPIDs belong to the host, not to a VM (vmx.c: vmx_vpid_bitmap); 0 is the host's own.  To take one or
        # give it back is a single list operation, and the last one freed is the next one used.  Each vCPU
        # uses one, also while it is being made or freed.
        self.vpids = min((1 << 16) - 1, 2 * self.config.get("vcpus", 0) + 16)
        self.vmx_vpids = list(map(Vpid, range(self.vpids, 0, -1)))

    def limit_vpids(self, count: int) -> None:
        """Leave `count` VPIDs at most, before the first is taken."""
        self.vpids = min(self.vpids, count)
        self.vmx_vpids = self.vmx_vpids[-self.vpids :]

    @property
    def pcpus(self) -> int:
        return self.config["pcpus"]

    @property
    def stopping(self) -> bool:
        return bool(lib.machine_stopping(self.m))

    def stop(self) -> None:
        lib.machine_stop(self.m)

    def exhausted_frames(self) -> str:
        """Say which kinds of host frames are all in use, and how many the machine has of them."""
        used_up = []
        for kind, key, what in _FRAME_KINDS:
            total = lib.frames_total(self.m, kind)
            if total and lib.frames_in_use(self.m, kind) >= total:
                used_up.append(f"{what} ({key} = {total})")
        return f"no host frame is left for {' and '.join(used_up) or 'this purpose'}"

    def destroy(self) -> None:
        """Free the native machine; no thread may be inside a call on it any more."""
        if self.m != ffi.NULL:
            m, self.m = self.m, ffi.NULL
            for cpu in self.cpus:
                cpu.m = ffi.NULL
            lib.machine_destroy(m)

    def install(self, hook: Hook | None) -> None:
        """Call `hook` at every ordering point of every CPU; None removes it."""
        for cpu in self.cpus:
            cpu.hook = hook


class Cpu:
    """One CPU: the identity of a thread for IPIs, RCU and locks, and that thread's scratch memory.

    `id` is its index in `machine.cpus`.  `is_pcpu`: it is a physical CPU, with a TLB; otherwise it is a
    housekeeping CPU of an ioctl caller or of the host's memory management.  `vcpu`: the vCPU that is loaded
    on it, or None.  kick_mask: a bit for each pCPU that the CPU is about to interrupt, in kick_mask_words
    words of 64 bits.

    `waits_for`: the condition that it awaits, for reports.  `hook` is called at each ordering point.  `m` is
    the native machine.  page, sptes, tables, hfns, tags, writable: scratch memory of page faults.
    `rcu_depth`, `mmu_lock_held` and `spinlocks` mirror what the thread holds, so that guards release exactly
    that when a wait inside them ended with MachineStopped.
    """

    __slots__ = (
        "hfns",
        "hook",
        "id",
        "is_pcpu",
        "kick_mask",
        "kick_mask_words",
        "m",
        "machine",
        "mmu_lock_held",
        "page",
        "rcu_depth",
        "spinlocks",
        "sptes",
        "tables",
        "tags",
        "vcpu",
        "waits_for",
        "writable",
    )

    def __init__(self, machine: Machine, number: int, is_pcpu: bool) -> None:
        self.machine = machine
        self.m = machine.m
        self.id = CpuId(number)
        self.is_pcpu = is_pcpu
        self.hook: Hook | None = None
        self.rcu_depth = 0
        self.mmu_lock_held = 0
        self.spinlocks = 0
        # kvm_running_vcpu: the vCPU that is loaded here (emulator.kvm.structs.Vcpu).
        self.vcpu: Any = None
        # The awaited condition in wait_until(), for reports.
        self.waits_for = ""
        # Per-CPU scratch, as the kernel's cpu_kick_mask; the rest saves allocations in page faults.
        self.kick_mask_words = (machine.config["pcpus"] + 63) // 64
        self.kick_mask = ffi.new("uint64_t[]", self.kick_mask_words)
        self.page = ffi.new("struct mm_page *")
        self.sptes = ffi.new("uint64_t[]", 8)
        self.tables = ffi.new("uint32_t[]", 8)
        self.hfns = ffi.new("uint32_t[]", FAULT_AROUND_MAX)
        self.tags = ffi.new("uint32_t[]", FAULT_AROUND_MAX)
        self.writable = ffi.new("uint32_t[]", FAULT_AROUND_MAX)

    def __repr__(self) -> str:
        return f"<{'pCPU' if self.is_pcpu else 'housekeeping CPU'} {self.id}>"

    def check(self, rc: int) -> int:
        """Return `rc` of a native call, or raise the exception that it stands for."""
        if rc < 0:
            self.fail(rc)
        return rc

    def fail(self, rc: int) -> NoReturn:
        if rc == lib.MACHINE_STOPPED:
            raise MachineStopped
        if rc == lib.MACHINE_OFFLINE:
            raise CpuOffline(f"CPU {self.id}")
        if rc == lib.MACHINE_NOMEM:
            raise OutOfFrames(self.machine.exhausted_frames())
        if rc == lib.MACHINE_AGAIN:
            raise TryAgain
        if rc == lib.MACHINE_MISUSE:
            text = ffi.string(lib.machine_error_text(self.m, self.id)).decode()
            raise MachineMisuse(f"CPU {self.id}: {text}")
        raise MachineError(f"CPU {self.id}: native error {rc}")

    def point(self, kind: PointKind, obj: object, mode: Mode) -> None:
        """Mark a step at which order matters: `kind` and `obj` name the object that is read or written."""
        if self.hook is not None:
            self.hook(self, kind, obj, mode)

    def stat(self, vm: VmId, stat: VmStat, n: int = 1) -> None:
        lib.vm_stat_add(self.m, vm, stat, n)

    def event(self, kind: EventKind, a: int, b: int, vm: int = -1) -> None:
        """Record an event in this CPU's ring, for reports; the VM is packed as the core's event_of() does."""
        lib.event_record(self.m, self.id, EventKind((vm + 1) << 16 | kind), a, b)


class timed:  # noqa: N801 - reads like a statement
    """A context that records in one of the native histograms how long its block took."""

    __slots__ = ("cpu", "histogram", "start")

    def __init__(self, cpu: Cpu, histogram: HistogramId) -> None:
        self.cpu, self.histogram = cpu, histogram

    def __enter__(self) -> None:
        self.start = time.monotonic_ns()

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        elapsed = time.monotonic_ns() - self.start
        lib.histogram_record(self.cpu.m, self.cpu.id, self.histogram, elapsed)


def smp_mb(cpu: Cpu) -> None:
    """smp_mb(): mark a full barrier.

    Real threads need none, because every access of the core is sequentially consistent; with store buffers,
    explore waits here.
    """
    cpu.point("smp_mb", None, "write")


def plain_store(cpu: Cpu, obj: object) -> None:
    """Mark this CPU's next store as no locked instruction (for mutants; explore with store buffers)."""
    cpu.point("plain store", obj, "write")


def cpu_relax(cpu: Cpu) -> None:
    """Yield the GIL and the processor, in a loop that only another thread's progress can end.

    It naps for some microseconds and runs queued calls meanwhile; real CPUs execute `pause`.
    """
    cpu.check(lib.cpu_wait_event(cpu.m, cpu.id, lib.cpu_event(cpu.m, cpu.id), RELAX_MICROSECONDS))


def wait_until(cpu: Cpu, condition: Callable[[], bool], what: str) -> None:
    """Wait until `condition` holds; the thread that makes it true must call `wake`.

    The event is read before the condition is tested, so that a wake-up in between is not lost.
    """
    if cpu.spinlocks:
        raise MachineMisuse(f"CPU {cpu.id}: waits for {what} while it holds a spinlock")
    cpu.waits_for = what
    while True:
        seq = lib.cpu_event(cpu.m, cpu.id)
        if condition():
            cpu.waits_for = ""
            return
        cpu.check(lib.cpu_wait_event(cpu.m, cpu.id, seq, 0))


def wake(machine: Machine, cpu_id: CpuId) -> None:
    lib.cpu_wake(machine.m, cpu_id)


class rcu_read_lock:  # noqa: N801 - the kernel's name
    """An RCU read section.  On exit it restores the nesting depth from entry, also after a failed yield."""

    __slots__ = ("cpu", "depth")

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu

    def __enter__(self) -> None:
        self.depth = self.cpu.rcu_depth
        rcu_enter(self.cpu)

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        if self.cpu.rcu_depth > self.depth:
            rcu_leave(self.cpu)


def rcu_enter(cpu: Cpu) -> None:
    lib.rcu_read_lock(cpu.m, cpu.id)
    cpu.rcu_depth += 1


def rcu_leave(cpu: Cpu) -> None:
    cpu.rcu_depth -= 1
    lib.rcu_read_unlock(cpu.m, cpu.id)
    cpu.point("rcu", cpu.id, "write")
