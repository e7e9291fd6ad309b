"""Preflight: does this machine have the memory and the threads that a scenario needs?

Asked before anything starts, so that the answer is one line with the largest pCPU count that would work, and
not "can't start new thread" from somewhere in the middle, or the OOM killer.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emulator.config import Scenario
from emulator.errors import BadInput

MIB = 1 << 20

# Per pCPU: TLB and ghosts, counters, event ring, call nodes, and the touched part of a thread's stack.
_PCPU_BYTES = 1 * MIB
# The interpreter with its libraries, and the decoded traces.
_BASE_BYTES = 192 * MIB
# Left for everybody else on the machine.
_RESERVED_THREADS = 32


@dataclass(frozen=True, slots=True)
class Limit:
    """How much of something is left, and who says so."""

    left: int
    source: str


def check(scenario: Scenario, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> None:
    """Raise BadInput unless the scenario fits this machine."""
    _check_memory(scenario, proc, cgroup)
    _check_threads(scenario, proc, cgroup)


def memory_needed(scenario: Scenario) -> int:
    """Bytes, generously: guest pages may all be mapped singly while blocks for huge pages stand ready, if the
    host collapses any."""
    pcpus = scenario.machine.pcpus
    frames = 2 if scenario.host.collapse else 1
    # A sender has a call node for each target, a cache line each, from its first broadcast on.
    call_nodes = 64 * pcpus * min(pcpus, scenario.threads)
    return _BASE_BYTES + frames * 4096 * scenario.guest_pages + pcpus * _PCPU_BYTES + call_nodes


def _check_memory(scenario: Scenario, proc: Path, cgroup: Path) -> None:
    needed = memory_needed(scenario)
    limit = min(_memory_limits(proc, cgroup), key=lambda limit: limit.left, default=None)
    if limit is None or needed <= limit.left:
        return
    raise BadInput(
        scenario.name,
        f"{scenario.vms} VMs with {scenario.guest_pages // 256} MiB and {scenario.machine.pcpus} pCPUs need "
        f"about {needed // MIB} MiB",
        f"at most the {limit.left // MIB} MiB left ({limit.source}): lower vm.memory or machine.pcpus",
    )


def _check_threads(scenario: Scenario, proc: Path, cgroup: Path) -> None:
    limit = min(_thread_limits(proc, cgroup), key=lambda limit: limit.left, default=None)
    if limit is None or scenario.threads + _RESERVED_THREADS <= limit.left:
        return
    others = scenario.threads - scenario.machine.pcpus
    most = limit.left - others - _RESERVED_THREADS
    expected = f"machine.pcpus of at most {most}" if most > 0 else "fewer VMs or a higher limit"
    raise BadInput(
        scenario.name,
        f"machine.pcpus = {scenario.machine.pcpus} needs {scenario.threads} threads, "
        f"{max(limit.left, 0)} are left ({limit.source})",
        expected,
    )


def _memory_limits(proc: Path, cgroup: Path) -> Iterator[Limit]:
    for line in _read(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield Limit(int(line.split()[1]) * 1024, "MemAvailable")
    for directory in _cgroups(proc, cgroup):
        most, used = _number(directory / "memory.max"), _number(directory / "memory.current")
        if most is not None and used is not None:
            yield Limit(most - used, f"cgroup {directory.name or '/'} memory.max")
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        pages = _read(proc / "self/statm").split()
        used_bytes = int(pages[0]) * resource.getpagesize() if pages else 0
        yield Limit(soft - used_bytes, "ulimit -v")


def _thread_limits(proc: Path, cgroup: Path) -> Iterator[Limit]:
    running = _read(proc / "loadavg").split()
    most = _number(proc / "sys/kernel/threads-max")
    if most is not None and len(running) > 3:
        yield Limit(most - int(running[3].split("/")[1]), "kernel.threads-max")
    for directory in _cgroups(proc, cgroup):
        most, used = _number(directory / "pids.max"), _number(directory / "pids.current")
        if most is not None and used is not None:
            yield Limit(most - used, f"cgroup {directory.name or '/'} pids.max")
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    # The kernel does not hold root to RLIMIT_NPROC.
    if soft != resource.RLIM_INFINITY and os.geteuid() != 0:
        yield Limit(soft - _threads_of_user(proc, os.getuid()), "ulimit -u")


def _threads_of_user(proc: Path, uid: int) -> int:
    threads = 0
    for directory in proc.glob("[0-9]*"):
        fields = dict(line.split(":", 1) for line in _read(directory / "status").splitlines() if ":" in line)
        if fields.get("Uid", "").split()[:1] == [str(uid)]:
            threads += int(fields.get("Threads", "1"))
    return threads


def _cgroups(proc: Path, cgroup: Path) -> Iterator[Path]:
    """This process's cgroup (version 2) and its ancestors: each limits."""
    for line in _read(proc / "self/cgroup").splitlines():
        hierarchy, _, path = line.split(":", 2)
        if hierarchy == "0":
            directory = cgroup / path.lstrip("/")
            yield directory
            yield from (parent for parent in directory.parents if parent.is_relative_to(cgroup))


def _number(path: Path) -> int | None:
    """A file's number; None where there is no file or no limit ("max")."""
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
