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

# Seconds of CPU time, and of wall time, without a word until a child counts as hung: far beyond the longest
# look at one pair.  A child that waits for a lock of its own burns no CPU time.
BURNED: Final = 40.0
SILENCE: Final = 600.0
_MEMORY: Final = 4 << 30


@dataclass(slots=True)
class Lost:
    """A child that ended without a result, or did not end.  during: its last word."""

    during: str
    how: str


@dataclass(slots=True)
class _Child:
    number: int
    process: Any
    pipe: multiprocessing.connection.Connection
    heard: float
    said: str = ""
    burned: float = 0.0  # CPU seconds until its last word

    def hangs(self) -> bool:
        cpu = _cpu_seconds(self.process.pid) - self.burned
        return cpu > BURNED or time.monotonic() - self.heard > SILENCE


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
            child.heard, child.burned = time.monotonic(), _cpu_seconds(child.process.pid)
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
    try:
        # The name, in parentheses, may contain spaces; utime and stime are the 12th and 13th field after it.
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
