"""Connect a tree's compiled TDP MMU with a machine: Python calls its functions, and it calls Python's."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cffi import FFI

from emulator.kernel_tree.build import shim_text
from emulator.kernel_tree.on_machine import kicks
from emulator.kvm.host_work import host_works
from emulator.kvm.mmu.hugepage import kvm_mmu_max_mapping_level
from emulator.kvm.structs import Kvm, KvmMemorySlot
from emulator.kvm.virt.slots import mark_page_dirty_in_slot
from emulator.machine.runtime import Cpu, Hook, Machine, MachineError, Mode, timed
from emulator.points import PointKind
from native import ffi as _native_ffi
from native import lib as core_lib
from native.types import FlushReason, Gfn, VcpuId, VmId

# The members of struct tree_core that are functions, and the functions of the core to which they point.
_FUNCTIONS: Final = {
    "spte_change": "kernel_spte_change",
    "split_custody": "kernel_split_custody",
    "set_pfn": "kernel_set_pfn",
    "table_holds": "tdp_table_holds",
    "huge_custody": "mm_huge_custody",
    "frame_tag": "frame_tag_of",
    "table_alloc": "ept_table_alloc",
    "table_free": "ept_table_free",
    "rcu_read_lock": "rcu_read_lock",
    "rcu_read_unlock": "rcu_read_unlock",
    "queue_callback": "call_rcu",
    "rcu_barrier": "rcu_barrier",
    "read_lock": "mmu_read_lock",
    "write_lock": "mmu_write_lock",
    "read_unlock": "mmu_read_unlock",
    "write_unlock": "mmu_write_unlock",
    "needbreak": "mmu_lock_needbreak",
}
_POINTS: Final[dict[str, PointKind]] = {
    "POINT_SPTE": "spte",
    "POINT_SPTES": "sptes",
    "POINT_RCU": "rcu",
    "POINT_MMU_LOCK": "mmu_lock",
    "POINT_CALL_RCU": "call_rcu",
    "POINT_FRAMES": "frames",
    "POINT_ROOTS": "tdp_mmu_roots",
}
# Typed as Any, because the stub of the module does not declare the addresses of functions.
core_ffi: Any = _native_ffi
_MODES: Final[tuple[Mode, Mode]] = ("read", "write")


@dataclass(slots=True)
class Thread:
    """A CPU of the machine, and the operation of the tree's that it runs.

    error: the exception that a Python function raised when the operation called it.  since: the time at which
    the operation began; 0: none runs.  ident: the thread that runs it.
    """

    cpu: Cpu
    state: Any
    kvm: Kvm | None = None
    slot: KvmMemorySlot | None = None
    reason: FlushReason = core_lib.REASON_OTHER
    error: BaseException | None = None
    since: float = 0.0
    ident: int = 0
    # The values that `state` was given last: whether there is a hook, the lock that is held, and RCU's depth;
    # at first values that no CPU has, because the state may have been put back to any.
    hook: Hook | None = None
    timing: timed | None = None  # of the remote flush that has begun
    flushed: bool = False  # the operation has made a remote flush
    held: tuple[int, int] = (-1, -1)


# A function that the tree's code calls, with two numbers and a text.
Handler = Callable[[Thread, int, int, Any], int | None]


class Tree:
    """The object at `path`, loaded; `findings` counts its findings by their text."""

    def __init__(self, path: Path, report_fd: int = -1) -> None:
        self.ffi: Any = FFI()
        self.ffi.cdef(shim_text("machine.h"))
        self.lib: Any = self.ffi.dlopen(str(path))
        self.report_fd = report_fd
        self.findings: Counter[str] = Counter()
        self.machine: Machine | None = None
        self.threads: list[Thread] = []
        lib: Any = self.lib
        self._points = {getattr(lib, name): kind for name, kind in _POINTS.items()}
        self._handlers: dict[int, Handler] = {
            lib.CALL_FLUSH_SLOT: self._flush_slot,
            lib.CALL_DIRTY: self._dirty,
            lib.CALL_MAX_LEVEL: self._max_level,
            lib.CALL_SCHEDULE: self._schedule,
            lib.CALL_YIELDED: self._yielded,
            lib.CALL_WARN: self._warn,
            lib.CALL_POINT: self._point,
            **kicks.handlers(lib),
        }
        self._explores = False
        signature = "int(unsigned int, unsigned int, unsigned long long, unsigned long long, const char *)"
        self._callback = self.ffi.callback(signature, self._call)
        self.invalid = int(lib.tree_role_invalid())

    def attach(self, machine: Machine) -> None:
        """Connect the object with this machine.  No operation of the tree's may be running."""
        ffi, core = self.ffi, self.ffi.new("struct tree_core *")
        core.machine = ffi.cast("void *", address(machine.m))
        core.memory = ffi.cast("unsigned char *", core_lib.kernel_frames(machine.m))
        core.frames = _tables(machine)
        core.cpus, core.vcpus = len(machine.cpus), machine.config["vcpus"]
        for member, name in _FUNCTIONS.items():
            kind = ffi.typeof(getattr(core, member))
            setattr(core, member, ffi.cast(kind, address(core_ffi.addressof(core_lib, name))))
        core.rcu_function = core_lib.RCU_FUNCTION
        core.root_frame, core.table_frame = core_lib.FRAME_ROOT, core_lib.FRAME_TABLE
        core.again, core.misuse = core_lib.MACHINE_AGAIN, core_lib.MACHINE_MISUSE
        core.nomem = core_lib.MACHINE_NOMEM
        core.call = self._callback
        if self.lib.tree_attach(core, self.report_fd):
            raise MemoryError("no memory for the tree's object")
        core_lib.rcu_set_function(address(self.lib.shim_rcu_function()))
        self.threads = [Thread(cpu, self.lib.tree_cpu(cpu.id)) for cpu in machine.cpus]
        self.machine = machine

    def explore(self, handlers: Mapping[int, Handler]) -> None:
        """Tell the handlers every access of the tree's code to state that CPUs share, from now on."""
        self._handlers.update(handlers)
        self._explores = True

    def keep(self) -> None:
        """Keep the state of the tree's code, for put_back()."""
        if self.lib.tree_keep():
            raise MemoryError("no memory for a copy of the tree's state")

    def put_back(self) -> None:
        """Restore the state that keep() has kept.  No operation may be running."""
        self.lib.tree_put_back()
        self.threads = [Thread(thread.cpu, thread.state) for thread in self.threads]

    # --- operations -----------------------------------------------------------------------------------------

    def run(
        self,
        cpu: Cpu,
        kvm: Kvm,
        function: Callable[..., int],
        *arguments: Any,
        slot: KvmMemorySlot | None = None,
        reason: FlushReason = core_lib.REASON_REMOTE_ZAP,
    ) -> int:
        """Run an operation of the tree's on this CPU, with the locks that the caller holds.

        Raises the exception that a Python function raised when the operation called it, or the error with
        which the operation was given up.
        """
        thread = self.threads[cpu.id]
        state = thread.state
        if thread.kvm is not kvm:
            self._set_kvm(thread, kvm)
        # The slot's fields are copied once: a KvmMemorySlot never changes.
        if slot is not None and slot is not thread.slot:
            _set_slot(thread, slot)
        if thread.hook is not cpu.hook:
            thread.hook = cpu.hook
            state.points = self._points_of(cpu)
        if thread.held != (held := (cpu.mmu_lock_held, cpu.rcu_depth)):
            state.lock, state.rcu_depth = thread.held = held
        if state.inside:
            raise MachineError(f"two operations of the tree's code on CPU {cpu.id}")
        thread.reason = reason
        thread.ident, thread.since = threading.get_ident(), time.monotonic()
        result = function(cpu.id, *arguments)
        thread.since = 0.0
        # An operation ends with the locks that it began with: shim_end() sees to that if it was given up.
        cpu.mmu_lock_held, cpu.rcu_depth = held
        if thread.flushed:
            thread.flushed = False
            cpu.stat(kvm.id, core_lib.STAT_REMOTE_TLB_FLUSH, self.lib.tree_take_flushes(kvm.id))
        if state.error:
            self._fail(thread)
        return result

    def _points_of(self, cpu: Cpu) -> int:
        if self._explores:
            return int(self.lib.POINTS_STEPS)
        return int(self.lib.POINTS_NONE if cpu.hook is None else self.lib.POINTS_DELAYS)

    def _set_kvm(self, thread: Thread, kvm: Kvm) -> None:
        thread.kvm, state, params = kvm, thread.state, kvm.params
        state.vm, state.chunk, state.resched = kvm.id, params.chunk, params.chunk * params.resched_chunks

    def set_vcpus(self, vm: VmId, numbers: Sequence[VcpuId]) -> None:
        """Say which vCPUs a VM has.  None of its operations may be running."""
        if self.lib.tree_set_vcpus(vm, numbers, len(numbers)):
            raise MemoryError("no memory for the tree's vCPUs")

    def _fail(self, thread: Thread) -> None:
        cpu, state = thread.cpu, thread.state
        cpu.mmu_lock_held, cpu.rcu_depth = thread.held = state.lock, state.rcu_depth
        error, thread.error = thread.error, None
        if error is not None:
            raise error
        thread.cpu.fail(thread.state.error)

    # --- called by the tree's code --------------------------------------------------------------------------

    def _call(self, number: int, what: int, a: int, b: int, text: Any) -> int:
        thread = self.threads[number]
        cpu, state = thread.cpu, thread.state
        cpu.mmu_lock_held, cpu.rcu_depth = state.lock, state.rcu_depth
        try:
            return self._handlers[what](thread, a, b, text) or 0
        except BaseException as error:  # no exception may leave through C
            thread.error = error
            return int(core_lib.MACHINE_STOPPED)

    def _flush_slot(self, thread: Thread, a: int, b: int, text: Any) -> None:
        """Check what kvm_flush_remote_tlbs_memslot() asserts; the tree's code flushes then."""
        assert _of(thread).slots_lock.is_held(thread.cpu), "slots_lock is not held"

    def _dirty(self, thread: Thread, a: int, b: int, text: Any) -> None:
        assert thread.slot is not None
        if thread.slot.dirty_track_enabled():
            mark_page_dirty_in_slot(thread.cpu, thread.slot, Gfn(a))

    def _max_level(self, thread: Thread, a: int, b: int, text: Any) -> int:
        assert thread.slot is not None
        return kvm_mmu_max_mapping_level(thread.cpu, _of(thread), thread.slot, Gfn(a))

    def _schedule(self, thread: Thread, a: int, b: int, text: Any) -> None:
        host_works(thread.cpu, _of(thread))

    def _yielded(self, thread: Thread, a: int, b: int, text: Any) -> None:
        cpu, kvm = thread.cpu, _of(thread)
        cpu.stat(kvm.id, core_lib.STAT_YIELDS)
        cpu.stat(kvm.id, core_lib.STAT_YIELDS_PENDING, a)
        cpu.stat(kvm.id, core_lib.STAT_YIELDS_INVALIDATED, b)
        cpu.event(core_lib.EVENT_YIELD, kvm.id, a, kvm.id)

    def _warn(self, thread: Thread, a: int, b: int, text: Any) -> None:
        said = f"WARN at {self.ffi.string(text).decode('utf-8', 'replace')}"
        if a == self.lib.FINDING_MISSING:
            said = f"the tree calls {said.removeprefix('WARN at ')}(), which the shim does not have"
        self.findings[said] += 1

    def _point(self, thread: Thread, a: int, b: int, text: Any) -> None:
        thread.cpu.point(self._points[a], None, _MODES[b])


def _set_slot(thread: Thread, slot: KvmMemorySlot) -> None:
    thread.slot, state = slot, thread.state
    state.slot_as_id, state.slot_flags = slot.as_id, slot.flags
    state.slot_base, state.slot_npages, state.slot_hva = slot.base_gfn, slot.npages, slot.userspace_addr


def _of(thread: Thread) -> Kvm:
    assert thread.kvm is not None
    return thread.kvm


def address(pointer: Any) -> int:
    """Return the address that a pointer of either of the two libraries holds."""
    either: Any = core_ffi if isinstance(pointer, core_ffi.CData) else FFI()
    return int(either.cast("uintptr_t", pointer))


def _tables(machine: Machine) -> int:
    """Return the first frame number behind those of tables; frame 0 is never a table."""
    return 1 + machine.config["root_frames"] + machine.config["table_frames"]
