"""One thread of a litmus test: its operations in stretches, and the pCPU that it is on.

Any OS thread may run it; emulator.litmus.harness has the test's machine and VMs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emulator.actors.task import VcpuTask
from emulator.errors import BadInput, shown
from emulator.host.memory import UserMemory
from emulator.kvm.kvm_host import PREEMPTIBLE, ExitToUser
from emulator.kvm.structs import Kvm, Vcpu
from emulator.litmus.failure import LitmusFailure
from emulator.litmus.guest_program import GuestProgram
from emulator.litmus.migration import Migration
from emulator.litmus.model import ThreadSection, VmSection
from emulator.litmus.ops import GuestOp, Op, Wait
from emulator.machine.locks import Mutex
from emulator.machine.runtime import Cpu, cpu_relax
from native import lib

if TYPE_CHECKING:
    from emulator.litmus.harness import Harness

# Turns without an instruction that a guest is given while no other thread runs.
_TURNS = 200


@dataclass(frozen=True, slots=True)
class Stretch:
    """Operations that a thread executes at one go: a stretch of guest mode, or a single other operation."""

    ops: tuple[Op, ...]
    first: int

    @property
    def in_guest(self) -> bool:
        return isinstance(self.ops[0], GuestOp | Wait)


def stretches(ops: Iterable[Op], is_vcpu: bool) -> tuple[Stretch, ...]:
    """Return the operations in stretches: a vCPU's consecutive guest operations and waits are one."""
    found: list[Stretch] = []
    for i, op in enumerate(ops):
        in_guest = is_vcpu and isinstance(op, GuestOp | Wait)
        if in_guest and found and found[-1].in_guest:
            found[-1] = Stretch((*found[-1].ops, op), found[-1].first)
        else:
            found.append(Stretch((op,), i))
    return tuple(found)


class LitmusThread:
    """One thread of the test; the `Context` of its operations.

    A vCPU's thread is on one pCPU at a time, and owns that pCPU while it is there.  A pCPU without an owner
    is idle, and the sender of a call executes it there itself.  Any OS thread may run a LitmusThread: one OS
    thread runs all of init and final.
    """

    def __init__(self, harness: Harness, number: int, name: str, section: ThreadSection) -> None:
        self.harness = harness
        self.number = number
        self.name = name
        self.section = section
        self.home = harness.machine.cpus[harness.machine.pcpus + 2 + number]
        self.stretches = stretches(section.parsed, section.is_vcpu)
        self.pcpu = section.pcpu
        self.on: Cpu | None = None
        self.preempt_to = -1
        self.preempt_after = 0
        self.task: VcpuTask | None = None
        self.program = GuestProgram(self) if section.is_vcpu else None

    # --- Context --------------------------------------------------------------------------------------------

    @property
    def cpu(self) -> Cpu:
        return self.home if self.on is None else self.on

    @property
    def kvm(self) -> Kvm:
        return self.harness.kvms[self.section.vm]

    @property
    def vm(self) -> VmSection:
        return self.harness.test.vm[self.section.vm]

    @property
    def memory(self) -> UserMemory:
        return self.harness.memories[self.section.vm]

    @property
    def migration(self) -> Migration:
        return self.harness.migrations[self.section.vm]

    @property
    def vcpu(self) -> Vcpu:
        assert self.task is not None
        return self.task.vcpu

    def migrate(self, pcpu: int) -> None:
        if pcpu != self.pcpu:
            self.leave_pcpu()
            self.pcpu = pcpu
            self.enter_pcpu()

    def preempt(self, pcpu: int, nth: int) -> None:
        self.preempt_to, self.preempt_after = pcpu, nth

    def wait_for(self, thread: str, n: int) -> None:
        self.leave_pcpu()
        self.harness.wait_progress(self.home, self.harness.threads[thread].number, n)
        self.enter_pcpu()

    # --- the pCPU -------------------------------------------------------------------------------------------

    def enter_pcpu(self) -> None:
        if not self.section.is_vcpu or self.on is not None:
            return
        assert self.task is not None
        self.harness.pcpu_locks[self.pcpu].take(self.home)
        self.on = self.harness.machine.cpus[self.pcpu]
        self.harness.entered(self.on, self)
        self.home.check(lib.cpu_take(self.on.m, self.on.id))
        self.task.switch_in(self.on)

    def leave_pcpu(self) -> None:
        if self.on is None:
            return
        assert self.task is not None
        self.task.switch_out(self.on)
        lib.cpu_idle(self.on.m, self.on.id)
        self.on = None
        self.harness.pcpu_locks[self.pcpu].give(self.home)

    # --- running --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Execute all operations, in order."""
        self.enter_pcpu()
        for stretch in self.stretches:
            self.do(stretch.ops, report=True)
        self.leave_pcpu()

    def do(self, ops: tuple[Op, ...], report: bool) -> None:
        """Execute one stretch; `report` signals the progress to threads that wait for it."""
        op = ops[0]
        if self.section.is_vcpu and isinstance(op, GuestOp | Wait):
            self._run_guest(ops, report)
            return
        try:
            op.run(self)
        except ValueError as error:
            # -EINVAL of an ioctl, which no policy causes.
            where = f"litmus test {self.harness.test.name}: thread {self.name}"
            raise BadInput(where, f"{op.text!r} is refused: {error}") from error
        if report:
            self.harness.progressed(self.number)

    def _run_guest(self, ops: tuple[Op, ...], report: bool) -> None:
        assert self.task is not None
        assert self.program is not None
        self.program.load(ops, report)
        position, turns = 0, 0
        while not self.program.done() or self._stops_in_kvm():
            state = self.task.resume(self.cpu)
            if state is PREEMPTIBLE:
                self._preemptible()
            elif isinstance(state, ExitToUser):
                self._left_to_user(state, ops)
            if self.harness.alone is not None:
                before, position = position, self.program.position()
                turns = turns + 1 if position == before else 0
                if turns == _TURNS:
                    what = self.program.operation(ops).text
                    raise LitmusFailure(f"{self.name}: {what!r} is refused for ever: no other thread runs")

    def _stops_in_kvm(self) -> bool:
        """Return whether the vCPU stands in the middle of KVM's code, where no execution can begin or end."""
        assert self.task is not None
        return self.harness.alone is not None and self.task.state is PREEMPTIBLE

    def _preemptible(self) -> None:
        if self.preempt_to < 0:
            return
        self.preempt_after -= 1
        if not self.preempt_after:
            pcpu, self.preempt_to = self.preempt_to, -1
            self.migrate(pcpu)

    def _left_to_user(self, state: ExitToUser, ops: tuple[Op, ...]) -> None:
        """Return to user space: it retries an access that the host refused for now, and emulates MMIO."""
        if state.reason in ("shutdown", "no-memory"):
            what = shown("; ".join(op.text for op in ops))
            why = f": {self.cpu.machine.exhausted_frames()}" if state.reason == "no-memory" else ""
            raise LitmusFailure(f"{self.name}: {state.reason} at {state.gpa:#x} in {what}{why}")
        if state.reason != "mmio":
            cpu_relax(self.cpu)


class PcpuLock:
    """Admits one thread at a time to a pCPU."""

    def __init__(self, number: int) -> None:
        self._mutex = Mutex(f"pCPU {number}")
        self._held: object = None

    def take(self, cpu: Cpu) -> None:
        self._held = self._mutex.held(cpu).__enter__()

    def give(self, cpu: Cpu) -> None:
        held, self._held = self._held, None
        held.unlock()  # type: ignore[attr-defined]
