"""Compares a tree with the model in a process of its own, and says how that process ended."""

from __future__ import annotations

import contextlib
import json
import re
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Final

from emulator import interrupts
from emulator.errors import BadInput, one_of
from emulator.kernel_tree.build import Built
from emulator.policy import PRESETS

LENGTH: Final = 60
# Differences that are reduced and shown.
MOST_SHOWN: Final = 4
# A sequence takes a twentieth of a second, and reducing a difference some seconds.
_SILENCE: Final = 120.0
_TICK: Final = 0.2
_MOST_SAID: Final = 4000


@dataclass(slots=True)
class Executed:
    """The result.  counts: of operations and events.  argued: harmless differences, by their reasons.  died:
    how the process ended, if not by itself; then `last` has the operations of the sequence in which it did,
    and `said` its last words."""

    policy: str
    counts: dict[str, int] = field(default_factory=dict)
    differences: list[dict[str, Any]] = field(default_factory=list)
    argued: dict[str, int] = field(default_factory=dict)
    died: str = ""
    seed: int = -1
    last: list[str] = field(default_factory=list)
    said: str = ""
    interrupted: bool = False

    @property
    def clean(self) -> bool:
        return not self.differences and not self.died and not self.interrupted


def policy_for(version: str) -> str:
    """Return the newest preset that is not newer than the tree."""
    tree = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    known = {
        tuple(int(part) for part in name.removeprefix("linux-").split(".")): name
        for name in PRESETS
        if name.startswith("linux-")
    }
    fitting = [key for key in known if key <= tree]
    if not fitting or tree < (6, 1):
        raise BadInput("LINUX-TREE", f"found Linux {version}", "Linux 6.1 or newer, for --run")
    return known[max(fitting)]


def execute(
    built: Built,
    policy: str,
    operations: int,
    first: int,
    progress: Callable[[int], None] | None = None,
    silence: float = _SILENCE,
) -> Executed:
    """Compare the tree with a preset on so many random operations, from that seed on."""
    if policy not in PRESETS:
        raise BadInput("--policy", f"found {policy!r}", one_of(policy, PRESETS))
    sequences = -(-operations // LENGTH)
    result = Executed(policy)
    request = {
        "path": str(built.path),
        "policy": policy,
        "seeds": [first, first + sequences],
        "length": LENGTH,
        "most": MOST_SHOWN,
        "trace": False,
    }
    for line in _lines(request, result, silence):
        if "seed" in line:
            result.seed = line["seed"]
            if progress is not None:
                progress(LENGTH * (result.seed - first))
        elif "difference" in line:
            result.differences.append(line["difference"])
        elif "argued" in line:
            result.argued = line["argued"]
        else:
            result.counts = line["end"]
    if result.died and not result.interrupted:
        _trace(request, result, silence)
    return result


def _trace(request: dict[str, Any], result: Executed, silence: float) -> None:
    """Run the sequence again in which the process died, to learn in which operation."""
    again = {**request, "seeds": [result.seed, result.seed + 1], "trace": True}
    last: list[str] = []
    for line in _lines(again, Executed(result.policy), silence):
        if "operation" in line:
            last.append(line["operation"])
    result.last = last


def _lines(request: dict[str, Any], result: Executed, silence: float) -> Iterator[dict[str, Any]]:
    """Yield the documents that the process writes; note in the result how it ended."""
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, "-m", "emulator.kernel_tree.worker"]
        with interrupts.held():
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request).encode())
                process.stdin.close()
            yield from _read(process.stdout, result, silence)
        finally:
            if result.died or result.interrupted:
                process.kill()
            status = _ended(process)
        if status and not result.died and not result.interrupted:
            result.died = (
                f"it was ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            )
        if result.died:
            said.seek(0)
            result.said = said.read()[-_MOST_SAID:].decode("utf-8", "replace").strip()


def _read(pipe: IO[bytes], result: Executed, silence: float) -> Iterator[dict[str, Any]]:
    waited, rest = 0.0, b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if interrupts.came():
                result.interrupted = True
                return
            if not selector.select(_TICK):
                waited += _TICK
                if waited >= silence:
                    result.died = f"an operation did not end in {silence:.0f} seconds"
                    return
                continue
            waited = 0.0
            data = pipe.read1(1 << 16)  # type: ignore[attr-defined]
            if not data:
                return
            *complete, rest = (rest + data).split(b"\n")
            for line in complete:
                yield json.loads(line)


def _ended(process: subprocess.Popen[bytes]) -> int:
    """Wait for the process to end; kill it if it goes on, because an exception has ended the reading.

    Return its exit status.
    """
    try:
        status = process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    if process.stdout is not None:
        process.stdout.close()
    return status
