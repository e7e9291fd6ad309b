"""Steps of a tree's code under explore's scheduler: each access that the shim tells begins a step, or adds to
one.

A task that is suspended here has the tree's C frames on its stack; other tasks run on the same thread
meanwhile.  At the end of an execution the exception Abandoned ends the operation, as every error of a
callback does.

SPTEs are told apart by level and gfn (bits_of() in shim/explored.c).  `ept`, the object that hardware walks
and the model's own calls name, is all of them.  Reference counts, lists, roles and other shared memory of the
tree's are one object of the VM.
"""

from __future__ import annotations

from typing import Any, Final

from emulator.explore.engine.scheduler import Execution
from emulator.explore.machine.control import Control
from emulator.kernel_tree.on_machine.core import Handler, Thread, Tree
from emulator.litmus.failure import LitmusFailure
from native import lib as core_lib
from native.types import FrameKind, Hfn

_SHARED: Final = "tdp_mmu_roots"


class Explored:
    """The steps of one tree on the machine of a `control`."""

    def __init__(self, tree: Tree, control: Control) -> None:
        self.tree, self.control = tree, control
        objects, code = control.objects, tree.lib
        bits = [objects.bit(("ept", number)) for number in range(code.SPTE_BITS)]
        # Consecutive bits, so that a mask of the shim's is shifted to where they are.
        self._shift = bits[0].bit_length() - 1
        objects.bits["ept",] = sum(bits)
        self.handlers: dict[int, Handler] = {
            code.CALL_STEP: self._step,
            code.CALL_MORE: self._more,
            code.CALL_SHARED: self._shared,
            code.CALL_TABLE: self._table,
            code.CALL_SET_PFN: self._set_pfn,
            code.CALL_RECOVER: self._recover,
            code.CALL_LOCK: self._lock,
            code.CALL_UNLOCK: self._unlock,
            code.CALL_NEEDBREAK: self._needbreak,
            code.CALL_RCU_LOCK: self._rcu_lock,
            code.CALL_RCU_UNLOCK: self._rcu_unlock,
            code.CALL_RCU_LATER: self._rcu_later,
            code.CALL_RCU_BARRIER: self._rcu_barrier,
            code.CALL_ALLOC: self._alloc,
            code.CALL_FREE: self._free,
            code.CALL_SPIN_LOCK: self._spin_lock,
            code.CALL_SPIN_UNLOCK: self._spin_unlock,
            code.CALL_RELAX: self._relax,
        }
        self._write, self._leaf = code.ACCESS_WRITE, code.ACCESS_LEAF

    @property
    def _execution(self) -> Execution | None:
        return self.control.execution

    # --- SPTEs ----------------------------------------------------------------------------------------------

    def _masks(self, thread: Thread, access: int, bits: int) -> tuple[int, int]:
        """Return the objects that an access to an SPTE reads and writes."""
        control, mask = self.control, bits << self._shift
        reads = control.bit("custody of table", int(thread.state.table)) | control.everything
        if not access & self._write:
            return reads | mask, 0
        return reads | (control.bit("custody") if access & self._leaf else 0), mask

    def _step(self, thread: Thread, access: int, bits: int, text: Any) -> None:
        execution = self._execution
        if execution is not None:
            write = access & self._write
            place = int(thread.state.table), int(thread.state.index)
            label = ("spte", place, "write" if write else "read")
            execution.step(label, *self._masks(thread, access, bits))

    def _more(self, thread: Thread, access: int, bits: int, text: Any) -> None:
        execution = self._execution
        if execution is not None:
            execution.touch(*self._masks(thread, access, bits))

    def _table(self, thread: Thread, table: int, b: int, text: Any) -> None:
        if self._execution is not None:
            self._execution.touch(self.control.bit("custody of table", table), 0)

    def _set_pfn(self, thread: Thread, a: int, b: int, text: Any) -> None:
        if self._execution is not None:
            self._execution.touch(self.control.bit("custody"), 0)

    def _recover(self, thread: Thread, a: int, b: int, text: Any) -> None:
        if self._execution is not None:
            bit = self.control.bit
            self._execution.touch(bit("ept") | bit("custody") | bit("mm", thread.state.vm), 0)

    # --- other memory of the tree's -------------------------------------------------------------------------

    def _shared(self, thread: Thread, place: int, write: int, text: Any) -> None:
        execution, vm = self._execution, int(thread.state.vm)
        if execution is not None:
            mask, everything = self.control.bit(_SHARED, vm), self.control.everything
            if write:
                execution.step((_SHARED, vm, "write"), everything, mask)
            else:
                execution.step((_SHARED, vm, "read"), mask | everything, 0)

    def _alloc(self, thread: Thread, kind: int, b: int, text: Any) -> int:
        cpu = thread.cpu
        return int(self.control.lib.ept_table_alloc(cpu.m, cpu.id, FrameKind(kind)))

    def _free(self, thread: Thread, table: int, b: int, text: Any) -> None:
        cpu = thread.cpu
        self.control.lib.ept_table_free(cpu.m, cpu.id, Hfn(table))

    # --- locks and RCU --------------------------------------------------------------------------------------

    def _lock(self, thread: Thread, write: int, b: int, text: Any) -> int:
        cpu, library = thread.cpu, self.control.lib
        lock = library.mmu_write_trylock if write else library.mmu_read_trylock
        return int(lock(cpu.m, cpu.id, thread.state.vm))

    def _unlock(self, thread: Thread, write: int, b: int, text: Any) -> None:
        cpu, library = thread.cpu, self.control.lib
        unlock = library.mmu_write_unlock if write else library.mmu_read_unlock
        unlock(cpu.m, cpu.id, thread.state.vm)

    def _needbreak(self, thread: Thread, a: int, b: int, text: Any) -> int:
        return int(self.control.lib.mmu_lock_needbreak(thread.cpu.m, thread.state.vm))

    def _rcu_lock(self, thread: Thread, a: int, b: int, text: Any) -> None:
        self.control.lib.rcu_read_lock(thread.cpu.m, thread.cpu.id)

    def _rcu_unlock(self, thread: Thread, a: int, b: int, text: Any) -> None:
        self.control.lib.rcu_read_unlock(thread.cpu.m, thread.cpu.id)

    def _rcu_later(self, thread: Thread, head: int, table: int, text: Any) -> int:
        cpu, control, execution = thread.cpu, self.control, self._execution
        if not table:
            raise LitmusFailure(
                "explore knows no RCU callback of the tree's but those that free shadow pages"
            )
        if execution is not None:
            execution.step(("call_rcu", table, "write"), control.everything, control.bit("callbacks"))
        control.freed.append(table)
        return int(core_lib.call_rcu(cpu.m, cpu.id, core_lib.RCU_FUNCTION, head))

    def _rcu_barrier(self, thread: Thread, a: int, b: int, text: Any) -> int:
        return int(self.control.lib.rcu_barrier(thread.cpu.m, thread.cpu.id))

    def _spin_lock(self, thread: Thread, address: int, name: int, text: Any) -> None:
        execution = self._execution
        if execution is not None:
            held = self.tree.ffi.cast("int *", address)
            label = ("spinlock", name, "write")
            mask = self.control.bit("spinlock", name)
            execution.step(label, 0, mask, lambda: not held[0], "tdp_mmu_pages_lock")

    def _spin_unlock(self, thread: Thread, a: int, name: int, text: Any) -> None:
        if self._execution is not None:
            self._execution.touch(0, self.control.bit("spinlock", name))

    def _relax(self, thread: Thread, a: int, b: int, text: Any) -> None:
        execution = self._execution
        if execution is not None:
            execution.await_change(("cpu_relax", thread.cpu.id, "read"))
