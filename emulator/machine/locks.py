"""Locks that Python code holds: spinlock_t, struct mutex, struct rw_semaphore, refcount_t, and kvm->mmu_lock.

mmu_lock is native.  The other locks guard Python objects for a few lines.  A waiter sleeps on its CPU's event
and keeps running the calls that other CPUs queue for it, so no holder can keep an IPI from being
acknowledged.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from emulator.machine.runtime import READ, WRITE, Cpu, MachineMisuse, Mode
from native import lib
from native.types import CpuId, VmId


class _Waitable:
    """One token that threads take and give back, each by a single list operation, hence atomic under the GIL.

    Waiters queue as CPU numbers; the thread that gives the token back wakes them.
    """

    __slots__ = ("_token", "_waiters", "name", "owner")

    def __init__(self, name: str) -> None:
        self.name = name
        self.owner = -1
        self._token = [None]
        self._waiters: list[CpuId] = []

    def is_held(self, cpu: Cpu) -> bool:
        """lockdep_is_held() (include/linux/lockdep.h)"""
        return self.owner == cpu.id

    def _try(self, cpu: Cpu) -> bool:
        try:
            self._token.pop()
        except IndexError:
            return False
        self.owner = cpu.id
        return True

    def _take(self, cpu: Cpu) -> None:
        cpu.point("lock", self, "write")
        while not self._try(cpu):
            # Queue first, then read the event, then try again: the holder gives the token back before it
            # looks at the queue, so one of the two sees the other.
            self._waiters.append(cpu.id)
            seq = lib.cpu_event(cpu.m, cpu.id)
            if self._try(cpu):
                return
            cpu.check(lib.cpu_wait_event(cpu.m, cpu.id, seq, 0))

    def _give(self, cpu: Cpu) -> None:
        cpu.point("unlocking", self, "write")
        self.owner = -1
        self._token.append(None)
        while self._waiters:
            try:
                waiter = self._waiters.pop()
            except IndexError:
                break
            lib.cpu_wake(cpu.m, waiter)
        cpu.point("unlock", self, "write")


class _SpinLockHeld:
    __slots__ = ("cpu", "lock")

    def __init__(self, lock: SpinLock, cpu: Cpu) -> None:
        self.lock, self.cpu = lock, cpu

    def __enter__(self) -> None:
        self.lock._take(self.cpu)
        self.cpu.spinlocks += 1

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        self.cpu.spinlocks -= 1
        self.lock._give(self.cpu)


class SpinLock(_Waitable):
    """spinlock_t for short critical sections: its holder must not wait.  Use `with lock.held(cpu):`."""

    __slots__ = ()

    def held(self, cpu: Cpu) -> _SpinLockHeld:
        return _SpinLockHeld(self, cpu)


class _MutexHeld:
    __slots__ = ("cpu", "lock", "locked")

    def __init__(self, lock: Mutex, cpu: Cpu) -> None:
        self.lock, self.cpu, self.locked = lock, cpu, False

    def __enter__(self) -> _MutexHeld:
        self.relock()
        return self

    def relock(self) -> None:
        if self.cpu.spinlocks:
            raise MachineMisuse(f"CPU {self.cpu.id}: takes {self.lock.name} while it holds a spinlock")
        self.lock._take(self.cpu)
        self.locked = True

    def unlock(self) -> None:
        self.locked = False
        self.lock._give(self.cpu)

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        if self.locked:
            self.unlock()


class Mutex(_Waitable):
    """struct mutex: may be held across waits.

    Use `with lock.held(cpu) as held:`; `held.unlock()` in the block drops it early.
    """

    __slots__ = ()

    def held(self, cpu: Cpu) -> _MutexHeld:
        return _MutexHeld(self, cpu)


class _RwSemaphoreHeld:
    __slots__ = ("cpu", "semaphore", "write")

    def __init__(self, semaphore: RwSemaphore, cpu: Cpu, write: bool) -> None:
        self.semaphore, self.cpu, self.write = semaphore, cpu, write

    def __enter__(self) -> None:
        self.semaphore._down(self.cpu, self.write)

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        self.semaphore._up(self.cpu, self.write)


class RwSemaphore:
    """struct rw_semaphore: may be held across waits.  Use `with lock.read_lock(cpu):`, likewise write_lock.

    A waiting writer keeps new readers out, so it does not wait for ever.
    """

    __slots__ = ("_owners", "_waiters", "_writers", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        # The number of readers that hold it, or -1 for a writer.  A thread takes the number out to change it.
        self._owners = [0]
        self._writers: list[CpuId] = []  # waiting writers, as CPU numbers
        self._waiters: list[CpuId] = []  # CPUs to be woken

    def read_lock(self, cpu: Cpu) -> _RwSemaphoreHeld:
        return _RwSemaphoreHeld(self, cpu, False)

    def write_lock(self, cpu: Cpu) -> _RwSemaphoreHeld:
        return _RwSemaphoreHeld(self, cpu, True)

    def free_for(self, write: bool) -> bool:
        """Return whether the current holders admit a reader or a writer."""
        return self._owners[0] == 0 if write else self._owners[0] >= 0

    def _take_owners(self) -> int:
        while True:
            try:
                return self._owners.pop()
            except IndexError:
                time.sleep(0)  # another thread is about to put the number back

    def _try(self, write: bool) -> bool:
        owners = self._take_owners()
        free = owners == 0 if write else owners >= 0 and not self._writers
        if free:
            owners = -1 if write else owners + 1
        self._owners.append(owners)
        return free

    def _down(self, cpu: Cpu, write: bool) -> None:
        if cpu.spinlocks:
            raise MachineMisuse(f"CPU {cpu.id}: takes {self.name} while it holds a spinlock")
        cpu.point("down", self, "write" if write else "read")
        if self._try(write):
            return
        if write:
            self._writers.append(cpu.id)
        try:
            self._wait(cpu, write)
        finally:
            if write:
                self._writers.remove(cpu.id)

    def _wait(self, cpu: Cpu, write: bool) -> None:
        """Wait in the order of _Waitable: queue, read the event, try, sleep."""
        while True:
            self._waiters.append(cpu.id)
            seq = lib.cpu_event(cpu.m, cpu.id)
            if self._try(write):
                return
            cpu.check(lib.cpu_wait_event(cpu.m, cpu.id, seq, 0))

    def _up(self, cpu: Cpu, write: bool) -> None:
        mode: Mode = "write" if write else "read"
        cpu.point("unlocking", self, mode)
        owners = self._take_owners()
        self._owners.append(0 if write else owners - 1)
        while self._waiters:
            try:
                waiter = self._waiters.pop()
            except IndexError:
                break
            lib.cpu_wake(cpu.m, waiter)
        cpu.point("up", self, mode)


class Refcount:
    """refcount_t."""

    __slots__ = ("_lock", "value")

    def __init__(self, value: int) -> None:
        self.value = value
        self._lock = SpinLock("refcount")

    def inc_not_zero(self, cpu: Cpu) -> bool:
        """refcount_inc_not_zero()"""
        with self._lock.held(cpu):
            if self.value == 0:
                return False
            self.value += 1
            return True

    def dec_and_test(self, cpu: Cpu) -> bool:
        """refcount_dec_and_test(): return whether this call dropped the last reference."""
        with self._lock.held(cpu):
            if self.value <= 0:
                raise AssertionError("a reference is dropped that is not held")
            self.value -= 1
            return self.value == 0


class _MmuLockHeld:
    __slots__ = ("cpu", "how", "lock")

    def __init__(self, lock: MmuLock, cpu: Cpu, how: int) -> None:
        self.lock, self.cpu, self.how = lock, cpu, how

    def __enter__(self) -> None:
        self.lock.lock(self.cpu, self.how)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.cpu.mmu_lock_held:
            self.lock.unlock(self.cpu)


class MmuLock:
    """kvm->mmu_lock of one VM.  Use `with kvm.mmu_lock.read_lock(cpu):`, likewise write_lock.

    A CPU holds at most one mmu_lock; `cpu.mmu_lock_held` is READ or WRITE then.
    """

    __slots__ = ("vm",)

    def __init__(self, vm: VmId) -> None:
        self.vm = vm

    def read_lock(self, cpu: Cpu) -> _MmuLockHeld:
        return _MmuLockHeld(self, cpu, READ)

    def write_lock(self, cpu: Cpu) -> _MmuLockHeld:
        return _MmuLockHeld(self, cpu, WRITE)

    def lock(self, cpu: Cpu, how: int) -> None:
        if cpu.spinlocks or cpu.mmu_lock_held:
            raise MachineMisuse(f"CPU {cpu.id}: takes mmu_lock while it holds a spinlock or an mmu_lock")
        cpu.point("mmu_lock", self.vm, "write" if how == WRITE else "read")
        # Free most of the time; trying is brief and keeps the GIL.
        if (lib.mmu_write_trylock if how == WRITE else lib.mmu_read_trylock)(cpu.m, cpu.id, self.vm):
            cpu.check((lib.mmu_write_lock if how == WRITE else lib.mmu_read_lock)(cpu.m, cpu.id, self.vm))
        cpu.mmu_lock_held = how

    def unlock(self, cpu: Cpu) -> None:
        how, cpu.mmu_lock_held = cpu.mmu_lock_held, 0
        (lib.mmu_write_unlock if how == WRITE else lib.mmu_read_unlock)(cpu.m, cpu.id, self.vm)
        cpu.point("mmu_lock", self.vm, "write" if how == WRITE else "read")

    def needbreak(self, cpu: Cpu) -> bool:
        """rwlock_needbreak()"""
        return bool(lib.mmu_lock_needbreak(cpu.m, self.vm))

    def cond_resched(self, cpu: Cpu, schedule: Callable[[], object] | None = None) -> None:
        """cond_resched_rwlock_{read,write}() without its check: unlock, call `schedule`, lock again."""
        how = cpu.mmu_lock_held
        self.unlock(cpu)
        if schedule is not None:
            schedule()
        self.lock(cpu, how)
