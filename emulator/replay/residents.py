"""vCPUs that stay in guest mode while the replay does something else: a thread for each of their pCPUs.

A flush by the host then finds them in guest mode, and sends IPIs, as in the recording.  A vCPU that is
interrupted leaves its pCPU, and serves its requests when the recording has it enter again.  The replay waits
for that after each event, so a workload always sends the same IPIs.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Any, Final

from emulator.actors.task import VcpuTask
from emulator.kvm.kvm_host import IN_GUEST_MODE, RESCHED
from emulator.machine.runtime import Cpu, MachineStopped
from native import ffi, lib

# No test or replay waits so long, unless a vCPU is stuck.
_PATIENCE: Final = 60.0
_POLL: Final = 0.00005
# A count that no signal reaches: the guest waits until an interrupt comes.
_NEVER: Final = (1 << 64) - 1


class Resident:
    """A pCPU with a thread, on which one vCPU at a time stays in guest mode."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu
        self.task: VcpuTask | None = None
        self._program = _waiting()
        self._tasks: queue.SimpleQueue[VcpuTask | None] = queue.SimpleQueue()
        self._left = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name=f"pcpu{cpu.id}", daemon=True)
        self._thread.start()

    # --- called by the replay ------------------------------------------------------------------------------

    def begin(self, task: VcpuTask) -> None:
        """Let the vCPU enter; `arrived` waits until it is in guest mode."""
        self.task = task
        self._left.clear()
        self._tasks.put(task)

    def arrived(self) -> None:
        assert self.task is not None
        m, number = self.cpu.m, self.task.vcpu.id
        until = time.monotonic() + _PATIENCE
        while not (lib.vcpu_mode(m, number) == IN_GUEST_MODE and lib.guest_program_position(m, number)):
            if self._error is not None:
                raise self._error
            if time.monotonic() > until:
                raise RuntimeError(f"vCPU {number} does not reach guest mode on pcpu{self.cpu.id}")
            time.sleep(_POLL)

    def settle(self) -> VcpuTask | None:
        """Return the vCPU if it was kicked, once it has left its pCPU.  The sender has changed its mode."""
        task = self.task
        if task is None or lib.vcpu_mode(self.cpu.m, task.vcpu.id) == IN_GUEST_MODE:
            return None
        self._ended()
        return task

    def leave(self) -> None:
        """Make the vCPU leave guest mode and its pCPU."""
        if self.task is not None:
            lib.cpu_notify(self.cpu.m, self.cpu.id, lib.ATTENTION_MESSAGE)
            self._ended()

    def _ended(self) -> None:
        assert self.task is not None
        if not self._left.wait(_PATIENCE):
            raise RuntimeError(f"vCPU {self.task.vcpu.id} does not leave pcpu{self.cpu.id}")
        self.task = None
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """End the thread.  Its vCPU has left, or the machine is stopping."""
        self._tasks.put(None)
        self._thread.join(_PATIENCE)

    # --- the thread ----------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                self._run(task)
            except MachineStopped:
                return
            except BaseException as error:
                self._error = error
            finally:
                self._left.set()

    def _run(self, task: VcpuTask) -> None:
        cpu = self.cpu
        cpu.check(lib.cpu_take(cpu.m, cpu.id))
        cpu.check(lib.guest_set_program(cpu.m, task.vcpu.id, self._program, 2))
        task.switch_in(cpu)
        # Without requests of its own the vCPU has no exit before it waits.
        while task.resume(cpu) is not RESCHED or not lib.guest_program_position(cpu.m, task.vcpu.id):
            pass
        lib.cpu_clear_attention(cpu.m, cpu.id, lib.ATTENTION_MESSAGE)
        task.switch_out(cpu)
        lib.cpu_idle(cpu.m, cpu.id)


def _waiting() -> Any:
    """Return a guest program of two operations: one that shows that the guest runs, and an endless wait."""
    program = ffi.new("struct guest_op[]", 2)
    program[0].kind = lib.GUEST_OP_SIGNAL
    program[0].value = lib.MACHINE_SIGNALS - 1
    program[1].kind = lib.GUEST_OP_WAIT
    program[1].value = _NEVER
    return program


class Residents:
    """All pCPUs of a replay on which a vCPU has stayed in guest mode."""

    def __init__(self) -> None:
        self._by_cpu: dict[int, Resident] = {}
        # vCPUs that a kick has made leave, and their pCPUs, in the order of these.
        self._interrupted: dict[VcpuTask, Cpu] = {}

    def stay(self, cpu: Cpu, task: VcpuTask) -> None:
        """Bring the vCPU into guest mode on the pCPU."""
        self._begin(cpu, task).arrived()

    def _begin(self, cpu: Cpu, task: VcpuTask) -> Resident:
        self.vacate(cpu)
        self._interrupted.pop(task, None)
        if cpu.id not in self._by_cpu:
            self._by_cpu[cpu.id] = Resident(cpu)
        resident = self._by_cpu[cpu.id]
        resident.begin(task)
        return resident

    def resume(self, vm: int) -> None:
        """Bring the VM's vCPUs into guest mode again that kicks have made leave it."""
        back = [(cpu, task) for task, cpu in self._interrupted.items() if task.vm == vm]
        for resident in [self._begin(cpu, task) for cpu, task in back]:
            resident.arrived()

    def on(self, cpu: Cpu) -> VcpuTask | None:
        """Return the vCPU that stays in guest mode on the pCPU."""
        resident = self._by_cpu.get(cpu.id)
        return None if resident is None else resident.task

    def vacate(self, cpu: Cpu) -> None:
        """Make the vCPU that stays on the pCPU leave it."""
        if (resident := self._by_cpu.get(cpu.id)) is not None:
            resident.leave()

    def leave(self, task: VcpuTask) -> None:
        """Make this vCPU leave, wherever it stays."""
        self._interrupted.pop(task, None)
        for resident in self._by_cpu.values():
            if resident.task is task:
                resident.leave()

    def settle(self) -> None:
        for resident in self._by_cpu.values():
            if (task := resident.settle()) is not None:
                self._interrupted[task] = resident.cpu

    def vacate_all(self) -> None:
        for resident in self._by_cpu.values():
            resident.leave()

    def end(self) -> None:
        for resident in self._by_cpu.values():
            resident.end()
