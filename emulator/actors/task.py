"""The user-space thread of a vCPU, as the host's scheduler sees it: it runs on one pCPU at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.kvm.kvm_host import READY, RunYield
from emulator.kvm.kvm_main import kvm_sched_in, kvm_sched_out
from emulator.kvm.x86 import vcpu_run

if TYPE_CHECKING:
    from emulator.kvm.structs import Vcpu
    from emulator.machine.runtime import Cpu


# Until the timer interrupt that ends a guest's HLT, unless it is told otherwise.
HALT_SECONDS = 0.0001


class VcpuTask:
    """Handed from pCPU to pCPU by message; only the pCPU that has it touches it.

    `pcpu` says where it is (-1: on its way) and may be read by anyone.
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
        # The vCPU is shut down: a task that never runs again, wherever it is sent.
        self.finished = False
        # Preempted inside KVM_RUN: its preempt notifiers fire when it comes back.
        self.scheduled_out = False
        self._run = vcpu_run(vcpu)
        # What it said when it stood still last.
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
        """Another thread takes over where one stood that said `state` (not PREEMPTIBLE)."""
        self._run = vcpu_run(self.vcpu, self.state)
        next(self._run)

    def close(self) -> None:
        """End the thread for good, while the machine exists: leaving KVM_RUN releases what it holds."""
        self._run.close()
