"""Failures that end the executions of a test under a policy, and are its verdict: `failed: ...`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.machine.runtime import MachineError

if TYPE_CHECKING:
    from emulator.litmus.harness import Harness


class LitmusFailure(MachineError):
    """The test cannot be run as it is written.  The text names the thread."""


# Failures that a policy can cause: KVM_BUG_ON, a wait in a section that forbids it, a test that cannot go on.
KVM_FAILS = (MachineError, AssertionError)


def failure_text(who: str, error: BaseException) -> str:
    return str(error) if isinstance(error, LitmusFailure) else f"{who}: {type(error).__name__}: {error}"


class Told:
    """A context that makes each failure that a policy can cause a LitmusFailure, which names the thread: the
    harness's, if it runs one alone, or the one given."""

    __slots__ = ("harness", "thread")

    def __init__(self, harness: Harness, thread: str) -> None:
        self.harness = harness
        self.thread = thread

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, KVM_FAILS):
            alone = self.harness.alone
            raise LitmusFailure(failure_text(alone.name if alone else self.thread, error)) from error
