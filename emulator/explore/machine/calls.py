"""Calls on other CPUs, interrupts and wake-ups for explored code; they arrive when scheduled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.explore.machine.control import Control
from emulator.machine.runtime import RELAX_MICROSECONDS, MachineMisuse
from native import lib
from native.types import CpuId, FlushReason, Gfn, Hfn, IpiFunction, IpiWait, VmId

if TYPE_CHECKING:
    from native._native import U64, Chars, Lib, MachinePtr
else:
    Lib = object  # inherited for mypy alone, which compares each stand-in with the native function


class Calls(Lib):
    """Native functions that send IPIs and wake-ups, and that wait for them."""

    control: Control

    # --- calls ----------------------------------------------------------------------------------------------

    def smp_call_function_many(
        self, m: MachinePtr, cpu: CpuId, mask: U64, function: IpiFunction, argument: int, wait: IpiWait
    ) -> int:
        if self.control.execution is None:
            return int(lib.smp_call_function_many(m, cpu, mask, function, argument, wait))
        targets = [
            target
            for target in map(CpuId, range(self.control.machine.pcpus))
            if target != cpu and mask[target >> 6] >> (target & 63) & 1
        ]
        self._wait_for_nodes(m, cpu, targets, "smp_call_function_many")
        later = lib.IPI_WAIT_LATER if wait else lib.IPI_NO_WAIT
        sent = lib.smp_call_function_many(m, cpu, mask, function, argument, later)
        return self._sent(m, cpu, targets, sent, bool(wait))

    def smp_call_function_single(
        self, m: MachinePtr, cpu: CpuId, target: CpuId, function: IpiFunction, argument: int, wait: IpiWait
    ) -> int:
        execution = self.control.execution
        if execution is None or target == cpu:
            if execution is not None:
                execution.touch(0, self.control.bit("tlb", cpu))
            return int(lib.smp_call_function_single(m, cpu, target, function, argument, wait))
        self._wait_for_nodes(m, cpu, [target], "smp_call_function_single")
        later = lib.IPI_WAIT_LATER if wait else lib.IPI_NO_WAIT
        sent = lib.smp_call_function_single(m, cpu, target, function, argument, later)
        return self._sent(m, cpu, [target], sent, bool(wait))

    def on_each_cpu(
        self, m: MachinePtr, cpu: CpuId, function: IpiFunction, argument: int, wait: IpiWait
    ) -> int:
        execution = self.control.execution
        if execution is None:
            return int(lib.on_each_cpu(m, cpu, function, argument, wait))
        targets = [target for target in map(CpuId, range(self.control.machine.pcpus)) if target != cpu]
        self._wait_for_nodes(m, cpu, targets, "on_each_cpu")
        later = lib.IPI_WAIT_LATER if wait else lib.IPI_NO_WAIT
        sent = lib.on_each_cpu(m, cpu, function, argument, later)
        if cpu < self.control.machine.pcpus:
            execution.touch(0, self.control.bit("tlb", cpu))
        return self._sent(m, cpu, targets, sent, bool(wait))

    def hv_flush_guest_mapping(
        self, m: MachinePtr, cpu: CpuId, vm: VmId, root: Hfn, gfn: Gfn, pages: int, reason: FlushReason
    ) -> int:
        """Flush the pCPUs one after the other, each in a step, beneath the guests that run there."""
        execution = self.control.execution
        if execution is None:
            return int(lib.hv_flush_guest_mapping(m, cpu, vm, root, gfn, pages, reason))
        lib.hv_hypercall(m, cpu, vm, root, gfn, pages)
        for target in map(CpuId, range(self.control.machine.pcpus)):
            execution.step(("hypercall", target, "write"), 0, self.control.bit("tlb", target))
            lib.hv_flush_pcpu(m, target, vm, root, gfn, pages, reason)
        return 0

    def _wait_for_nodes(self, m: MachinePtr, cpu: CpuId, targets: list[CpuId], what: str) -> None:
        """Wait for csd_lock(): the node of a sender and target is in use until the target acknowledges."""
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

    def _sent(self, m: MachinePtr, cpu: CpuId, targets: list[CpuId], sent: int, wait: bool) -> int:
        """Record the interrupts that were sent, and with `wait` block until all targets have acknowledged."""
        execution = self.control.execution
        assert execution is not None
        if sent < 0:
            return sent
        execution.current.heard.append(sent)  # the caller gets it behind the wait
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

    def local_irq_disable(self, m: MachinePtr, cpu: CpuId, where: bytes | Chars) -> int:
        execution = self.control.execution
        if execution is not None:
            execution.touch(0, self.control.bit("irq", cpu))
        return int(lib.local_irq_disable(m, cpu, where))

    def local_irq_enable(self, m: MachinePtr, cpu: CpuId) -> int:
        """Enable interrupts: one that has arrived meanwhile is taken at once."""
        execution = self.control.execution
        if execution is not None:
            execution.touch(0, self.control.bit("irq", cpu))
            if lib.cpu_attention(m, cpu) & lib.ATTENTION_IPI:
                execution.touch(0, self.control.bit("calls", cpu) | self.control.bit("tlb", cpu))
        return int(lib.local_irq_enable(m, cpu))

    # --- waits of Python code -------------------------------------------------------------------------------

    def cpu_wait_event(self, m: MachinePtr, cpu: CpuId, seq: int, microseconds: int) -> int:
        execution = self.control.execution
        if execution is None:
            if not microseconds:
                raise MachineMisuse("a wait that no execution can end: no execution runs")
            return 0
        if microseconds == RELAX_MICROSECONDS:
            # The caller of cpu_relax() will test its condition again.
            execution.await_change(("cpu_relax", cpu, "read"), rests=self.control.rests())
            return 0
        if microseconds:
            return 0  # a timed wait ends by itself, and other tasks may be scheduled at any time anyway
        execution.step(
            ("event", cpu, "read"),
            self.control.bit("event", cpu),
            0,
            lambda: lib.cpu_event(m, cpu) != seq,
            self.control.machine.cpus[cpu].waits_for or "an event",
        )
        return 0

    def cpu_wake(self, m: MachinePtr, cpu: CpuId) -> None:
        execution = self.control.execution
        if execution is not None:
            execution.touch(0, self.control.bit("event", cpu))
        lib.cpu_wake(m, cpu)

    # --- pCPUs are taken during the whole execution ---------------------------------------------------------

    def cpu_take(self, m: MachinePtr, cpu: CpuId) -> int:
        return 0 if self.control.execution is not None else int(lib.cpu_take(m, cpu))

    def cpu_idle(self, m: MachinePtr, cpu: CpuId) -> int:
        return 0 if self.control.execution is not None else int(lib.cpu_idle(m, cpu))
