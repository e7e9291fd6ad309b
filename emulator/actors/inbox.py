"""Inbox and future of the machine's actors: they wait in the C core, not in Python.

A pCPU that waits for a message is a halted CPU: it must run the calls that other CPUs queue for it, or let
the sender run them; otherwise two pCPUs that flush each other would wait for ever.  So `NativeInbox.get`
sleeps in `cpu_halt` and `NativeFuture.get` in `cpu_wait_event`; both end when the machine stops.

Only this module maps threads to CPUs.  Threads that are no CPU of any machine (the command line, tests) wait
for futures on a lock.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pykka import ActorDeadError, Future, Timeout

from native import lib

if TYPE_CHECKING:
    from types import TracebackType

    from pykka._envelope import Envelope

    from emulator.machine.runtime import Cpu

T = TypeVar("T")
ExcInfo = tuple[type[BaseException] | None, BaseException | None, "TracebackType | None"]

_cpu_of_thread: dict[int, Cpu] = {}


def adopt_thread(cpu: Cpu) -> None:
    """Register the calling thread as the thread of this CPU."""
    _cpu_of_thread[threading.get_ident()] = cpu


def release_thread() -> None:
    _cpu_of_thread.pop(threading.get_ident(), None)


def current_cpu() -> Cpu | None:
    """Return the CPU of the calling thread, if it has one."""
    return _cpu_of_thread.get(threading.get_ident())


class NativeFuture(Future[T]):
    """An answer that a machine's thread awaits on its own CPU's event."""

    def __init__(self) -> None:
        super().__init__()
        self._result: tuple[Any, ExcInfo | None] | None = None
        self._cpus: list[Cpu] = []
        self._locks: list[Any] = []

    def get(self, *, timeout: float | None = None) -> Any:
        if self._get_hook is not None:
            return super().get(timeout=timeout)
        if self._result is None:
            cpu = current_cpu()
            if cpu is None:
                self._await_on_lock(timeout)
            else:
                self._await_on_cpu(cpu, timeout)
        assert self._result is not None
        value, exc_info = self._result
        if exc_info is None:
            return value
        exc_type, exc_value, traceback = exc_info
        assert exc_type is not None
        raise (exc_type() if exc_value is None else exc_value).with_traceback(traceback)

    def _await_on_cpu(self, cpu: Cpu, timeout: float | None) -> None:
        # The waiter reads its event, then the result; the setter stores the result, then moves the event.
        deadline = None if timeout is None else time.monotonic() + timeout
        self._cpus.append(cpu)
        while True:
            seq = lib.cpu_event(cpu.m, cpu.id)
            if self._result is not None:
                return
            microseconds = 0
            if deadline is not None:
                microseconds = int((deadline - time.monotonic()) * 1e6)
                if microseconds <= 0:
                    raise Timeout(f"{timeout} seconds")
            cpu.check(lib.cpu_wait_event(cpu.m, cpu.id, seq, microseconds))

    def _await_on_lock(self, timeout: float | None) -> None:
        lock = threading.Lock()
        lock.acquire()
        self._locks.append(lock)
        # Either the setter sees the lock in the list, or the result is seen here.
        if self._result is None and not lock.acquire(timeout=-1 if timeout is None else timeout):
            raise Timeout(f"{timeout} seconds")

    def _settle(self, value: Any, exc_info: ExcInfo | None) -> None:
        if self._result is not None or self._get_hook is not None:
            raise queue.Full
        self._result = (value, exc_info)
        for cpu in list(self._cpus):
            lib.cpu_wake(cpu.m, cpu.id)
        for lock in list(self._locks):
            if lock.locked():
                lock.release()

    def set(self, value: T | None = None) -> None:
        self._settle(value, None)

    def set_exception(self, exc_info: ExcInfo | None = None) -> None:
        self._settle(None, sys.exc_info() if exc_info is None else exc_info)

    def set_get_hook(self, func: Callable[[float | None], T]) -> None:
        if self._result is not None:
            raise queue.Full
        super().set_get_hook(func)


def answer_dead(envelope: Envelope[Any], who: str) -> None:
    """Answer a message to an actor that has stopped, so that its sender does not wait for ever."""
    if envelope.reply_to is not None:
        error = ActorDeadError(f"{who} stopped before handling the message")
        envelope.reply_to.set_exception((ActorDeadError, error, None))


class NativeInbox:
    """Messages for the actor that drives `cpu`.

    `get` calls `idle` while no message waits: one turn of the CPU's other work (run a vCPU, or halt).  `idle`
    must return soon after a message arrives; ATTENTION_MESSAGE makes it do so.
    """

    def __init__(self, cpu: Cpu, owner: str, idle: Callable[[], None]) -> None:
        self._cpu = cpu
        self._owner = owner
        self._idle = idle
        self._messages: deque[Envelope[Any]] = deque()
        self._closed = False

    def put(self, envelope: Envelope[Any], /) -> None:
        self._messages.append(envelope)
        # close() sets the flag first and empties afterwards: this thread or close() refuses the envelope.
        if self._closed:
            self._refuse_all()
        else:
            lib.cpu_notify(self._cpu.m, self._cpu.id, lib.ATTENTION_MESSAGE)

    def get(self) -> Envelope[Any]:
        messages = self._messages
        while True:
            if messages:
                return messages.popleft()
            # Clear the bit before the check: a message that comes later sets it again.
            lib.cpu_clear_attention(self._cpu.m, self._cpu.id, lib.ATTENTION_MESSAGE)
            if not messages:
                self._idle()

    def empty(self) -> bool:
        return not self._messages

    def __len__(self) -> int:
        return len(self._messages)

    def close(self) -> None:
        """Accept no message from now on, and answer the waiting ones with ActorDeadError."""
        self._closed = True
        self._refuse_all()

    def _refuse_all(self) -> None:
        while True:
            try:
                envelope = self._messages.popleft()
            except IndexError:
                return
            answer_dead(envelope, self._owner)
