"""The thread that drives grace periods and runs RCU callbacks (rcu_gp_kthread, rcuc)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.actors.base import MachineActor
from native import lib

if TYPE_CHECKING:
    from emulator.actors.crew import Crew
    from emulator.machine.runtime import Cpu


class RcuThread(MachineActor):
    """The RCU thread, which stays in the C core until the machine stops; it takes no messages.

    Setting ATTENTION_MESSAGE brings it back into Python for a moment, where an exception that another thread
    raised in it takes effect.
    """

    def __init__(self, crew: Crew, cpu: Cpu) -> None:
        super().__init__(crew, cpu, "rcu")

    def on_start(self) -> None:
        # Senders get ActorDeadError at once.
        self.inbox.close()
        while self.cpu.check(lib.rcu_thread(self.cpu.m, self.cpu.id)):
            lib.cpu_clear_attention(self.cpu.m, self.cpu.id, lib.ATTENTION_MESSAGE)
        self.actor_stopped.set()
