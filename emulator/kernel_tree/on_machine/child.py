"""Run a function in a forked process, because a tree's code may crash or never end.

The process ends when the function does, and also if the process that waits for it ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Final, TypeVar

from emulator import interrupts
from emulator.kernel_tree.build import Built
from emulator.kernel_tree.on_machine.core import Tree
from emulator.kernel_tree.on_machine.install import install, tell_stories
from emulator.kernel_tree.on_machine.places import kernel_places, short_place
from emulator.kernel_tree.on_machine.story import Storyteller

T = TypeVar("T")

_PR_SET_PDEATHSIG: Final = 1
_TICK: Final = 0.5
# An operation counts as endless if it takes longer, and its thread has used the processor for a part of that.
ENDLESS_SECONDS: Final = 10.0
_ENDLESS_CPU: Final = 2.0
_MOST_STACK: Final = 12
_MOST_SAID: Final = 2000
_EXIT: Final = os._exit


class TreeDied(Exception):
    """The tree's code has ended the process.  lines: the reason, then the stack in the kernel's functions."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


@dataclass(frozen=True, slots=True)
class _Pipes:
    result: int
    report: int
    said: IO[bytes] | None


def in_child(built: Built, function: Callable[[Tree], T], *, talks: bool = False) -> T:
    """Return the result of the function, called with the tree in a process of its own.

    talks: the process writes to standard error.  A signal that asks this process to end is passed on once.
    Raises TreeDied if the tree's code ends the process, or the error that the function raises.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    result_in, result_out = os.pipe()
    report_in, report_out = os.pipe()
    with tempfile.TemporaryFile() as said:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(result_in)
            os.close(report_in)
            _child(built, function, _Pipes(result_out, report_out, None if talks else said), parent)
        os.close(result_out)
        os.close(report_out)
        try:
            data = _read(result_in, pid)
        finally:
            os.close(result_in)
            status = _reap(pid)
        with os.fdopen(report_in, "rb") as pipe:
            report = pipe.read()
        said.seek(0)
        words = said.read()[-_MOST_SAID:].decode("utf-8", "replace")
    if data:
        kind, value = pickle.loads(data)
        if kind == "error":
            raise value
        return value  # type: ignore[no-any-return]
    raise TreeDied(_reason(built, status, report, words))


def _read(pipe: int, pid: int) -> bytes:
    """Read to the end of the pipe; if a signal asks this process to end, pass it on."""
    parts: list[bytes] = []
    told = False
    while True:
        number = interrupts.came()
        if number is not None and not told:
            told = True
            os.kill(pid, number)
        if not select.select([pipe], [], [], _TICK)[0]:
            continue
        part = os.read(pipe, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)


def _reap(pid: int) -> int:
    """Wait for the process, which has closed its pipe; end it first if an exception is propagating."""
    if sys.exc_info()[0] is not None:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


# --- in the process -----------------------------------------------------------------------------------------


def _child(built: Built, function: Callable[[Tree], T], pipes: _Pipes, parent: int) -> None:
    """Run the function, and end the process."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            _EXIT(1)
        # The terminal's signals come by way of the parent, once.
        os.setpgid(0, 0)
        if pipes.said is not None:
            os.dup2(pipes.said.fileno(), 2)
        tree = install(built.path, pipes.report)
        tell_stories(Storyteller(built, tree))
        threading.Thread(target=_watch, args=(tree,), daemon=True).start()
        try:
            answer: tuple[str, Any] = ("value", function(tree))
        except Exception as error:
            answer = ("error", error)
        sys.stdout.flush()
        data = pickle.dumps(answer)
        while data:
            data = data[os.write(pipes.result, data) :]
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        _EXIT(1)
    # No exit handler may run, because the tree's code may have left memory in any state.
    _EXIT(0)


def _watch(tree: Tree) -> None:
    """Watch for an operation that does not end; its thread then reports its stack, and ends the process."""
    # By CPU: explored CPUs share a thread.
    begun: dict[int, tuple[float, float]] = {}
    while True:
        time.sleep(_TICK)
        now = time.monotonic()
        for number, thread in enumerate(tree.threads):
            since, ident = thread.since, thread.ident
            if not since or not thread.state.inside:
                begun.pop(number, None)
                continue
            try:
                used = time.clock_gettime(time.pthread_getcpuclockid(ident))
            except OSError:
                continue  # the thread has ended meanwhile
            first = begun.get(number)
            if first is None or first[0] != since:
                begun[number] = (since, used)
            elif now - since > ENDLESS_SECONDS and used - first[1] > _ENDLESS_CPU:
                signal.pthread_kill(ident, signal.SIGUSR2)


# --- the report ---------------------------------------------------------------------------------------------


def _reason(built: Built, status: int, report: bytes, said: str) -> list[str]:
    found: dict[str, Any] = json.loads(report.splitlines()[0]) if report.strip() else {}
    # The frames of the handler and of the signal come first; they belong to no kernel function, and drop out.
    places = kernel_places(built, found.get("stack", []))
    stack = [f"  {name}() {place}" for name, place in places[:_MOST_STACK]]
    if "crash" in found:
        name = signal.Signals(found["crash"]).name
        bug = found.get("bug", "")
        where = f" at address {found['address']:#x}" if found["address"] else ""
        reason = f"the tree's code crashes: {name}{where}"
        if found["freed"]:
            reason = f"the tree's code uses an object (struct kvm_mmu_page) that it has freed: {name}{where}"
        if bug:
            file, line, rest = bug.split(":", 2)
            place = file if line == "0" else f"{short_place(file)}:{line}"
            reason = f"the tree's code ends in a BUG: {place}:{rest}"
        return [reason, *stack]
    if "loop" in found:
        return [f"an operation of the tree's code did not end in {ENDLESS_SECONDS:.0f} seconds", *stack]
    how = f"it was ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    last = [line for line in said.splitlines() if line.strip()][-1:]
    return [f"the process that runs the tree's code died: {how}", *last]
