"""The control over one machine: its execution, and the state that its waits depend on.

The scheduler decides when calls on other CPUs arrive (one daemon per pCPU), and when grace periods begin and
end (one daemon).  Locks, calls and read sections are recorded here, because conditions are tested before
every step and must be cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from emulator.explore.engine.objects import Objects
from emulator.explore.engine.scheduler import Execution
from emulator.explore.machine.described import ANNOUNCED
from emulator.explore.machine.policy_memory import Memory
from emulator.explore.machine.undeclared import Audit
from emulator.litmus.harness import rcu_cpu
from emulator.machine.locks import RwSemaphore, SpinLock
from emulator.machine.runtime import Cpu, Machine, MachineMisuse, Mode
from emulator.points import PointKind
from native import VIOLATION_KINDS, ffi, lib
from native.types import CpuId, VcpuId, VmId

if TYPE_CHECKING:
    from emulator.explore.machine.adversary import Adversary
    from emulator.explore.machine.policy_attributes import PolicyAttributes
    from emulator.explore.machine.policy_reads import PolicyReads
    from emulator.explore.machine.races import Races
    from emulator.litmus.ops import Op
    from native._native import Array, GuestOp, Lib

_FIRST_VM: Final = VmId(0)

# Points that begin no step.  At most of them, the native call right behind is the step; the others order
# stores, which matters to store buffers only (store_buffers.py).
_COVERED: Final[frozenset[PointKind]] = ANNOUNCED | {"plain store", "rcu", "smp_mb", "unlocking"}


class RwLock:
    """The holders of an mmu_lock; `holders`: their CPUs.  waiting: the tasks that found it taken."""

    __slots__ = ("holders", "readers", "waiting", "writer")

    def __init__(self) -> None:
        self.holders: list[int] = []
        self.readers = 0
        self.writer = False
        self.waiting: set[int] = set()


class Readers:
    """Read sections of RCU or of one VM's SRCU, by reader; `left` counts each reader's exits.

    A grace period snapshots the active readers, then waits for each of them to leave.  The shared objects are
    therefore the entry ("rcu", "srcu") and each reader's exit ("rcu left", "srcu left"): an entry conflicts
    with the snapshot only, and a reader's exit with the wait for that reader only.
    """

    __slots__ = ("depth", "left")

    def __init__(self) -> None:
        self.depth: dict[int, int] = {}
        self.left: dict[int, int] = {}

    def enter(self, who: int) -> None:
        self.depth[who] = self.depth.get(who, 0) + 1

    def leave(self, who: int) -> None:
        depth = self.depth[who] = max(0, self.depth.get(who, 0) - 1)
        if not depth:
            self.left[who] = self.left.get(who, 0) + 1

    def now(self) -> tuple[tuple[int, int], ...]:
        """Return the active readers with their counts of exits, for `gone`."""
        return tuple((who, self.left.get(who, 0)) for who, depth in self.depth.items() if depth > 0)

    def inside(self, before: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
        """Return the readers of `before` that have not left since."""
        return tuple(who for who, left in before if self.left.get(who, 0) == left)

    def gone(self, before: tuple[tuple[int, int], ...]) -> bool:
        return not self.inside(before)


class Walks(NamedTuple):
    """Counts of hardware walks, of SPTEs in which they set A or D, of uses that the ledger of rights judged,
    and of translations that were needed again after a flush, which are judged as well."""

    misses: int
    updates: int
    judged: int
    refills: int

    def judged_since(self, before: Walks) -> bool:
        return self.judged != before.judged or self.refills != before.refills


class Control:
    """The state of one explored machine.

    `execution` is None between executions: then native calls go straight through, and a wait must end without
    another task.
    """

    def __init__(self, machine: Machine, objects: Objects) -> None:
        self.machine = machine
        self.objects = objects
        self._bits = objects.bits
        self.execution: Execution | None = None
        self.everything = objects.bit(("everything",))
        self.vm_of_vcpu: dict[VcpuId, VmId] = {}
        self.memory = Memory()
        self.paging: frozenset[int] = frozenset()  # VMs with page tables in their guests
        self.logging: frozenset[int] = frozenset()  # VMs with a dirty log, which names the pages to copy
        self.programs: dict[VcpuId, Array[GuestOp]] = {}  # the program of each vCPU's guest
        self.adversary: Adversary | None = None
        self.policy_reads: PolicyReads | None = None  # a user's policy is explored
        self.races: Races | None = None  # patched code is explored
        self.attributes: PolicyAttributes | None = None  # ... or a class that may remember
        self.patch = ""  # its patch
        # Called after each stretch of operations that a thread of init or final has done.
        self.on_alone: Callable[[str, tuple[Op, ...]], None] | None = None
        self.lib = lib  # the library that explored code calls
        self.queues = 0  # the store buffers, as objects (store_buffers.py)
        self.lib_class: Callable[[Control], Lib] | None = None  # instead of the usual ControlledLib
        # Tells whether the caller of cpu_relax() uses no value that it has read before (states.py).
        self.rests: Callable[[], bool] = lambda: False
        self._counters = ffi.new("uint64_t[]", lib.COUNTERS)
        self._violations = ffi.new("uint64_t[]", lib.VIOLATIONS)
        self._violations_now: Any = ffi.buffer(self._violations)
        self.forget()
        self.audit: Audit | None = None
        self.reset()

    def reset(self) -> None:
        self.mmu_locks: dict[int, RwLock] = {}
        self.rcu = Readers()
        self.srcu: dict[int, Readers] = {}
        # By task that waits for a grace period: the readers that the task waits for and has not seen leave.
        self.holdouts: dict[int, Callable[[], tuple[int, ...]]] = {}
        self.freed: list[int] = []  # tables given to call_rcu() since the last grace period began
        self.root_of: dict[int, int] = {}  # the root in the EPT_POINTER of each VMCS
        self.queued: set[int] = set()  # pCPUs to which an interrupt is on its way
        self.callbacks_run = 0
        self.exit_reason: int = lib.EXIT_REASONS  # of the last operation of a guest, if it ended guest mode

    @staticmethod
    def is_step(kind: str) -> bool:
        """Return whether a point of this kind begins a step itself, rather than the native call behind it."""
        return kind not in _COVERED and kind not in ("unlock", "up")

    def bit(self, *name: Hashable) -> int:
        return self._bits.get(name) or self.objects.bit(name)

    def mmu_lock(self, vm: VmId) -> RwLock:
        lock = self.mmu_locks.get(vm)
        if lock is None:
            lock = self.mmu_locks[vm] = RwLock()
        return lock

    def srcu_of(self, vm: VmId) -> Readers:
        readers = self.srcu.get(vm)
        if readers is None:
            readers = self.srcu[vm] = Readers()
        return readers

    def left(self, name: str, readers: Iterable[tuple[int, int]], *of: Hashable) -> int:
        """Return the objects that these readers' exits touch."""
        return self.objects.mask((name, *of, who) for who, _ in readers)

    def custody_of_tables(self, tables: Iterable[int]) -> int:
        """Return the objects that tell whether these tables are free.  Roots are tables, too."""
        return self.objects.mask(("custody of table", hfn) for hfn in tables)

    def frees(self, tables: Sequence[int]) -> int:
        """Return the objects that RCU callbacks write when they free these tables."""
        roots = self.root_frames
        mask = self.custody_of_tables(tables)
        for hfn in tables:
            if hfn in roots:
                mask |= self.bit("frames", "root")
            else:
                mask |= self.bit("frames", "table") | self.bit("custody of tables")
        return mask

    @property
    def root_frames(self) -> range:
        """Return the host frames that can be roots; frame 0 is never allocated."""
        return range(1, self.machine.config["root_frames"] + 1)

    def custody_of_root(self, cpu: CpuId | None = None) -> int:
        """Return the objects of the root that a walk on this pCPU begins at: of every root, if EPT_POINTER
        was written before the execution or the pCPU is not known."""
        root = None if cpu is None else self.root_of.get(lib.vmptrst(self.machine.m, cpu))
        return self.custody_of_tables(self.root_frames if root is None else (root,))

    # --- the hook at KVM's ordering points ------------------------------------------------------------------

    def point(self, cpu: Cpu, kind: PointKind, obj: Any, mode: Mode) -> None:
        if self.audit is not None:
            self.audit.announced = kind
        if kind in _COVERED:
            return
        execution = self.execution
        if kind in ("policy", "policy answers"):
            self._policy(execution, kind, obj)
        elif execution is None:
            return
        elif kind == "lock":
            self._lock(execution, obj)
        elif kind == "unlock":
            execution.touch(0, self.bit("lock", obj.name))
        elif kind == "down":
            self._down(execution, obj, mode)
        elif kind == "up":
            mask = self.bit("lock", obj.name)
            execution.touch(*((mask, 0) if mode == "read" else (0, mask)))
        else:
            mask = self.bit(kind, obj)
            execution.step((kind, obj, mode), *((mask, 0) if mode == "read" else (0, mask)))

    def _policy(self, execution: Execution | None, kind: str, obj: Any) -> None:
        """Note that a user's policy is asked or answers, which happens before the execution as well."""
        if kind == "policy":
            if execution is not None:
                execution.step((kind, obj, "write"), 0, self.bit(kind, obj))
                self.memory.asking(execution.current.index)
                if self.attributes is not None:
                    self.attributes.asking(execution.current.index)
            if self.policy_reads is not None:
                self.policy_reads.begin()
            return
        if self.policy_reads is not None:
            self.policy_reads.end()
        if execution is not None:
            # A policy that remembers this query makes the next iteration of the loop differ.
            changed = self.memory.changed(execution.current.index)
            execution.current.changed |= changed
            if self.attributes is not None:
                self.attributes.answered(execution.current.index, changed)

    def _lock(self, execution: Execution, lock: Any) -> None:
        mask = self.bit("lock", lock.name)
        token = lock._token
        label = ("spinlock" if isinstance(lock, SpinLock) else "mutex", lock.name, "write")
        execution.current.holders = lambda: (lock.owner,) if lock.owner >= 0 else ()
        execution.step(label, 0, mask, lambda: bool(token), lock.name)
        execution.current.holders = tuple

    def _down(self, execution: Execution, semaphore: RwSemaphore, mode: Mode) -> None:
        """Acquire a semaphore.  Readers do not exclude each other, so their order makes no difference."""
        mask = self.bit("lock", semaphore.name)
        masks = (mask, 0) if mode == "read" else (0, mask)
        free = partial(semaphore.free_for, mode == "write")
        execution.step(("rwsem", semaphore.name, mode), *masks, free, semaphore.name)

    # --- daemons --------------------------------------------------------------------------------------------

    def spawn_daemons(self, execution: Execution) -> None:
        for number in map(CpuId, range(self.machine.pcpus)):
            execution.spawn(f"irq{number}", self._interrupts(execution, number), daemon=True)
        execution.spawn("rcu", self._grace_periods(execution), daemon=True)

    def _interrupts(self, execution: Execution, number: CpuId) -> Callable[[], None]:
        """Deliver the IPIs to a pCPU: each arrives when the scheduler chooses this daemon."""
        calls, irq = self.bit("calls", number), self.bit("irq", number)
        tlb, queued, m = self.bit("tlb", number), self.queued, self.machine.m
        stores, arrives = self.interruptible(number)

        def body() -> None:
            while True:
                execution.step(("interrupt", number, "write"), stores, calls | irq, arrives, "an IPI")
                queued.discard(number)
                if lib.ipi_arrive(m, number):
                    execution.touch(0, tlb)

        return body

    def interruptible(self, number: CpuId) -> tuple[int, Callable[[], object]]:
        """Return the further objects that an interrupt's arrival depends on, and its condition."""
        return 0, partial(self.queued.__contains__, number)

    def _grace_periods(self, execution: Execution) -> Callable[[], None]:
        callbacks, rcu = self.bit("callbacks"), self.bit("rcu")
        m, cpu = self.machine.m, rcu_cpu(self.machine).id

        def body() -> None:
            while True:
                execution.step(
                    ("grace period", "begins", "write"),
                    self.queues | callbacks,
                    rcu,
                    partial(lib.rcu_pending, m),
                    "callbacks",
                )
                before = self.rcu.now()
                due = range(self.callbacks_run, self.callbacks_run + lib.rcu_pending(m))
                lib.rcu_gp_begin(m, cpu)
                done = self.objects.mask(("callbacks done", number) for number in due)
                frees, self.freed = self.frees(self.freed), []
                self.holdouts[execution.current.index] = partial(self.rcu.inside, before)
                execution.step(
                    ("grace period", "ends", "write"),
                    self.queues,
                    frees | done | self.left("rcu left", before),
                    partial(self.rcu.gone, before),
                    "readers of RCU",
                )
                del self.holdouts[execution.current.index]
                run = lib.rcu_gp_end(m, cpu)
                if run < 0:
                    raise MachineMisuse(f"a reader of RCU on CPU {lib.rcu_holdout(m)} that explore missed")
                self.callbacks_run += run

        return body

    # --- between executions ---------------------------------------------------------------------------------

    def run_callbacks(self) -> None:
        """Run all pending callbacks, as rcu_barrier() does, while no task runs."""
        m, cpu = self.machine.m, rcu_cpu(self.machine).id
        while lib.rcu_pending(m):
            lib.rcu_gp_begin(m, cpu)
            if lib.rcu_gp_end(m, cpu) < 0:
                raise MachineMisuse(f"CPU {lib.rcu_holdout(m)} stays in a read section of RCU")

    # --- the machine's counts and the oracle's --------------------------------------------------------------

    def walks(self, cpu: CpuId) -> Walks:
        """Return this pCPU's counts so far."""
        lib.counters_read(self.machine.m, cpu, self._counters)
        of = self._counters
        misses = of[lib.COUNT_L2_MISSES] + of[lib.COUNT_GPA_LOOKUPS]
        judged, refills = of[lib.COUNT_ORACLE_SLOW], of[lib.COUNT_REFILLS]
        return Walks(misses, of[lib.COUNT_WALK_UPDATES], judged, refills)

    def caches_tables(self, cpu: CpuId) -> bool:
        """Return whether this pCPU's paging-structure caches hold any entry."""
        return bool(lib.psc_dump(lib.cpu_tlb(self.machine.m, cpu), ffi.NULL, 0))

    def next_op(self, vcpu: VcpuId) -> GuestOp | None:
        """Return the guest's next operation; None at the end of its program."""
        ops = self.programs[vcpu]
        position = lib.guest_program_position(self.machine.m, vcpu)
        return ops[position] if position < len(ops) else None

    def contents(self, vm: VmId, page: int | None) -> int:
        """Return the objects for contents that a guest's store changes and user space copies.

        page: None for flags in the guest's tables.
        """
        if vm not in self.logging:
            return 0
        contents = self.bit("contents", vm)
        return contents if page is None or vm in self.paging else contents | self.bit("contents", vm, page)

    def vm_of(self, vcpu: VcpuId) -> VmId:
        return self.vm_of_vcpu.get(vcpu, _FIRST_VM)

    def forget(self) -> None:
        """Attribute the violations that were reported until now to earlier executions."""
        lib.oracle_counts(self.machine.m, self._violations)
        self._known = list(self._violations)
        self._violations_known: bytes = self._violations_now[:]

    def has_violation(self) -> bool:
        """Return whether the oracle has reported a violation in this execution."""
        lib.oracle_counts(self.machine.m, self._violations)
        return bool(self._violations_now[:] != self._violations_known)

    def violations(self) -> str:
        """Return the kinds of the violations that the oracle has reported in this execution, "" for none."""
        if not self.has_violation():
            return ""
        counts = zip(VIOLATION_KINDS, self._violations, self._known, strict=True)
        return ", ".join(kind for kind, n, before in counts if n > before)

    def judge(self) -> None:
        """Stop the execution if the last access was a violation: one is enough."""
        if self.execution is not None and self.has_violation():
            self.execution.stop()
