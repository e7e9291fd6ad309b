"""Operations of litmus tests that wait for another thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.errors import shown
from emulator.litmus.syntax import Arg, Context, Op, OpError

if TYPE_CHECKING:
    from emulator.litmus.model import LitmusTest


class _Waits(Op):
    args = (Arg("thread", "thread"), Arg("n", "number"))

    def waits_for(self) -> tuple[str, int]:
        return self.name("thread"), self.number("n")

    def check(self, test: LitmusTest, thread: str) -> None:
        name, n = self.waits_for()
        if name not in test.threads or name == thread:
            others = [other for other in test.threads if other != thread]
            raise OpError(repr(name), f"another thread: {', '.join(others) or 'there is none'}")
        count = len(test.threads[name].ops)
        if not 1 <= n <= count:
            raise OpError(shown(n), f"1 to {count}, the operations of thread {name}")

    def run(self, context: Context) -> None:
        context.wait_for(*self.waits_for())


class Wait(_Waits):
    """Waits within the guest's program in a vCPU's thread; another thread sleeps."""

    verb = "wait"
    doc = "The thread waits until THREAD has completed its first N operations; a vCPU waits in guest mode."
    who = ("vcpu", "kvm")


class Block(_Waits):
    verb = "block"
    doc = (
        "The vCPU waits outside guest mode until THREAD has completed its first N operations: it is not "
        "runnable, and its pCPU is free for other vCPUs."
    )
    who = ("vcpu",)
