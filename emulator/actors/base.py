"""The base of all actors of the machine: one thread, one CPU, and an orderly death.

A machine's actor does not outlive an exception, in answer to a message or between messages: it may have died
with locks held and half a broadcast sent, so the machine's state cannot be trusted any more.  It drops its
locks, acknowledges the calls queued for it, and stops the machine; the other actors unwind from their waits.
"""

from __future__ import annotations

import threading
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pykka import Actor, ActorDeadError, ActorRegistry, Future, messages

from emulator.actors.inbox import NativeFuture, NativeInbox, adopt_thread, release_thread
from emulator.actors.slices import shorten_slice
from emulator.machine.runtime import MachineStopped
from native import lib

if TYPE_CHECKING:
    from types import TracebackType

    from emulator.actors.crew import Crew
    from emulator.machine.runtime import Cpu


@dataclass(frozen=True, slots=True)
class Death:
    """An actor that failed: its name, the cause, and the locks and sections that it held at that moment."""

    who: str
    cpu: int
    cause: str
    traceback: str
    held: tuple[str, ...]
    error: BaseException | None = None

    def __str__(self) -> str:
        holding = f", holding {' and '.join(self.held)}" if self.held else ""
        return f"{self.who} died on CPU {self.cpu}{holding}: {self.cause}"


class MachineActor(Actor):
    """An actor with a thread that is a CPU of the machine."""

    def __init__(self, crew: Crew, cpu: Cpu, name: str) -> None:
        self.crew = crew
        self.cpu = cpu
        self.name = name
        self.thread: threading.Thread | None = None
        self.inbox = NativeInbox(cpu, name, self.idle)
        super().__init__()
        crew.enlist(self)

    def __str__(self) -> str:
        return self.name

    # pykka declares it as a static method and calls it through the instance.
    def _create_actor_inbox(self) -> NativeInbox:  # type: ignore[override]
        return self.inbox

    @staticmethod
    def _create_future() -> Future[Any]:
        return NativeFuture()

    def _start_actor_loop(self) -> None:
        # A daemon, so that the process can report it and end even if the thread hangs.
        thread = threading.Thread(target=self._actor_loop, name=self.name, daemon=True)
        thread.start()
        # Set after start(), because a thread that failed to start cannot be joined.
        self.thread = thread

    def idle(self) -> None:
        """Sleep until there is a message, running queued calls: one turn of an actor without messages."""
        self.cpu.check(lib.cpu_halt(self.cpu.m, self.cpu.id, 0))

    def leave(self) -> None:
        """Clean up on the actor's thread, which is about to end, normally or not.  Must not wait."""

    def _actor_loop(self) -> None:
        adopt_thread(self.cpu)
        shorten_slice()
        try:
            if self.cpu.is_pcpu:
                lib.cpu_online(self.cpu.m, self.cpu.id)
            self.on_start()
            while not self.actor_stopped.is_set():
                self._receive_one()
        except MachineStopped:
            pass
        except ActorDeadError as error:
            # When the machine stops, the addressed actor may have left already.
            if not lib.machine_stopping(self.cpu.m):
                self._die(error)
        except BaseException as error:
            self._die(error)
        finally:
            self._end()

    def _receive_one(self) -> None:
        envelope = self.inbox.get()
        try:
            answer = self._handle_receive(envelope.message)
        except BaseException:
            if envelope.reply_to is not None:
                envelope.reply_to.set_exception()
            raise
        if envelope.reply_to is not None:
            envelope.reply_to.set(answer)

    def _stop(self) -> None:
        # Without pykka's log line: a pCPU's thread writes to no log.
        self.actor_stopped.set()
        self.on_stop()

    def _handle_failure(
        self,
        exception_type: type[BaseException] | None,
        exception_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Not called by this package, where failures go through _die.
        if exception_value is not None:
            raise exception_value

    def _die(self, error: BaseException) -> None:
        death = Death(
            who=self.name,
            cpu=self.cpu.id,
            cause=f"{type(error).__name__}: {error}",
            traceback="".join(traceback.format_exception(error)),
            held=self.crew.what_holds(self.cpu),
            error=error,
        )
        # Stop the machine only once no CPU can wait for this one.
        self.crew.let_go(self.cpu)
        self.crew.report_death(death)

    def _end(self) -> None:
        try:
            self.actor_stopped.set()
            ActorRegistry.unregister(self.actor_ref)
            self.leave()
            self.crew.let_go(self.cpu)
        finally:
            # Last: senders get ActorDeadError from now on.
            self.inbox.close()
            release_thread()

    def _handle_receive(self, message: Any) -> Any:
        # Fewer checks per message than pykka makes; only tests use proxies.
        if isinstance(message, messages._ActorStop):
            return self._stop()
        if isinstance(message, messages.ProxyCall | messages.ProxyGetAttr | messages.ProxySetAttr):
            return super()._handle_receive(message)
        return self.on_receive(message)
