"""Store buffers: x86-TSO instead of sequential consistency, for KVM's own accesses.

After Sewell, Sarkar, Owens, Zappa Nardelli, Myreen, "x86-TSO: a rigorous and usable programmer's model
for x86 multiprocessors", CACM 53(7), 2010: a plain store goes into its CPU's queue, and reaches memory
when the scheduler says so, in the order of the stores; the CPU itself sees its newest one; locked
instructions, full barriers and whatever else serializes wait until the queue is empty. What is a plain
store here:

    vcpu->mode, vcpu->cpu (WRITE_ONCE, smp_store_release), mmu_invalidate_seq and what belongs to it, the
    clearing of masks of pCPUs, an SPTE that its owner sets alone (tdp_mmu_set_spte); the release of mmu_lock
    held for write and of SRCU, which come behind what they protect; and what a mutant stores without the
    locked instruction that the kernel has (point "plain store").

Everything else that writes is a locked instruction (requests, other SPTEs, locks, reference counts), or
visible at once together with all stores before it (Python's own objects, such as memslots; spinlocks are
released behind a fence). Interrupts are sent behind a fence (weak_wrmsr_fence()) and taken when the queue
is empty; INVEPT and INVVPID serialize (SDM vol. 3A, 9.3), VM entry and a context switch wait likewise; a
grace period does not end before the stores are visible that were waiting when it began, and those of the
readers that it waits for.
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

# Points of KVM's code at which a full barrier stands.  At all that begin a step and write, such as taking a
# lock, there is a locked instruction.
_FENCES: Final = frozenset({"down", "unlocking", "smp_mb"})
# ... and those where the calls behind them say what they are.
_SPECIFIC: Final = frozenset({"root_tlb"})


@dataclass(frozen=True, slots=True)
class Store:
    """One that is on its way: `apply` makes it visible."""

    key: Key
    value: int
    what: str
    writes: int
    apply: Callable[[], object]
    by: Task | None = None
    reads: int = 0  # what its effect depends on


class StoreBuffers:
    """A queue per CPU.  `dirty`: CPUs that have stored something since their last fence, whether or not it is
    visible by now: what a CPU does next must not depend on when that happens."""

    def __init__(self, objects: Objects, everything: int = 0) -> None:
        self.objects = objects
        self.everything = everything
        self.queues: dict[int, deque[Store]] = {}
        self.dirty: set[int] = set()
        self.put: dict[int, int] = {}  # how many ever
        self.gone: dict[int, int] = {}

    def add(self, cpu: CpuId) -> None:
        self.queues[cpu] = deque()
        self.put[cpu] = self.gone[cpu] = 0

    def mask(self, cpu: CpuId) -> int:
        return self.objects.bit(("store buffer", cpu))

    def all(self) -> int:
        return self.objects.mask(("store buffer", cpu) for cpu in self.queues)

    def store(self, execution: Execution, cpu: CpuId, store: Store) -> None:
        """Into the queue; belongs to the step that the CPU is in, because nobody else can see it."""
        if cpu not in self.queues or execution.aborting:
            store.apply()
            execution.touch(store.reads, store.writes)
            return
        self.queues[cpu].append(store)
        self.put[cpu] += 1
        self.dirty.add(cpu)
        execution.touch(0, self.mask(cpu))

    def pending(self, execution: Execution, cpu: CpuId, key: Key) -> Store | None:
        """The CPU's own newest store there, which is what it loads."""
        if cpu not in self.dirty:
            return None
        execution.touch(self.mask(cpu), 0)
        return next((store for store in reversed(self.queues[cpu]) if store.key == key), None)

    def fence(self, execution: Execution, cpu: CpuId) -> None:
        """Go on when all of this CPU's stores are visible."""
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
        """The daemon of one queue: a store a step."""
        queue, mask = self.queues[cpu], self.mask(cpu)
        label = ("store buffer", cpu, "write")

        def body() -> None:
            while True:
                execution.step(label, self.everything, mask, lambda: bool(queue), "a store")
                store = queue.popleft()
                self.gone[cpu] += 1
                execution.current.label = (VISIBLE, store.what, "write")
                execution.touch(store.reads, store.writes)
                execution.current.acts_for = store.by  # who waits for a change waits for others
                store.apply()

        return body


class BufferedReaders(Readers):
    """CPUs that read under RCU.  A grace period contains a full barrier on every CPU, after it has left the
    read section that it was in."""

    def __init__(self, stores: StoreBuffers) -> None:
        super().__init__()
        self.stores = stores
        # How many stores there were when it left, by the number of that leave.
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
    """Control over a machine whose CPUs have store buffers."""

    def __init__(self, machine: Machine, objects: Objects) -> None:
        self.stores = StoreBuffers(objects, objects.bit(("everything",)))
        self.cpu_of: Callable[[Task], CpuId] = lambda task: CpuId(-1)  # where a task is now
        self._plain: set[CpuId] = set()  # CPUs whose next store is a plain one
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
        """Is this store one, although the kernel's is not?"""
        plain = cpu in self._plain
        self._plain.discard(cpu)
        return plain

    def spawn_buffers(self, execution: Execution, names: dict[CpuId, str]) -> None:
        """One for each CPU that somebody is on."""
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
