"""Store buffers: x86-TSO instead of sequential consistency, for KVM's own accesses.

After Sewell, Sarkar, Owens, Zappa Nardelli, Myreen, "x86-TSO: a rigorous and usable programmer's model
for x86 multiprocessors", CACM 53(7), 2010: a plain store goes into its CPU's queue, and reaches memory
when the scheduler chooses, in the order of the stores; the CPU itself loads its newest one; locked
instructions, full barriers and other serializing instructions wait until the queue is empty. Plain stores
are:

    those to vcpu->mode, vcpu->cpu (WRITE_ONCE, smp_store_release), mmu_invalidate_seq and the fields with it;
    the relaxed and release stores of policies to their state; the store of an SPTE that only its owner may
    set (tdp_mmu_set_spte); the release of mmu_lock held for write and of SRCU, which come behind the stores
    that they protect; and a mutant's stores without the locked instruction that the kernel has (point "plain
    store").

Every other write is a locked instruction (requests, other SPTEs, locks, reference counts), or visible at once
together with all stores before it (Python's own objects, such as memslots; spinlocks are released behind a
fence). Interrupts are sent behind a fence (weak_wrmsr_fence()) and taken when the queue is empty; INVEPT and
INVVPID serialize (SDM vol. 3A, 9.3), VM entry and a context switch wait likewise. A grace period does not end
before two kinds of stores are visible: those that were waiting when it began, and those of the readers that
it waits for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final

from emulator.explain.processor import VISIBLE
from emulator.explore.engine.objects import Objects
from emulator.explore.engine.scheduler import Execution, Task
from emulator.explore.machine.control import Control, Readers
from emulator.machine.runtime import Cpu, Machine, Mode
from emulator.points import PointKind
from native.types import CpuId

Key = tuple[Hashable, ...]

# Points of KVM's code with a full barrier.  Points that begin a step and write, such as those that take a
# lock, imply a locked instruction.
_FENCES: Final = frozenset({"down", "unlocking", "smp_mb"})
# Points that write and imply neither: the native calls behind them are plain stores or locked
# instructions, or a user's method returns, which is no barrier.
_SPECIFIC: Final = frozenset({"policy_state", "policy answers"})


@dataclass(frozen=True, slots=True)
class Store:
    """A store that waits in a queue: `apply` makes it visible."""

    key: Key
    value: int
    what: str
    writes: int
    apply: Callable[[], object]
    by: Task | None = None
    reads: int = 0  # the objects that its effect depends on


class StoreBuffers:
    """A queue per CPU.

    `dirty`: CPUs that have stored since their last fence, whether or not the stores are visible by now,
    because the CPU's next step must not depend on when they become visible.
    """

    def __init__(self, objects: Objects, everything: int = 0) -> None:
        self.objects = objects
        self.everything = everything
        self.queues: dict[int, deque[Store]] = {}
        self.dirty: set[int] = set()
        self.put: dict[int, int] = {}  # number of all stores, by CPU
        self.gone: dict[int, int] = {}

    def add(self, cpu: CpuId) -> None:
        self.queues[cpu] = deque()
        self.put[cpu] = self.gone[cpu] = 0

    def mask(self, cpu: CpuId) -> int:
        return self.objects.bit(("store buffer", cpu))

    def all(self) -> int:
        return self.objects.mask(("store buffer", cpu) for cpu in self.queues)

    def store(self, execution: Execution, cpu: CpuId, store: Store) -> None:
        """Queue a store.  It belongs to the CPU's current step, because no other CPU can see it yet."""
        if cpu not in self.queues or execution.aborting:
            store.apply()
            execution.touch(store.reads, store.writes)
            return
        self.queues[cpu].append(store)
        self.put[cpu] += 1
        self.dirty.add(cpu)
        execution.touch(0, self.mask(cpu))

    def pending(self, execution: Execution, cpu: CpuId, key: Key) -> Store | None:
        """Return the CPU's own newest store to that object, which it loads."""
        if cpu not in self.dirty:
            return None
        execution.touch(self.mask(cpu), 0)
        return next((store for store in reversed(self.queues[cpu]) if store.key == key), None)

    def fence(self, execution: Execution, cpu: CpuId) -> None:
        """Wait until all of this CPU's stores are visible."""
        if cpu not in self.dirty:
            return
        self.dirty.discard(cpu)
        if execution.aborting:
            while self.queues[cpu]:
                self.queues[cpu].popleft().apply()
            return
        queue = self.queues[cpu]
        execution.step(("full barrier", cpu, "read"), self.mask(cpu), 0, lambda: not queue, "its stores")

    def drains(self, execution: Execution, cpu: CpuId) -> Callable[[], None]:
        """Return the daemon of one queue: each of its steps makes a store visible."""
        queue, mask = self.queues[cpu], self.mask(cpu)
        label = ("store buffer", cpu, "write")

        def body() -> None:
            while True:
                execution.step(label, self.everything, mask, lambda: bool(queue), "a store")
                store = queue.popleft()
                self.gone[cpu] += 1
                execution.current.label = (VISIBLE, store.what, "write")
                execution.touch(store.reads, store.writes)
                execution.current.acts_for = store.by  # await_change() ignores the task's own stores
                store.apply()

        return body


