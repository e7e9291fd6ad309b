"""The native library as explored code sees it.

KVM's modules call `lib.f(...)` of their own global `lib`; while a machine is explored that is an object of
this class.  A call that touches what others touch, too, is a step with a footprint (most of them are in
emulator.explore.footprints); a call that would wait is a step with a condition, and then the native call does
not wait.  Everything else is the native function itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, Final

from emulator.explore.control import Control, RwLock
from emulator.explore.footprints import FOOTPRINTS, LOCAL, Footprint
from emulator.explore.scheduler import Execution
from emulator.runtime import RELAX_MICROSECONDS, MachineMisuse
from native import lib

_FLAGS = ("GUEST_OP_NOFLUSH", "GUEST_OP_READ_ONLY", "GUEST_OP_GLOBAL", "GUEST_OP_HUGE")
_PACKAGES = ("emulator.kvm", "emulator.litmus", "emulator.actors.task", "emulator.actors.host")
_MODULES = ("emulator.runtime", "emulator.locks")

EXIT_REASONS: Final[int] = lib.EXIT_REASONS
GUEST_OP_NAMES: Final = {
    getattr(lib, name): name.removeprefix("GUEST_OP_").replace("_", " ").lower()
    for name in dir(lib)
    if name.startswith("GUEST_OP_") and name not in _FLAGS
}
_WRITE: Final[int] = lib.GUEST_OP_WRITE
_STORES: Final = frozenset({_WRITE, lib.GUEST_OP_MAP, lib.GUEST_OP_UNMAP, lib.GUEST_OP_PROTECT})


def instrumented_modules() -> list[ModuleType]:
    """The modules whose code is explored."""
    return [
        module
        for name, module in sorted(sys.modules.items())
        if (name.startswith(_PACKAGES) or name in _MODULES) and getattr(module, "lib", None) is not None
    ]


@contextmanager
def installed(control: Control) -> Iterator[None]:
    """Explored code calls this library, and its ordering points tell `control`."""
    modules = instrumented_modules()
    originals = [module.__dict__["lib"] for module in modules]
    controlled = (control.library or ControlledLib)(control)
    control.machine.install(control.point)
    for module in modules:
        module.__dict__["lib"] = controlled
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.__dict__["lib"] = original
        control.machine.install(None)


class ControlledLib:
    """Attributes are native functions and constants, or what stands for them."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self._guest_masks: dict[tuple[int, int], tuple[int, int, int, int]] = {}
        own = {name for name in dir(type(self)) if not name.startswith("_")}
        for name in dir(lib):
            if name in own:
                continue
            value = getattr(lib, name)
            if callable(value) and name not in LOCAL:
                value = self._stepped(name, value, FOOTPRINTS.get(name))
            self.__dict__[name] = value

    def _stepped(self, name: str, native: Any, footprint: Footprint | None) -> Any:
        """`native` as a step.  What nobody has described conflicts with everything."""
        control = self.control
        everything = control.everything
        if footprint is None:

            def unknown(*args: Any) -> Any:
                execution = control.execution
                if control.audit is not None and execution is not None:
                    control.audit.undescribed(name)
                if execution is not None:
                    execution.step((name, None, "write"), 0, everything)
                return native(*args)

            return unknown
        access, step, outcome = footprint.bind(name, control), footprint.step, footprint.outcome

        def stepped(*args: Any) -> Any:
            execution = control.execution
            if execution is None:
                return native(*args)
            label, reads, writes = access(args)
            if step:
                if control.audit is not None and not execution.aborting:
                    control.audit.access(name)
                execution.step(label, reads | everything, writes)
            else:
                execution.touch(reads, writes)
            result = native(*args)
            if outcome is not None:
                execution.touch(*outcome(control, args, result))
            return result

        return stepped

    # --- mmu_lock -------------------------------------------------------------------------------------------

    def mmu_read_trylock(self, m: Any, cpu: int, vm: int) -> int:
        execution = self.control.execution
        if execution is not None:
            lock = self.control.mmu_lock(vm)
            self._wait_for_mmu_lock(execution, vm, lock, False)
            lock.readers += 1
        return int(lib.mmu_read_trylock(m, cpu, vm))

    def mmu_write_trylock(self, m: Any, cpu: int, vm: int) -> int:
        execution = self.control.execution
        if execution is not None:
            lock = self.control.mmu_lock(vm)
            self._wait_for_mmu_lock(execution, vm, lock, True)
            lock.writer = True
        return int(lib.mmu_write_trylock(m, cpu, vm))

    def _wait_for_mmu_lock(self, execution: Execution, vm: int, lock: RwLock, write: bool) -> None:
        control = self.control
        mask = control.bit("mmu_lock", vm)
        waiters = control.bit("mmu_lock waiters", vm)
        contended = lock.writer or (write and lock.readers > 0)
        if contended:
            lock.waiting += 1
            execution.touch(0, waiters)
        label = ("mmu_lock", vm, "write" if write else "read")
        if write:
            execution.step(label, 0, mask, lambda: not (lock.writer or lock.readers), "mmu_lock")
        else:
            execution.step(label, mask, 0, lambda: not lock.writer, "mmu_lock")
        if contended:
            lock.waiting -= 1
            execution.touch(0, waiters)

    def mmu_read_unlock(self, m: Any, cpu: int, vm: int) -> None:
        execution = self.control.execution
        if execution is not None:
            self.control.mmu_lock(vm).readers -= 1
            execution.touch(self.control.bit("mmu_lock", vm), 0)
        lib.mmu_read_unlock(m, cpu, vm)

    def mmu_write_unlock(self, m: Any, cpu: int, vm: int) -> None:
        execution = self.control.execution
        if execution is not None:
            self.control.mmu_lock(vm).writer = False
            execution.touch(0, self.control.bit("mmu_lock", vm))
        lib.mmu_write_unlock(m, cpu, vm)

    def mmu_lock_needbreak(self, m: Any, vm: int) -> int:
        execution = self.control.execution
        if execution is None:
            return int(lib.mmu_lock_needbreak(m, vm))
        execution.step(
            ("needbreak", vm, "read"),
            self.control.bit("mmu_lock waiters", vm) | self.control.everything,
            0,
        )
        return int(self.control.mmu_lock(vm).waiting > 0)

    # --- calls ----------------------------------------------------------------------------------------------

    def smp_call_function_many(
        self, m: Any, cpu: int, mask: Any, function: int, argument: int, wait: int
    ) -> int:
        if self.control.execution is None:
            return int(lib.smp_call_function_many(m, cpu, mask, function, argument, int(wait)))
        targets = [
            target
            for target in range(self.control.machine.pcpus)
            if target != cpu and mask[target >> 6] >> (target & 63) & 1
        ]
        self._wait_for_nodes(m, cpu, targets, "smp_call_function_many")
        later = lib.IPI_WAIT_LATER if wait else lib.IPI_NO_WAIT
        sent = lib.smp_call_function_many(m, cpu, mask, function, argument, later)
        return self._sent(m, cpu, targets, sent, bool(wait))

    def smp_call_function_single(
        self, m: Any, cpu: int, target: int, function: int, argument: int, wait: int
    ) -> int:
        execution = self.control.execution
        if execution is None or target == cpu:
            if execution is not None:
                execution.touch(0, self.control.bit("tlb", cpu))
            return int(lib.smp_call_function_single(m, cpu, target, function, argument, int(wait)))
        self._wait_for_nodes(m, cpu, [target], "smp_call_function_single")
        later = lib.IPI_WAIT_LATER if wait else lib.IPI_NO_WAIT
        sent = lib.smp_call_function_single(m, cpu, target, function, argument, later)
        return self._sent(m, cpu, [target], sent, bool(wait))

    def on_each_cpu(self, m: Any, cpu: int, function: int, argument: int, wait: int) -> int:
        execution = self.control.execution
        if execution is None:
            return int(lib.on_each_cpu(m, cpu, function, argument, int(wait)))
        targets = [target for target in range(self.control.machine.pcpus) if target != cpu]
        self._wait_for_nodes(m, cpu, targets, "on_each_cpu")
        later = lib.IPI_WAIT_LATER if wait else lib.IPI_NO_WAIT
        sent = lib.on_each_cpu(m, cpu, function, argument, later)
        if cpu < self.control.machine.pcpus:
            execution.touch(0, self.control.bit("tlb", cpu))
        return self._sent(m, cpu, targets, sent, bool(wait))

    def _wait_for_nodes(self, m: Any, cpu: int, targets: list[int], what: str) -> None:
        """csd_lock(): a node per sender and target is in use until it is acknowledged."""
        execution = self.control.execution
        assert execution is not None
        calls = self.control.objects.mask(("calls", target) for target in targets)
        busy = lib.csd_busy
        label = (what, tuple(targets), "write")
        if any(busy(m, cpu, target) for target in targets):
            execution.step(
                label,
                self.control.everything,
                calls,
                lambda: not any(busy(m, cpu, target) for target in targets),
                "an earlier call",
            )
        else:
            execution.step(label, self.control.everything, calls)

    def _sent(self, m: Any, cpu: int, targets: list[int], sent: int, wait: bool) -> int:
        """Interrupts are on their way; with `wait` until all are acknowledged."""
        execution = self.control.execution
        assert execution is not None
        if sent < 0:
            return sent
        self.control.queued.update(targets)
        if wait and targets:
            busy = lib.csd_busy
            execution.step(
                ("acknowledgement", tuple(targets), "read"),
                self.control.objects.mask(("calls", target) for target in targets),
                0,
                lambda: not any(busy(m, cpu, target) for target in targets),
                "an acknowledgement by pCPU " + ", ".join(str(target) for target in targets),
            )
        return sent

    # --- interrupts on and off ------------------------------------------------------------------------------

    def local_irq_disable(self, m: Any, cpu: int, where: Any) -> int:
        execution = self.control.execution
        if execution is not None:
            execution.touch(0, self.control.bit("irq", cpu))
        return int(lib.local_irq_disable(m, cpu, where))

    def local_irq_enable(self, m: Any, cpu: int) -> int:
        """An interrupt that has arrived meanwhile is taken at once."""
        execution = self.control.execution
        if execution is not None:
            execution.touch(0, self.control.bit("irq", cpu))
            if lib.cpu_attention(m, cpu) & lib.ATTENTION_IPI:
                execution.touch(
                    self.control.bit("custody"), self.control.bit("calls", cpu) | self.control.bit("tlb", cpu)
                )
        return int(lib.local_irq_enable(m, cpu))

    # --- guest mode and the host's pages --------------------------------------------------------------------

    def guest_set_program(self, m: Any, vcpu: int, ops: Any, n: int) -> int:
        self.control.programs[vcpu] = ops
        return int(lib.guest_set_program(m, vcpu, ops, n))

    def guest_run(self, m: Any, cpu: int, vcpu: int, budget: int, out: Any) -> int:
        """From VM entry to VM exit: one operation of the guest's program is one step, with its whole walk; no
        interrupt comes inside an instruction."""
        execution = self.control.execution
        if execution is None:
            return int(lib.guest_run(m, cpu, vcpu, budget, out))
        result = lib.guest_enter(m, cpu, vcpu, budget, out)
        if result < 0:
            return int(result)
        reason = EXIT_REASONS
        while reason == EXIT_REASONS:
            reason = self._guest_step(execution, m, cpu, vcpu)
        bit = self.control.bit
        execution.step(("mode", vcpu, "write"), 0, bit("irq", cpu) | bit("mode", vcpu))
        if reason == lib.EXIT_INTERRUPT or lib.cpu_attention(m, cpu) & lib.ATTENTION_IPI:
            execution.touch(0, bit("calls", cpu) | bit("tlb", cpu))
        return int(lib.guest_leave(m, cpu, reason))

    def _guest_step(self, execution: Execution, m: Any, cpu: int, vcpu: int) -> int:
        control = self.control
        op = control.next_op(vcpu)
        if op is None or op.kind == lib.GUEST_OP_SIGNAL:
            # Progress belongs to the operation before; the end of a program is nothing by itself.
            if op is not None:
                execution.touch(0, control.bit("progress", op.value))
            return int(lib.guest_step(m, cpu))
        if op.kind == lib.GUEST_OP_WAIT:
            self._guest_wait(execution, m, cpu, op)
            return int(lib.guest_step(m, cpu))
        vm = control.vm_of(vcpu)
        masks = self._guest_masks.get((cpu, vm))
        if masks is None:
            bit = control.bit
            memory = bit("memory", vm)
            reads = bit("irq", cpu) | bit("custody") | control.everything | memory
            masks = self._guest_masks[cpu, vm] = (reads, bit("tlb", cpu), memory, bit("ept"))
        reads, tlb, memory, ept = masks
        execution.step(
            (GUEST_OP_NAMES[op.kind], (vcpu, op.linear >> 12), "write" if op.kind == _WRITE else "read"),
            reads,
            tlb,
        )
        misses = control.misses(cpu)
        reason = int(lib.guest_step(m, cpu))
        walked = control.misses(cpu) != misses or reason == lib.EXIT_EPT_VIOLATION
        stored = op.kind in _STORES or (walked and vm in control.paging)
        execution.touch(ept if walked else 0, memory if stored else 0)
        control.judge()
        return reason

    def _guest_wait(self, execution: Execution, m: Any, cpu: int, op: Any) -> None:
        slot, value = int(op.linear), int(op.value)
        execution.step(
            ("guest waits", slot, "read"),
            self.control.bit("progress", slot) | self.control.bit("irq", cpu),
            0,
            lambda: lib.signal_get(m, slot) >= value or bool(lib.cpu_attention(m, cpu)),
            f"{value} operations of thread {slot}",
        )

    def mm_fault(self, m: Any, cpu: int, vm: int, hva: int, write: int, page: Any) -> int:
        control = self.control
        execution = control.execution
        if execution is not None:
            bit = control.bit
            writes = 0 if lib.mm_present(m, vm, hva, hva + 1) else bit("mm", vm) | bit("frames", "guest")
            execution.step(
                ("mm", (vm, hva), "read"), bit("mm", vm) | bit("custody") | control.everything, writes
            )
            if not lib.mm_present(m, vm, hva, hva + 1):
                execution.touch(0, bit("mm", vm) | bit("frames", "guest"))
        return int(lib.mm_fault(m, cpu, vm, hva, write, page))

    # --- RCU and SRCU ---------------------------------------------------------------------------------------

    def rcu_read_lock(self, m: Any, cpu: int) -> None:
        execution = self.control.execution
        if execution is not None:
            execution.step(("rcu_read_lock", cpu, "read"), self.control.bit("rcu"), 0)
            self.control.rcu.enter(cpu)
        lib.rcu_read_lock(m, cpu)

    def rcu_read_unlock(self, m: Any, cpu: int) -> None:
        execution = self.control.execution
        if execution is not None:
            execution.touch(self.control.bit("rcu"), 0)
            self.control.rcu.leave(cpu)
        lib.rcu_read_unlock(m, cpu)

    def rcu_barrier(self, m: Any, cpu: int) -> int:
        control = self.control
        execution = control.execution
        if execution is None:
            control.run_callbacks()
            return 0
        bit = control.bit("callbacks")
        execution.step(("rcu_barrier", None, "read"), bit | control.everything, 0)
        wanted = control.callbacks_run + lib.rcu_pending(m)
        execution.step(
            ("rcu_barrier", "done", "read"), bit, 0, lambda: control.callbacks_run >= wanted, "RCU callbacks"
        )
        return 0

    def synchronize_rcu(self, m: Any, cpu: int) -> int:
        control = self.control
        execution = control.execution
        if execution is None:
            return 0
        bit = control.bit("rcu")
        execution.step(("synchronize_rcu", None, "write"), control.queues, bit)
        before = control.rcu.now()
        gone = partial(control.rcu.gone, before)
        execution.step(("synchronize_rcu", "done", "write"), control.queues, bit, gone, "readers of RCU")
        return 0

    def srcu_read_lock(self, m: Any, cpu: int, vm: int) -> int:
        control = self.control
        execution = control.execution
        if execution is not None:
            execution.step(("srcu_read_lock", vm, "read"), control.bit("srcu", vm), 0)
            control.srcu_of(vm).enter(execution.current.index)
        return int(lib.srcu_read_lock(m, cpu, vm))

    def srcu_read_unlock(self, m: Any, cpu: int, vm: int, index: int) -> None:
        control = self.control
        execution = control.execution
        if execution is not None:
            execution.touch(control.bit("srcu", vm), 0)
            control.srcu_of(vm).leave(execution.current.index)
        lib.srcu_read_unlock(m, cpu, vm, index)

    def synchronize_srcu(self, m: Any, cpu: int, vm: int) -> int:
        control = self.control
        execution = control.execution
        if execution is None:
            return int(lib.synchronize_srcu(m, cpu, vm))
        bit, readers = control.bit("srcu", vm), control.srcu_of(vm)
        execution.step(("synchronize_srcu", vm, "write"), control.everything, bit)
        before = readers.now()
        execution.step(
            ("synchronize_srcu", (vm, "done"), "write"),
            0,
            bit,
            lambda: readers.gone(before),
            "readers of SRCU",
        )
        return 0

    # --- the one wait of Python code ------------------------------------------------------------------------

    def cpu_wait_event(self, m: Any, cpu: int, seq: int, microseconds: int) -> int:
        execution = self.control.execution
        if execution is None:
            if not microseconds:
                raise MachineMisuse("a wait that nobody can end: no execution runs")
            return 0
        if microseconds == RELAX_MICROSECONDS:
            # Whoever relaxes will look again.
            execution.await_change(("cpu_relax", cpu, "read"), "a change")
            return 0
        if microseconds:
            return 0  # a nap: it ends by itself, and others may go on at any time anyway
        execution.step(
            ("event", cpu, "read"),
            self.control.bit("event", cpu),
            0,
            lambda: lib.cpu_event(m, cpu) != seq,
            "an event",
        )
        return 0

    def cpu_wake(self, m: Any, cpu: int) -> None:
        execution = self.control.execution
        if execution is not None:
            execution.touch(0, self.control.bit("event", cpu))
        lib.cpu_wake(m, cpu)

    # --- pCPUs are there all the time -----------------------------------------------------------------------

    def cpu_take(self, m: Any, cpu: int) -> int:
        return 0 if self.control.execution is not None else int(lib.cpu_take(m, cpu))

    def cpu_idle(self, m: Any, cpu: int) -> int:
        return 0 if self.control.execution is not None else int(lib.cpu_idle(m, cpu))
