"""The price of a patch: guest accesses of a run, and its start, with a patch of KVM's code and without.

The patch changes a function that the main job calls at each migration, and nothing that this function does.
Runs with the patch and without take turns, each first in every other pair.
"""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.benchmark import Context
from bench.errors import BenchFailed
from bench.figures import Figure
from bench.mutation.generate import sources

_MODULE: Final = "emulator.kvm.vmx.vmx"
_BEFORE: Final = "    answer = kvm.policy.migration(cpu, vcpu)\n"
_AFTER: Final = "    answer = str(kvm.policy.migration(cpu, vcpu))\n"
# A run that is as good as its start.
_SHORT: Final = "100ms"
# Milliseconds that a patch may add to the start.
_ALLOWED: Final = 300
_SPARE_SECONDS: Final = 120


@dataclass(frozen=True, slots=True)
class Run:
    """One run.  rate: guest accesses a second; wall: milliseconds from its start to its end."""

    rate: float
    wall: float


def patch_text() -> str:
    """Return the patch, made for the KVM code that is here."""
    path, text = sources()[_MODULE]
    if text.count(_BEFORE) != 1:
        raise BenchFailed(f"{path} has not got the line that the patch changes: {_BEFORE.strip()}")
    changed = text.replace(_BEFORE, _AFTER)
    lines = difflib.unified_diff(
        text.splitlines(keepends=True), changed.splitlines(keepends=True), f"a/{path}", f"b/{path}"
    )
    return "An answer that is a string already becomes one.\n\n" + "".join(lines)


def patched(context: Context) -> Iterator[Figure]:
    patch = context.directory / "nothing.patch"
    patch.write_text(patch_text(), "utf-8")
    duration = f"{context.sizes.job_seconds}s"
    pairs = [_pair(context, patch, duration, turn) for turn in range(context.sizes.repeats)]
    yield Figure(
        name="accesses of a patched run",
        what=f"guest accesses in flushlab run for {duration}, with a patch that changes nothing",
        unit="accesses/s",
        values=tuple(with_patch.rate for with_patch, _ in pairs),
        reference_name="without the patch",
        references=tuple(without.rate for _, without in pairs),
        ratio_of="value/reference",
        wanted="ratio >= 0.95",
    )
    starts = [_pair(context, patch, _SHORT, turn) for turn in range(context.sizes.repeats)]
    yield Figure(
        name="start of a patched run",
        what=f"flushlab run for {_SHORT}, from its start to its end, with the patch",
        unit="ms",
        values=tuple(with_patch.wall for with_patch, _ in starts),
        reference_name=f"without the patch, and {_ALLOWED} ms",
        references=tuple(without.wall + _ALLOWED for _, without in starts),
        ratio_of="value/reference",
        wanted="ratio <= 1",
    )


def _pair(context: Context, patch: Path, duration: str, turn: int) -> tuple[Run, Run]:
    """Return a run with the patch and one without; the order changes with each turn."""
    context.say(f"flushlab run for {duration} with a patch and without")
    if turn % 2:
        without = _run(duration)
        return _run(duration, str(patch)), without
    return _run(duration, str(patch)), _run(duration)


def _run(duration: str, policy: str = "linux-7.3") -> Run:
    command = [sys.executable, "-m", "emulator", "run", "--duration", duration, "--seed", "1", "--json"]
    started = time.monotonic()
    try:
        done = subprocess.run(
            [*command, "--policy", policy],
            capture_output=True,
            text=True,
            check=False,
            timeout=_SPARE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise BenchFailed(f"flushlab run --policy {policy}: not done after {_SPARE_SECONDS} s") from None
    wall = 1000 * (time.monotonic() - started)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise BenchFailed(f"flushlab run --policy {policy}: exit status {done.returncode}: {last}")
    document = json.loads(done.stdout)
    return Run(document["counters"]["accesses"] / document["elapsed_seconds"], wall)
