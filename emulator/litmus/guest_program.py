"""Stretches of a litmus test's guest operations as guest programs (native/guest/program.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from emulator.kvm.reset import power_on
from emulator.kvm.structs import Vcpu, tdp_enabled
from emulator.litmus.nested_ops import NESTED_GUESTS, Vmptrld
from emulator.litmus.ops import GuestOp, Instruction, Op
from native import ffi, lib

if TYPE_CHECKING:
    from emulator.litmus.thread import LitmusThread
    from emulator.machine.runtime import Cpu
    from native._native import Array
    from native._native import GuestOp as CoreOp

# Pages for each vCPU's page tables, at the end of guest-physical memory (with paging).
TABLE_PAGES = 64

_FLAGS = {
    "noflush": lib.GUEST_OP_NOFLUSH,
    "ro": lib.GUEST_OP_READ_ONLY,
    "global": lib.GUEST_OP_GLOBAL,
    "huge": lib.GUEST_OP_HUGE,
    "table": lib.GUEST_OP_HUGE,
    "dirty": lib.GUEST_OP_DIRTY,
    "apic": lib.GUEST_OP_APIC,
    "fault": lib.GUEST_OP_FAULTS,
    "supervisor": lib.GUEST_OP_SUPERVISOR,
    "type0": 0,
    "type1": 1,
    "type2": 2,
    "type3": 3,
    "vmxon": lib.GUEST_INSN_VMXON,
    "vmxoff": lib.GUEST_INSN_VMXOFF,
    "vmptrld": lib.GUEST_INSN_VMPTRLD,
    "vmclear": lib.GUEST_INSN_VMCLEAR,
    "vmwrite": lib.GUEST_INSN_VMWRITE,
    "vmlaunch": lib.GUEST_INSN_VMLAUNCH,
    "vmcall": lib.GUEST_INSN_VMCALL,
    "invvpid": lib.GUEST_INSN_INVVPID,
    "invept": lib.GUEST_INSN_INVEPT,
    "vmfunc": lib.GUEST_INSN_VMFUNC,
    "vmwrite-eptp": lib.GUEST_INSN_VMWRITE_EPTP,
    # The instruction has the low byte.
    "vmcs12-apic": lib.VMCS12_APIC_PAGE << 8,
    "controls": lib.VMENTRY_CONTROLS << 8,
    "guest-state": lib.VMENTRY_GUEST_STATE << 8,
    "msr-load": lib.VMENTRY_MSR_LOAD << 8,
    "halted": lib.VMENTRY_HALTED << 8,
    "vmx-type0": 0 << 8,
    "vmx-type1": 1 << 8,
    "vmx-type2": 2 << 8,
    "vmx-type3": 3 << 8,
    **{f"ept12-{number}": number << 8 for number in range(1, lib.EPT12S + 1)},
}


# The last signal is no thread's.
_NOTHING = Instruction("SIGNAL", 0, lib.MACHINE_SIGNALS - 1)


class GuestProgram:
    """The operations of a vCPU's guest, compiled once and loaded into each new vCPU."""

    def __init__(self, thread: LitmusThread) -> None:
        self._thread = thread
        self._stretches: dict[tuple[tuple[Op, ...], bool], Array[CoreOp]] = {}
        self._length = 0
        self._pages, self._processes = self._what_it_maps()
        self._nested = self._nested_guests()
        # The core keeps the pointers.
        self._page_array = ffi.new("uint64_t[]", self._pages or [0])
        self._records = ffi.new("uint64_t[]", 1)
        self._config = ffi.new("struct guest_config *")

    def _ops(self) -> list[Op]:
        """Return all operations of the thread, in `init` and `final`, too."""
        harness, name = self._thread.harness, self._thread.name
        sequences = (*harness.test.parsed_init, *harness.test.parsed_final)
        return [*self._thread.section.parsed, *(op for who, op in sequences if who == name)]

    def _nested_guests(self) -> list[int]:
        """Return the nested guests, by number, of which the guest loads the VMCS12."""
        return sorted({op.number("vmcs12") for op in self._ops() if op.verb == Vmptrld.verb})

    def _what_it_maps(self) -> tuple[list[int], int]:
        """Return the linear pages that the guest's processes map, and the number of processes."""
        instructions = [ins for op in self._ops() if isinstance(op, GuestOp) for ins in op.instructions()]
        processes = max((ins.value + 1 for ins in instructions if ins.kind == "MOV_CR3"), default=1)
        return sorted({ins.linear >> 12 for ins in instructions}), processes

    def attach(self, cpu: Cpu, vcpu: Vcpu) -> None:
        """Configure the guest of a new vCPU, and its nested guests."""
        section, number = self._thread.vm, self._thread.section.vcpu
        assert number is not None
        self._configure(cpu, vcpu, number)
        for nested in self._nested:
            cpu.check(lib.guest_create_nested(cpu.m, vcpu.id, nested))
            lib.vcpu_set_guest_mode(cpu.m, vcpu.id, nested)
            self._configure(cpu, vcpu, section.vcpus + number * NESTED_GUESTS + nested - 1)
            if section.paging and not tdp_enabled(vcpu.kvm):
                lib.guest_power_on(cpu.m, vcpu.id)
            lib.vcpu_set_guest_mode(cpu.m, vcpu.id, 0)
        power_on(cpu, vcpu, paging=section.paging, pcid=section.pcid)

    def _configure(self, cpu: Cpu, vcpu: Vcpu, place: int) -> None:
        """Configure the chosen guest of the vCPU.  place: that of its page tables, from the end of memory."""
        section, config = self._thread.vm, self._config
        config.paging, config.pcid, config.seed = section.paging, section.pcid, 1
        config.end_gfn = section.pages - place * TABLE_PAGES
        config.first_gfn = config.end_gfn - TABLE_PAGES
        cpu.check(lib.guest_configure(cpu.m, vcpu.id, config))
        if section.paging:
            for _ in range(self._processes):
                rc = lib.guest_add_process(
                    cpu.m, vcpu.id, self._records, 1, self._page_array, len(self._pages)
                )
                cpu.check(rc)

    def load(self, ops: tuple[Op, ...], report: bool) -> None:
        """Load the operations that the guest executes next."""
        compiled = self.compiled(ops, report)
        cpu, vcpu = self._thread.cpu, self._thread.vcpu
        self._length = len(compiled)
        cpu.check(lib.guest_set_program(cpu.m, vcpu.id, compiled, self._length))

    def compiled(self, ops: tuple[Op, ...], report: bool) -> Array[CoreOp]:
        compiled = self._stretches.get((ops, report))
        if compiled is None:
            compiled = self._stretches[ops, report] = self._compile(ops, report)
        return compiled

    def position(self) -> int:
        """Return the number of instructions that the guest has executed."""
        position: int = lib.guest_program_position(self._thread.cpu.m, self._thread.vcpu.id)
        return position

    def done(self) -> bool:
        return self.position() == self._length

    def operation(self, ops: Sequence[Op]) -> Op:
        """Return the guest's current operation, of those that were loaded without `report`."""
        by_instruction = [op for op in ops for _ in self._instructions(op)]
        return by_instruction[self.position()]

    def _compile(self, ops: Sequence[Op], report: bool) -> Array[CoreOp]:
        """Compile operations; with `report`, a signal after each tells this thread's progress."""
        found: list[dict[str, int]] = []
        for op in ops:
            found.extend(_encode(ins) for ins in self._instructions(op))
            if report:
                found.append(_encode(Instruction("SIGNAL", 0, self._thread.number)))
        if not report and isinstance(ops[-1], GuestOp) and ops[-1].exits:
            # Enter the guest once more, so that no thread is left where KVM is preemptible and holds SRCU.
            found.append(_encode(_NOTHING))
        return ffi.new("struct guest_op[]", found)

    def _instructions(self, op: Op) -> list[Instruction]:
        if isinstance(op, GuestOp):
            return op.instructions()
        waits = op.waits_for()
        assert waits is not None
        thread, n = waits
        return [Instruction("WAIT", self._thread.harness.threads[thread].number, n)]


def _encode(instruction: Instruction) -> dict[str, int]:
    return {
        "kind": getattr(lib, f"GUEST_OP_{instruction.kind}"),
        "flags": sum(_FLAGS[flag] for flag in instruction.flags),
        "linear": instruction.linear,
        "value": instruction.value,
    }
