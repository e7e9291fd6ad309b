"""The thread of a vCPU, as the host's scheduler sees it: something that runs on one pCPU at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emulator.kvm.structs import Vcpu
    from emulator.runtime import Cpu


@dataclass(frozen=True, slots=True)
class Stop:
    """Why the task does not go on at once; block_seconds 0: somebody else's turn."""

    block_seconds: float = 0.0


class VcpuTask:
    """Placeholder fields until vcpu_run is integrated."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.pcpu = -1
        self.wake_at = 0.0

    def resume(self, cpu: Cpu) -> Stop | None:
        raise NotImplementedError
