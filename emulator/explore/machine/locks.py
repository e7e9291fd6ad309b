"""mmu_lock, RCU and SRCU for explored code: waits are conditions that the scheduler tests."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from emulator.explore.engine.scheduler import Execution
from emulator.explore.machine.control import Control, RwLock
from native import lib
from native.types import CpuId, VmId

if TYPE_CHECKING:
    from native._native import Lib, MachinePtr
else:
    Lib = object  # inherited for mypy alone, which compares each stand-in with the native function


class Locks(Lib):
    """Native functions that may have to wait for another holder or reader, or that end such a wait."""

    control: Control

    # --- mmu_lock -------------------------------------------------------------------------------------------

    def mmu_read_trylock(self, m: MachinePtr, cpu: CpuId, vm: VmId) -> int:
        execution = self.control.execution
        if execution is not None:
            lock = self.control.mmu_lock(vm)
            self._wait_for_mmu_lock(execution, vm, lock, False)
            lock.readers += 1
            lock.holders.append(cpu)
        return int(lib.mmu_read_trylock(m, cpu, vm))

    def mmu_write_trylock(self, m: MachinePtr, cpu: CpuId, vm: VmId) -> int:
        execution = self.control.execution
        if execution is not None:
            lock = self.control.mmu_lock(vm)
            self._wait_for_mmu_lock(execution, vm, lock, True)
            lock.writer = True
            lock.holders.append(cpu)
        return int(lib.mmu_write_trylock(m, cpu, vm))

    def _wait_for_mmu_lock(self, execution: Execution, vm: VmId, lock: RwLock, write: bool) -> None:
        control = self.control
        mask = control.bit("mmu_lock", vm)
        waiters = control.bit("mmu_lock waiters", vm)
        # The test of the lock is an access: a reader's lock or unlock changes its result for a writer only.
        contended = lock.writer or (write and lock.readers > 0)
        execution.touch(0 if write else mask, mask if write else 0)
        if contended:
            lock.waiting.add(execution.current.index)
            execution.touch(0, waiters)
        label = ("mmu_lock", vm, "write" if write else "read")
        execution.current.holders = lambda: tuple(dict.fromkeys(lock.holders))
        if write:
            execution.step(label, 0, mask, lambda: not (lock.writer or lock.readers), "mmu_lock")
        else:
            execution.step(label, mask, 0, lambda: not lock.writer, "mmu_lock")
        execution.current.holders = tuple
        if contended:
            lock.waiting.discard(execution.current.index)
            execution.touch(0, waiters)

    def mmu_read_unlock(self, m: MachinePtr, cpu: CpuId, vm: VmId) -> None:
        execution = self.control.execution
        if execution is not None:
            lock = self.control.mmu_lock(vm)
            lock.readers -= 1
            _drop(lock, cpu)
            execution.touch(self.control.bit("mmu_lock", vm), 0)
        lib.mmu_read_unlock(m, cpu, vm)

    def mmu_write_unlock(self, m: MachinePtr, cpu: CpuId, vm: VmId) -> None:
        execution = self.control.execution
        if execution is not None:
            lock = self.control.mmu_lock(vm)
            lock.writer = False
            _drop(lock, cpu)
            execution.touch(0, self.control.bit("mmu_lock", vm))
        lib.mmu_write_unlock(m, cpu, vm)

    def mmu_lock_needbreak(self, m: MachinePtr, vm: VmId) -> int:
        execution = self.control.execution
        if execution is None:
            return int(lib.mmu_lock_needbreak(m, vm))
        execution.step(
            ("needbreak", vm, "read"),
            self.control.bit("mmu_lock waiters", vm) | self.control.everything,
            0,
        )
        return int(bool(self.control.mmu_lock(vm).waiting))

    # --- RCU and SRCU ---------------------------------------------------------------------------------------

    def rcu_read_lock(self, m: MachinePtr, cpu: CpuId) -> None:
        execution = self.control.execution
        if execution is not None:
            execution.step(("rcu_read_lock", cpu, "read"), self.control.bit("rcu"), 0)
            self.control.rcu.enter(cpu)
        lib.rcu_read_lock(m, cpu)

    def rcu_read_unlock(self, m: MachinePtr, cpu: CpuId) -> None:
        execution = self.control.execution
        if execution is not None:
            execution.touch(self.control.bit("rcu left", cpu), 0)
            self.control.rcu.leave(cpu)
        lib.rcu_read_unlock(m, cpu)

    def rcu_barrier(self, m: MachinePtr, cpu: CpuId) -> int:
        control = self.control
        execution = control.execution
        if execution is None:
            control.run_callbacks()
            return 0
        # `wanted` counts callbacks that ran and that are pending, so only a call_rcu() changes it.
        execution.step(("rcu_barrier", None, "read"), control.bit("callbacks") | control.everything, 0)
        wanted = control.callbacks_run + lib.rcu_pending(m)
        execution.step(
            ("rcu_barrier", "done", "read"),
            control.bit("callbacks done", wanted - 1),
            0,
            lambda: control.callbacks_run >= wanted,
            "RCU callbacks",
        )
        return 0

    def synchronize_rcu(self, m: MachinePtr, cpu: CpuId) -> int:
        control = self.control
        execution = control.execution
        if execution is None:
            return 0
        execution.step(("synchronize_rcu", None, "write"), control.queues, control.bit("rcu"))
        before = control.rcu.now()
        gone, left = partial(control.rcu.gone, before), control.left("rcu left", before)
        control.holdouts[execution.current.index] = partial(control.rcu.inside, before)
        execution.step(("synchronize_rcu", "done", "write"), control.queues, left, gone, "readers of RCU")
        del control.holdouts[execution.current.index]
        return 0

    def srcu_read_lock(self, m: MachinePtr, cpu: CpuId, vm: VmId) -> int:
        control = self.control
        execution = control.execution
        if execution is not None:
            execution.step(("srcu_read_lock", vm, "read"), control.bit("srcu", vm), 0)
            control.srcu_of(vm).enter(execution.current.index)
        return int(lib.srcu_read_lock(m, cpu, vm))

    def srcu_read_unlock(self, m: MachinePtr, cpu: CpuId, vm: VmId, index: int) -> None:
        control = self.control
        execution = control.execution
        if execution is not None:
            who = execution.current.index
            execution.touch(control.bit("srcu left", vm, who), 0)
            control.srcu_of(vm).leave(who)
        lib.srcu_read_unlock(m, cpu, vm, index)

    def synchronize_srcu(self, m: MachinePtr, cpu: CpuId, vm: VmId) -> int:
        control = self.control
        execution = control.execution
        if execution is None:
            return int(lib.synchronize_srcu(m, cpu, vm))
        readers = control.srcu_of(vm)
        execution.step(("synchronize_srcu", vm, "write"), control.everything, control.bit("srcu", vm))
        before = readers.now()
        control.holdouts[execution.current.index] = partial(readers.inside, before)
        execution.step(
            ("synchronize_srcu", (vm, "done"), "write"),
            0,
            control.left("srcu left", before, vm),
            lambda: readers.gone(before),
            "readers of SRCU",
        )
        del control.holdouts[execution.current.index]
        return 0


def _drop(lock: RwLock, cpu: CpuId) -> None:
    if cpu in lock.holders:
        lock.holders.remove(cpu)
