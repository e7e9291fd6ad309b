"""Processes for mutants: each mutant in a child of its own, forked when everything is loaded.

A mutant may hang in a single step, eat memory, or take the process down; the parent notices each of these.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")

# A child counts as hung if, since its last word, it has used BURNED seconds of CPU time, far more than the
# longest look at one pair takes, or if all its threads have slept for ASLEEP seconds: then each waits for
# another one.  A child that waits for a CPU of a busy machine, or that is stopped, does neither.
BURNED: Final = 40.0
ASLEEP: Final = 120.0
# The most seconds of sleep that one look may add, because the whole machine may have been stopped meanwhile.
_LOOK: Final = 2.0
_MEMORY: Final = 4 << 30


@dataclass(slots=True)
class Lost:
    """A child that ended without a result, or did not end.  during: its last word."""

    during: str
    how: str


@dataclass(slots=True)
class _Child:
    """A process that does a piece of work.

    burned: the CPU seconds that it had used at its last word.  cpu, at: the CPU seconds at the last look, and
    the time of that look.  asleep: the seconds for which it has slept since it was last seen awake.
    """

    number: int
    process: Any
    pipe: multiprocessing.connection.Connection
    at: float
    said: str = ""
    burned: float = 0.0
    cpu: float = 0.0
    asleep: float = 0.0

    def hears(self) -> None:
        """Note that the child has said a word: count from zero again."""
        self.burned, self.asleep = _cpu_seconds(self.process.pid), 0.0

    def hangs(self) -> bool:
        """Look at the child, and return whether it has gone on too long without a word."""
        now, cpu = time.monotonic(), _cpu_seconds(self.process.pid)
        idle = cpu == self.cpu and _sleeps(self.process.pid)
        self.asleep = self.asleep + min(now - self.at, _LOOK) if idle else 0.0
        self.at, self.cpu = now, cpu
        return cpu - self.burned > BURNED or self.asleep > ASLEEP


def each(
    work: Sequence[T], do: Callable[[T, Callable[[str], None]], Any], jobs: int, stop: Callable[[], bool]
) -> Iterator[tuple[T, Any]]:
    """Yield each piece of work with its result or a Lost, as they end.  After `stop`, begin no more."""
    waiting = deque(enumerate(work))
    running: list[_Child] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs and not stop():
                number, one = waiting.popleft()
                running.append(_start(number, one, do))
            if not running:
                return
            for child, result in _heard(running):
                running.remove(child)
                child.process.join()
                yield work[child.number], result
    finally:
        for child in running:
            child.process.kill()
            child.process.join()


def _start(number: int, one: T, do: Callable[[T, Callable[[str], None]], Any]) -> _Child:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, one, do), daemon=True)
    process.start()
    theirs.close()
    return _Child(number, process, ours, time.monotonic())


def _child(pipe: Any, one: Any, do: Callable[[Any, Callable[[str], None]], Any]) -> None:
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    result = do(one, lambda text: pipe.send(("said", text)))
    pipe.send(("done", result))
    pipe.close()
    sys.stdout.flush()
    # Threads of a stress run that hangs must not keep the child.
    os._exit(0)


def _heard(running: Sequence[_Child]) -> list[tuple[_Child, Any]]:
    """Wait for words; return the children that have ended, each with its result."""
    ended: list[tuple[_Child, Any]] = []
    ready = set(multiprocessing.connection.wait([child.pipe for child in running], timeout=1.0))
    for child in running:
        if child.pipe in ready:
            try:
                kind, value = child.pipe.recv()
            except (EOFError, OSError):
                child.process.join()
                ended.append((child, Lost(child.said, f"exit status {child.process.exitcode}")))
                continue
            child.hears()
            if kind == "done":
                ended.append((child, value))
            else:
                child.said = value
        elif child.hangs():
            child.process.kill()
            ended.append((child, Lost(child.said, "hang")))
    return ended


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    fields = _stat(Path(f"/proc/{pid}/stat"))
    # utime and stime are the 12th and 13th field after the name.
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _sleeps(pid: int) -> bool:
    """Return whether no thread of a process runs, can run, or is stopped."""
    threads = [_stat(file) for file in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(fields[0] == "S" for fields in threads if fields)


def _stat(file: Path) -> list[str]:
    """Return the fields of a stat file after the name, which is in parentheses and may contain spaces."""
    try:
        return file.read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return []
