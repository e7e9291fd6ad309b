"""The thread that drives grace periods and runs RCU callbacks (rcu_gp_kthread, rcuc)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.actors.base import MachineActor
from native import lib

if TYPE_CHECKING:
    from emulator.actors.crew import Crew
    from emulator.machine.runtime import Cpu


class RcuThread(MachineActor):
    """Lives in the C core until the machine stops; it takes no messages.

    Whoever announces one nevertheless gets it back into Python for a moment: what is raised in a thread from
    outside takes effect there.
    """

    def __init__(self, crew: Crew, cpu: Cpu) -> None:
        super().__init__(crew, cpu, "rcu")

    def on_start(self) -> None:
        # Who asks hears at once that nobody answers.
        self.inbox.close()
        while self.cpu.check(lib.rcu_thread(self.cpu.m, self.cpu.id)):
            lib.cpu_clear_attention(self.cpu.m, self.cpu.id, lib.ATTENTION_MESSAGE)
        self.actor_stopped.set()
