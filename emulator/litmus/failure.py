"""What ends the executions of a test under a policy, and is told as what came of it: `failed: ...`."""

from __future__ import annotations

from emulator.machine.runtime import MachineError


class LitmusFailure(MachineError):
    """The test cannot be run as it is written.  Says itself whom it is about."""


# What a policy can bring about: KVM_BUG_ON, a wait where waiting is forbidden, a test that cannot go on.
KVM_FAILS = (MachineError, AssertionError)


def failure_text(who: str, error: BaseException) -> str:
    return str(error) if isinstance(error, LitmusFailure) else f"{who}: {type(error).__name__}: {error}"
