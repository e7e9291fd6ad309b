"""The user-space thread of a vCPU, as the host's scheduler sees it: it runs on one pCPU at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.kvm.kvm_host import READY, RunYield
from emulator.kvm.virt.kvm_main import kvm_sched_in, kvm_sched_out
from emulator.kvm.x86 import vcpu_run

if TYPE_CHECKING:
    from emulator.kvm.structs import Vcpu
    from emulator.machine.runtime import Cpu


# Default time until the timer interrupt that ends a guest's HLT.
HALT_SECONDS = 0.0001


class VcpuTask:
    """A vCPU's thread, handed from pCPU to pCPU by message; only the pCPU that has it touches it.

    Any thread may read `pcpu`: the pCPU that has the task, or -1 while it is on its way.
    """

    __slots__ = (
        "_run",
        "finished",
        "halt_seconds",
        "pcpu",
        "scheduled_out",
        "state",
        "vcpu",
        "vm",
        "wake_at",
    )

    def __init__(self, vcpu: Vcpu, halt_seconds: float = HALT_SECONDS) -> None:
        self.vcpu = vcpu
        self.vm = vcpu.kvm.id
        self.pcpu = -1
        self.wake_at = 0.0
        self.halt_seconds = halt_seconds
        # The vCPU is shut down: the task never runs again, on any pCPU.
        self.finished = False
        # Preempted inside KVM_RUN: its preempt notifier is called when it is scheduled in again.
        self.scheduled_out = False
        self._run = vcpu_run(vcpu)
        # The state that the generator yielded last.
        self.state: RunYield = next(self._run)
        assert self.state is READY

    def __repr__(self) -> str:
        return f"<task of vCPU {self.vcpu.id}>"

    def resume(self, cpu: Cpu) -> RunYield:
        """Go on, on this pCPU, until KVM is preemptible or cannot go on."""
        self.state = self._run.send(cpu)
        return self.state

    def switch_in(self, cpu: Cpu) -> None:
        if self.scheduled_out:
            self.scheduled_out = False
            kvm_sched_in(cpu, self.vcpu)

    def switch_out(self, cpu: Cpu) -> None:
        # Outside KVM_RUN nothing is loaded and no preempt notifier is registered.
        if self.vcpu.loaded:
            self.scheduled_out = True
            kvm_sched_out(cpu, self.vcpu)

    def restart(self) -> None:
        """Replace the thread by a new one that resumes at `state`, which must not be PREEMPTIBLE."""
        self._run = vcpu_run(self.vcpu, self.state)
        next(self._run)

    def close(self) -> None:
        """End the thread for good, while the machine exists: leaving KVM_RUN drops SRCU if it is held."""
        self._run.close()
