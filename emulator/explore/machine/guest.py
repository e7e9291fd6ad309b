"""Guest mode for explored code, operation by operation, and the host's pages behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emulator.explore.engine.objects import bits
from emulator.explore.engine.scheduler import Execution
from emulator.explore.machine.control import Control
from native import lib
from native.types import CpuId, Hva, SignalSlot, VcpuId, VmId

if TYPE_CHECKING:
    from native._native import Array, GuestOp, Lib, MachinePtr, MmPagePtr, VcpuExitPtr
else:
    Lib = object  # inherited for mypy alone, which compares each stand-in with the native function

_FLAGS = (
    "GUEST_OP_NOFLUSH",
    "GUEST_OP_READ_ONLY",
    "GUEST_OP_GLOBAL",
    "GUEST_OP_HUGE",
    "GUEST_OP_DIRTY",
    "GUEST_OP_APIC",
    "GUEST_OP_FAULTS",
    "GUEST_OP_SUPERVISOR",
)

EXIT_REASONS: Final[int] = lib.EXIT_REASONS
# Exits for a walk that found no right.
_FAULTS: Final = frozenset({lib.EXIT_EPT_VIOLATION, lib.EXIT_EXCEPTION})
GUEST_OP_NAMES: Final = {
    getattr(lib, name): name.removeprefix("GUEST_OP_").replace("_", " ").lower()
    for name in dir(lib)
    if name.startswith("GUEST_OP_") and name not in _FLAGS
}
_WRITE: Final[int] = lib.GUEST_OP_WRITE
_STORES: Final = frozenset(
    {
        _WRITE,
        lib.GUEST_OP_MAP,
        lib.GUEST_OP_UNMAP,
        lib.GUEST_OP_PROTECT,
        lib.GUEST_OP_STORE,
        lib.GUEST_OP_EPT12_MAP,
        lib.GUEST_OP_EPT12_UNMAP,
        lib.GUEST_OP_EPT12_PROTECT,
        lib.GUEST_OP_EPT12_CLEAN,
    }
)


class GuestMode(Lib):
    """Native functions of guest mode: each operation of the guest is a step."""

    control: Control

    def __init__(self) -> None:
        # The shared objects of a guest's step, by CPU and VM.
        self._guest_masks: dict[tuple[int, int], tuple[int, int, int, int, int]] = {}

    def guest_set_program(self, m: MachinePtr, vcpu: VcpuId, ops: Array[GuestOp], n: int) -> int:
        self.control.programs[vcpu] = ops
        return int(lib.guest_set_program(m, vcpu, ops, n))

    def guest_run(self, m: MachinePtr, cpu: CpuId, vcpu: VcpuId, budget: int, out: VcpuExitPtr) -> int:
        """Run a guest from VM entry to VM exit.  One operation of its program is one step, with its whole
        walk, because no interrupt comes inside an instruction."""
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

    def _guest_step(self, execution: Execution, m: MachinePtr, cpu: CpuId, vcpu: VcpuId) -> int:
        control = self.control
        op = control.next_op(vcpu)
        if op is None or op.kind == lib.GUEST_OP_SIGNAL:
            # A signal belongs to the step of the operation before it; the end of a program is no step.
            if op is not None:
                execution.touch(0, control.bit("progress", op.value))
            return self._heard_step(execution, m, cpu)
        if op.kind == lib.GUEST_OP_WAIT:
            self._guest_wait(execution, m, cpu, op)
            return self._heard_step(execution, m, cpu)
        vm = control.vm_of(vcpu)
        masks = self._guest_masks.get((cpu, vm))
        if masks is None:
            bit = control.bit
            memory = bit("memory", vm)
            reads = bit("irq", cpu) | control.everything
            used = bit("custody") | memory
            masks = self._guest_masks[cpu, vm] = (reads, used, bit("tlb", cpu), memory, bit("ept"))
        # `used`: objects that an access reads if it gets its translation.  An EPT violation depends on SPTEs
        # alone, unless a cached translation, or the ghost of one that was flushed, is judged on the way.
        reads, used, tlb, memory, ept = masks
        # True if L1 handles an exit of its nested guest in this step, and writes to its EPT.
        handles = bool(lib.vcpu_handles_violation(m, vcpu))
        label = ("handle violation", vcpu, "write") if handles else self._label(vcpu, op)
        execution.current.rests = True
        execution.step(label, reads, tlb)
        before, cached = control.walks(cpu), control.caches_tables(cpu)
        reason = control.exit_reason = self._heard_step(execution, m, cpu)
        now = control.walks(cpu)
        walked = now.misses != before.misses or reason in _FAULTS
        stored = handles or op.kind in _STORES or (walked and vm in control.paging)
        if walked:
            # A walk from the root meets linked tables only; a cached pointer may lead to a free table.
            root = control.custody_of_root(cpu)
            execution.touch(ept | root | (control.bit("custody of tables") if cached else 0), 0)
        elif now.judged != before.judged:
            # The ledger of rights judged the use: an SPTE that grants the right again makes it legal.
            execution.touch(ept, 0)
        if now.updates != before.updates:
            execution.touch(0, ept)
        if vm in control.paging or reason != lib.EXIT_EPT_VIOLATION or now.judged_since(before):
            execution.touch(used, 0)
        if stored:
            execution.touch(0, memory)
            if reason not in _FAULTS or vm in control.paging:
                execution.touch(0, control.contents(vm, op.linear >> 12))
        self._performed(execution, cpu, vm, op, walked)
        control.judge()
        return reason

    @staticmethod
    def _heard_step(execution: Execution, m: MachinePtr, cpu: CpuId) -> int:
        """Do an operation; record its result, which guest_run() keeps until the exit."""
        reason = int(lib.guest_step(m, cpu))
        execution.current.heard.append(reason)
        return reason

    @staticmethod
    def _label(vcpu: VcpuId, op: GuestOp) -> tuple[str, tuple[int, int], str]:
        return GUEST_OP_NAMES[op.kind], (vcpu, op.linear >> 12), "write" if op.kind == _WRITE else "read"

    def _performed(self, execution: Execution, cpu: CpuId, vm: VmId, op: GuestOp, walked: bool) -> None:
        """Note an operation: a hook for subclasses.  `walked`: the TLB did not hold the translation."""

    def _guest_wait(self, execution: Execution, m: MachinePtr, cpu: CpuId, op: GuestOp) -> None:
        slot, value = int(op.linear), int(op.value)
        execution.current.rests = True
        execution.step(
            ("guest waits", slot, "read"),
            self.control.bit("progress", slot) | self.control.bit("irq", cpu),
            0,
            lambda: lib.signal_get(m, SignalSlot(slot)) >= value or bool(lib.cpu_attention(m, cpu)),
            f"{value} operations of thread {slot}",
        )

    def mm_image_copy(self, m: MachinePtr, vm: VmId, base: Hva, mask: int) -> int:
        """Copy pages in one step, which conflicts with stores to them; with paging a store may go to any
        page.  It does not conflict with the host's migrations, which move contents and do not change them."""
        control = self.control
        if control.execution is not None:
            pages = [base + offset for offset in bits(mask)]
            reads = control.objects.mask(("contents", vm, page) for page in pages)
            if vm in control.paging:
                reads = control.bit("contents", vm)
            label = ("copy", tuple(pages), "read")
            control.execution.step(label, reads | control.everything, 0)
        return int(lib.mm_image_copy(m, vm, base, mask))

    def mm_image_copy_all(self, m: MachinePtr, vm: VmId) -> int:
        control = self.control
        if control.execution is not None:
            reads = control.bit("contents", vm) | control.everything
            control.execution.step(("copy", "all pages", "read"), reads, 0)
        return int(lib.mm_image_copy_all(m, vm))

    def mm_fault(self, m: MachinePtr, cpu: CpuId, vm: VmId, hva: Hva, write: bool, page: MmPagePtr) -> int:
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
