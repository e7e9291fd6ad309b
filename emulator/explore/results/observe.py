"""Observations of an execution beside its steps and events: the operation that each step belongs to, the
result of a guest's access, the TLB entries that came and went, and the dangers that occurred.

Everything is read from the core between two steps, so the execution stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from emulator.explain.events import name_of
from emulator.explore.engine.scheduler import Task
from emulator.explore.machine.guest import GUEST_OP_NAMES
from emulator.explore.machine.program import LitmusProgram
from emulator.litmus.evidence import COUNTERS, STATS
from emulator.litmus.model import ThreadSection
from emulator.litmus.ops import GuestOp, Op
from emulator.litmus.thread import LitmusThread
from emulator.report.violation import MAPPINGS, SIZES
from native import EXIT_REASONS, ffi, lib
from native.types import CpuId, SignalSlot, VcpuId

if TYPE_CHECKING:
    from native._native import MachinePtr, TlbEntry

_GUEST_STEPS: Final = frozenset(GUEST_OP_NAMES.values())

Entry = dict[str, Any]


def tlb_entries(m: MachinePtr, cpu: CpuId) -> list[Entry]:
    """Return the translations that a pCPU has cached, by page."""
    tlb = lib.cpu_tlb(m, cpu)
    buffer = ffi.new("struct tlb_entry[]", max(1, lib.tlb_dump(tlb, ffi.NULL, 0)))
    n = lib.tlb_dump(tlb, buffer, len(buffer))
    return sorted((_entry(cpu, buffer[i]) for i in range(n)), key=lambda entry: tuple(entry.values()))


def _entry(cpu: CpuId, entry: TlbEntry) -> Entry:
    return {
        "cpu": int(cpu),
        "page": entry.page,
        "size": SIZES[entry.size],
        "kind": MAPPINGS[entry.kind],
        "vpid": entry.vpid,
        "pcid": entry.pcid,
        "ep4ta": entry.ep4ta,
        "gfn": entry.gfn,
        "frame": entry.hfn,
        "vm": entry.vm,
        "filled_by_vcpu": entry.vcpu,
        "clock": entry.clock,
    }


@dataclass(frozen=True, slots=True)
class _Thread:
    """A thread of the test in numbers; vcpu: that of its vCPU in the core, None if it has none."""

    number: int
    section: ThreadSection
    home: int
    vcpu: VcpuId | None

    @classmethod
    def of(cls, thread: LitmusThread) -> _Thread:
        vcpu = None if thread.task is None else thread.vcpu.id
        return cls(thread.number, thread.section, thread.home.id, vcpu)

    def document(self) -> dict[str, Any]:
        return {"vm": self.section.vm, "vcpu": self.vcpu, "home": self.home, "ops": list(self.section.ops)}


class Observer:
    """Observes one execution of a program; create it after `program.start()`."""

    def __init__(self, program: LitmusProgram) -> None:
        self.program = program
        self.m = program.machine.m
        # Numbers, not KVM's objects: reading these could count as a read of a user's policy.
        self._threads = {name: _Thread.of(thread) for name, thread in program.harness.threads.items()}
        self._vms = [kvm.id for kvm in program.harness.kvms]
        self._pcpus = [CpuId(number) for number in range(program.machine.pcpus)]
        self._counts = ffi.new("uint64_t[]", lib.COUNTERS)
        self._tlbs = [tlb_entries(self.m, cpu) for cpu in self._pcpus]
        self._dangers = self._dangers_now()
        self._progress = {name: self._progress_of(thread) for name, thread in self._threads.items()}
        self._positions = {name: self._position_of(thread) for name, thread in self._threads.items()}
        self._misses = [self._misses_of(cpu) for cpu in self._pcpus]
        self.at_start = self.entries()
        self.alone: list[dict[str, Any]] = []  # the operations of `final`

    def entries(self) -> list[Entry]:
        return [entry for cpu in self._pcpus for entry in tlb_entries(self.m, cpu)]

    def facts(self) -> dict[str, Any]:
        """Return the threads, as they are in the test."""
        return {name: thread.document() for name, thread in self._threads.items()}

    # --- a step ---------------------------------------------------------------------------------------------

    def did(self, task: Task) -> dict[str, Any]:
        """Return the actions of the step that ends now, without empty parts."""
        thread = self._threads.get(task.name)
        if thread is None:
            return self._changes()
        name, ops = task.name, thread.section.ops
        before, now = self._progress[name], self._progress_of(thread)
        found: dict[str, Any] = {}
        if before < len(ops):
            found["op"] = {"n": before + 1, "text": ops[before]}
        if now > before:
            found["done"] = [{"n": n + 1, "text": ops[n]} for n in range(before, now)]
        if task.label[0] in _GUEST_STEPS and before < len(ops):
            found["access"] = self._access(thread, name, thread.section.parsed[before])
        self._progress[name], self._positions[name] = now, self._position_of(thread)
        return found | self._changes()

    def _access(self, thread: _Thread, name: str, op: Op) -> dict[str, Any]:
        """Return the guest's operation's look-up in the TLB, and the frame that it reached."""
        cpu = self.program.harness.threads[name].cpu.id
        completed = self._position_of(thread) != self._positions[name]
        missed = self._misses_of(cpu) != self._misses[cpu]
        found: dict[str, Any] = {"completed": completed, "tlb": "miss" if missed else "hit"}
        reason = self.program.control.exit_reason
        if reason != lib.EXIT_REASONS:
            found["exit"] = name_of(EXIT_REASONS, reason)
        if completed and isinstance(op, GuestOp) and op.verb in ("read", "write", "exec"):
            frame, rights = ffi.new("uint32_t[]", 1), ffi.new("uint32_t[]", 3)
            page = op.instructions()[0].linear >> 12
            if lib.tlb_l1_probe(lib.cpu_tlb(self.m, cpu), page, frame, rights):
                found["frame"] = frame[0]
        return found

    def _progress_of(self, thread: _Thread) -> int:
        return int(lib.signal_get(self.m, SignalSlot(thread.number)))

    def _position_of(self, thread: _Thread) -> int:
        """Return the guest's position in its program: a number that differs once it has gone on."""
        return -1 if thread.vcpu is None else int(lib.guest_program_position(self.m, thread.vcpu))

    def _misses_of(self, cpu: CpuId) -> int:
        lib.counters_read(self.m, cpu, self._counts)
        return int(self._counts[lib.COUNT_L2_MISSES])

    # --- changes since the last step ------------------------------------------------------------------------

    def _changes(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        filled, dropped = [], []
        for cpu in self._pcpus:
            self._misses[cpu] = self._misses_of(cpu)
            before, now = self._tlbs[cpu], tlb_entries(self.m, cpu)
            if before != now:
                self._tlbs[cpu] = now
                filled += [entry for entry in now if entry not in before]
                dropped += [entry for entry in before if entry not in now]
        if filled:
            found["filled"] = filled
        if dropped:
            found["dropped"] = dropped
        dangers = self._dangers_now()
        occurred = {name: n - self._dangers[name] for name, n in dangers.items() if n != self._dangers[name]}
        self._dangers = dangers
        if occurred:
            found["dangers"] = occurred
        return found

    def _dangers_now(self) -> dict[str, int]:
        """Return each danger's count so far, as litmus.evidence counts it."""
        lib.counters_sum(self.m, self._counts)
        found = {name: int(self._counts[counter]) for name, counter in COUNTERS.items()}
        stats = {name: sum(lib.vm_stat(self.m, vm, stat) for vm in self._vms) for name, stat in STATS.items()}
        return found | stats

    # --- the end --------------------------------------------------------------------------------------------

    def ran_alone(self, name: str, ops: tuple[Op, ...], events: list[dict[str, Any]]) -> None:
        """Record operations of `final`, which follow one another after the threads' end."""
        thread = self.program.harness.threads[name]
        cpu = thread.pcpu if thread.section.is_vcpu else thread.home.id
        texts = [op.text for op in ops]
        self.alone.append({"thread": name, "cpu": cpu, "ops": texts, "events": events, **self._changes()})
