"""The states of an explored machine, for a search that visits each once (strategies/stateful.py).

The shared state has three parts: the core's memory without the fields on which no later step depends
(native/machine/digest.c), all Python objects that can be reached, and the records of the scheduler's
stand-ins for locks, calls and read sections.  Only the fields that do not count are listed, so a new field
can make equal states differ, which is safe, but never different states equal.

The local state of a task is in its Python frames, which cannot be compared.  But it follows from the place
where the task rested last, from the shared state then, and from all that the task has read since: results of
its calls, memory that the calls have filled in, and Python objects.  An ordering point announces each Python
object as one that steps read and write, so the history of its last writer stands for its value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from types import FrameType
from typing import Any, Final

from emulator.explore.engine.digest import CannotDigest, Digest, address
from emulator.explore.engine.scheduler import Execution
from emulator.explore.machine.control import Control, Readers
from emulator.explore.machine.footprints import OBJECTS
from emulator.explore.machine.lib import ControlledLib
from emulator.explore.machine.program import LitmusProgram
from emulator.policy import Policy
from native import ffi, lib

# Objects that tasks read through calls of the core only, so that the results of the calls tell all they read.
_BY_CALLS: Final = frozenset(name for name, *_ in OBJECTS.values()) | {
    "calls", "callbacks done", "custody of table", "custody of tables", "everything", "irq",
    "mmu_lock waiters", "rcu", "rcu left", "srcu left",
}  # fmt: skip
# Callers of cpu_relax() that use no value afterwards that they have read before: the loop of KVM_RUN, and
# user space that calls KVM_RUN again.  The guest's progress tells their place.  Innermost first.
#
# A task rests between two operations of the test as well, and a vCPU's between two of its guest.  Counts of
# completed operations, in the core's memory, tell which come next.  Guest mode uses no variable of the code
# that has entered the guest, and exit handlers read the exit from the vCPU's memory.  The code between an
# operation and the first step of the next one keeps nothing that it has read and then changes.
_RESTING: Final = (
    ("handle_ept_violation", "vmx_handle_exit", "handle_exit", "vcpu_enter_guest"),
    ("vmx_handle_page_fault", "vmx_handle_exit", "handle_exit", "vcpu_enter_guest"),
    ("_left_to_user", "_run_guest", "do", "run"),
)
_POINTERS: Final = frozenset({"struct machine *", "struct tlb *"})


def rests_there(frame: FrameType | None) -> bool:
    """Return whether this frame, or one above it, is a call of cpu_relax() by a caller in _RESTING."""
    while frame is not None and frame.f_code.co_name != "cpu_relax":
        frame = frame.f_back
    names: list[str] = []
    while frame is not None and len(names) < 4:
        frame = frame.f_back
        names.append("" if frame is None else frame.f_code.co_name)
    return tuple(names) in _RESTING


class HearingLib(ControlledLib):
    """A ControlledLib that records the results of each step's calls."""

    def __init__(self, control: Control) -> None:
        super().__init__(control)
        for name in dir(lib):
            value = getattr(self, name)
            if callable(value):
                self.__dict__[name] = self._heard(value, pointers(getattr(lib, name)))

    def _heard(self, call: Callable[..., Any], filled: tuple[int, ...]) -> Callable[..., Any]:
        control = self.control

        def heard(*args: Any) -> Any:
            result = call(*args)
            execution = control.execution
            # The search knows the results of a replayed step.
            if execution is not None and execution.length >= execution.replayed:
                told = address(result) if isinstance(result, ffi.CData) else result
                memory = [bytes(ffi.buffer(args[n])) for n in filled if isinstance(args[n], ffi.CData)]
                execution.current.heard.append((told, *memory))
            return result

        return heard


def pointers(function: Any) -> tuple[int, ...]:
    """Return the numbers of a native function's arguments that point to memory which it may fill in."""
    return tuple(
        number
        for number, kind in enumerate(ffi.typeof(function).args)
        if kind.kind in ("pointer", "array") and kind.cname not in _POINTERS
    )


def stateless(program: LitmusProgram) -> str:
    """Return the reason why states of a program cannot be compared; "" if they can."""
    policy, options = program.policy, program.options
    if type(policy) is not Policy or policy.patch is not None or policy.has_proposals():
        return "the policy's own code may keep values that it has read"
    if options.store_buffers:
        return "stores in store buffers are not compared"
    if options.adversary:
        return "liberties that TLBs have taken are not compared"
    return ""


def hear(program: LitmusProgram) -> None:
    """Let the program's tasks record the values that they read, from the next `instrument` on."""
    program.control.lib_class = HearingLib
    program.control.rests = lambda: rests_there(sys._getframe(1))


class MachineStates:
    """The states of one program's executions; `hear` comes first."""

    def __init__(self, program: LitmusProgram) -> None:
        self.program = program
        self.control = program.control
        self._digest: Digest | None = None
        self._words: Any = ffi.new("uint64_t[2]")
        self._read: dict[int, bool] = {}

    @property
    def execution(self) -> Execution:
        assert self.control.execution is not None
        return self.control.execution

    def shared(self) -> Hashable:
        control, initial = self.control, self.program.initial
        if initial is None or lib.machine_digest(control.machine.m, self._words):
            return None
        if self._digest is None:
            self._digest = Digest(initial)
        try:
            objects = self._digest.now()
        except CannotDigest:
            return None
        return self._words[0], self._words[1], objects, *self.controlled()

    def controlled(self) -> tuple[Hashable, ...]:
        """Return the stand-ins' records: locks, calls under way, read sections, callbacks."""
        control = self.control
        locks = tuple(
            (vm, tuple(lock.holders), lock.readers, lock.writer, tuple(sorted(lock.waiting)))
            for vm, lock in sorted(control.mmu_locks.items())
        )
        readers = tuple((vm, _inside(one)) for vm, one in ((-1, control.rcu), *sorted(control.srcu.items())))
        # A grace period waits for some of the readers that are inside: a reader may have left, and come back.
        holdouts = tuple((task, inside()) for task, inside in sorted(control.holdouts.items()))
        roots = tuple(sorted(control.root_of.items()))
        calls = frozenset(control.queued), tuple(control.freed), control.callbacks_run
        return locks, readers, holdouts, roots, calls

    def rests(self, index: int) -> bool:
        task = self.execution.tasks[index]
        return task.done or task.resting

    def local(self, index: int, history: int) -> Hashable:
        task = self.execution.tasks[index]
        if task.done:
            return "done"
        now = task.label, task.reads, task.writes, task.changed, task.watch
        # A daemon has no local state but the accesses that its next step announces.
        return ("rests", *now) if task.resting or task.daemon else (history, *now)

    def is_read(self, bit: int) -> bool:
        read = self._read.get(bit)
        if read is None:
            name = self.control.objects.names[bit]
            word = name[0] if isinstance(name, tuple) else name
            read = self._read[bit] = word not in _BY_CALLS
        return read

    def is_held(self, bit: int) -> bool:
        return self.control.objects.names[bit][0] in ("lock", "mmu_lock")  # type: ignore[index]

    def is_read_under(self, bit: int) -> bool:
        # A pCPU's mutex guards the pCPU and the vCPU on it.  Others read these with the mutex, or by calls.
        name = self.control.objects.names[bit]
        return self.is_read(bit) and not (isinstance(name, tuple) and str(name[-1]).startswith("pCPU "))


def _inside(readers: Readers) -> tuple[tuple[int, int], ...]:
    return tuple(sorted((who, depth) for who, depth in readers.depth.items() if depth))
