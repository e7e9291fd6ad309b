"""Counters and events for a flush that a policy elides; a flush that is made counts itself."""

from __future__ import annotations

from emulator.kvm.structs import Kvm
from emulator.machine.runtime import Cpu
from native import lib
from native.types import FlushReason


def flush_elided(cpu: Cpu, kvm: Kvm, reason: FlushReason, argument: int = 0) -> None:
    """Account for a flush that Linux 7.3 makes here and this policy does not."""
    cpu.stat(kvm.id, lib.STAT_FLUSHES_ELIDED)
    cpu.event(lib.EVENT_ELIDED, reason, argument, kvm.id)
