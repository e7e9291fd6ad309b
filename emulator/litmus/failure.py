"""Failures that end the executions of a test under a policy, and are its verdict: `failed: ...`."""

from __future__ import annotations

from emulator.machine.runtime import MachineError


class LitmusFailure(MachineError):
    """The test cannot be run as it is written.  The text names the thread."""


# Failures that a policy can cause: KVM_BUG_ON, a wait in a section that forbids it, a test that cannot go on.
KVM_FAILS = (MachineError, AssertionError)


def failure_text(who: str, error: BaseException) -> str:
    return str(error) if isinstance(error, LitmusFailure) else f"{who}: {type(error).__name__}: {error}"