class BufferedReaders(Readers):
    """CPUs that read under RCU.  A grace period contains a full barrier on every CPU, after the CPU has left
    the read section that it was in."""

    def __init__(self, stores: StoreBuffers) -> None:
        super().__init__()
        self.stores = stores
        # The CPU's number of stores at each exit, by CPU and number of the exit.
        self._put: dict[tuple[int, int], int] = {}

    def leave(self, who: int) -> None:
        super().leave(who)
        self._put.setdefault((who, self.left.get(who, 0)), self.stores.put.get(who, 0))

    def now(self) -> tuple[tuple[int, int], ...]:
        queues = tuple((-1 - cpu, put) for cpu, put in self.stores.put.items() if self.stores.queues[cpu])
        return (*super().now(), *queues)

    def gone(self, before: tuple[tuple[int, int], ...]) -> bool:
        done = self.stores.gone
        if any(who < 0 and done[-1 - who] < n for who, n in before):
            return False
        readers = tuple(one for one in before if one[0] >= 0)
        return super().gone(readers) and all(
            done.get(who, 0) >= self._put[who, left + 1] for who, left in readers
        )


class BufferedControl(Control):
    """The control over a machine with store buffers."""

    def __init__(self, machine: Machine, objects: Objects) -> None:
        self.stores = StoreBuffers(objects, objects.bit(("everything",)))
        self.cpu_of: Callable[[Task], CpuId] = lambda task: CpuId(-1)  # the CPU that a task is on now
        self._plain: set[CpuId] = set()  # CPUs with a plain store as their next store
        super().__init__(machine, objects)

    def reset(self) -> None:
        super().reset()
        self.stores = StoreBuffers(self.objects, self.everything)
        self.rcu = BufferedReaders(self.stores)
        self._plain.clear()

    def point(self, cpu: Cpu, kind: PointKind, obj: Any, mode: Mode) -> None:
        execution = self.execution
        if execution is not None:
            if kind == "plain store":
                self._plain.add(cpu.id)
            elif kind in _FENCES or (mode == "write" and kind not in _SPECIFIC and self.is_step(kind)):
                self.stores.fence(execution, cpu.id)
        super().point(cpu, kind, obj, mode)

    def is_plain(self, cpu: CpuId) -> bool:
        """Return whether this is a plain store, where the kernel has a locked instruction."""
        plain = cpu in self._plain
        self._plain.discard(cpu)
        return plain

    def spawn_buffers(self, execution: Execution, names: dict[CpuId, str]) -> None:
        """Spawn a store buffer for each CPU that KVM's code runs on."""
        for cpu in names:
            self.stores.add(cpu)
        self.queues = self.stores.all()
        for cpu in names:
            execution.spawn(buffer_name(names[cpu]), self.stores.drains(execution, cpu), daemon=True)

    def interruptible(self, number: CpuId) -> tuple[int, Callable[[], bool]]:
        queued, stores = self.queued, self.stores
        return stores.mask(number), lambda: number in queued and not stores.queues[number]


def buffer_name(cpu: str) -> str:
    return f"stores:{cpu}"
