"""Preflight: does this machine have the memory and the threads that a scenario needs?

The check runs before any thread is started.  Without it a scenario that is too large would die half way, of
"can't start new thread" or by the OOM killer; the check's error is one line with the largest pCPU count that
would work.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emulator.errors import BadInput
from emulator.scenario.config import Scenario

MIB = 1 << 20

# Per pCPU: TLB and ghosts, counters, event ring, call nodes, and the touched part of a thread's stack.
_PCPU_BYTES = 1 * MIB
# The interpreter with its libraries, and the decoded traces.
_BASE_BYTES = 192 * MIB
# By cgroup version: the files of limit and usage, and the key of the usage that the kernel can reclaim.
_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
# Threads left to other programs on the machine.
_RESERVED_THREADS = 32


@dataclass(frozen=True, slots=True)
class Limit:
    """An amount of memory or threads that is left, and the source of this figure."""

    left: int
    source: str
    # The limit is on address space, whether memory is behind it or not.
    addresses: bool = False


def check(scenario: Scenario, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> None:
    """Raise BadInput unless the scenario fits this machine."""
    _check_memory(scenario, proc, cgroup)
    _check_threads(scenario, proc, cgroup)


def memory_needed(scenario: Scenario) -> int:
    """Return a generous estimate in bytes.  If the host collapses huge pages, all guest pages may be mapped
    singly while the blocks for huge pages are allocated as well."""
    pcpus = scenario.machine.pcpus
    frames = 2 if scenario.host.collapse else 1
    # From its first broadcast on, a sender owns a call node, one cache line, for each target.
    call_nodes = 64 * pcpus * min(pcpus, scenario.threads)
    return _BASE_BYTES + frames * 4096 * scenario.guest_pages + pcpus * _PCPU_BYTES + call_nodes


def _check_memory(scenario: Scenario, proc: Path, cgroup: Path) -> None:
    limits = [(limit, _needed(scenario, limit)) for limit in _memory_limits(proc, cgroup)]
    limit, needed = min(limits, key=lambda pair: pair[0].left - pair[1], default=(None, 0))
    if limit is None or needed <= limit.left:
        return
    raise BadInput(
        scenario.name,
        f"{scenario.vms} VMs with {scenario.guest_pages // 256} MiB and {scenario.machine.pcpus} pCPUs need "
        f"about {needed // MIB} MiB",
        f"at most the {max(limit.left, 0) // MIB} MiB left ({limit.source}): lower vm.memory or "
        "machine.pcpus",
    )


def _needed(scenario: Scenario, limit: Limit) -> int:
    stacks = scenario.threads * _stack_bytes() if limit.addresses else 0
    return memory_needed(scenario) + stacks


def _stack_bytes() -> int:
    """Return the size of one thread's stack and guard page in the address space (pthread_create(3))."""
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    default = 2 * MIB if soft == resource.RLIM_INFINITY else soft
    return (threading.stack_size() or default) + resource.getpagesize()


def exhausted(error: BaseException) -> BadInput | None:
    """Return the line for an error that comes of too little memory or too few threads; None for any other.

    Such errors occur in spite of the preflight: it estimates, other programs take memory and threads after
    it, and `litmus` and `explore` do without it because they need little.
    """
    found, seen = None, error
    while found is None:
        if isinstance(seen, MemoryError):
            found = f"no memory is left: {seen}" if str(seen) else "no memory is left"
        elif isinstance(seen, RuntimeError) and "can't start new thread" in str(seen):
            found = "no thread can be started"
        elif seen.__cause__ is None:
            return None
        else:
            seen = seen.__cause__
    limits = ", ".join(_soft_limits())
    return BadInput("this machine", found, "more memory and threads" + (f" than {limits}" if limits else ""))


def _soft_limits() -> Iterator[str]:
    """Yield the limits that are set, as ulimit writes them."""
    for name, number, unit in (
        ("-v", resource.RLIMIT_AS, 1024),
        ("-d", resource.RLIMIT_DATA, 1024),
        ("-u", resource.RLIMIT_NPROC, 1),
    ):
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY and not (name == "-u" and os.geteuid() == 0):
            yield f"ulimit {name} {soft // unit}"


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
    for directory, version in _cgroups(proc, cgroup, "memory"):
        most_file, used_file, cache = _MEMORY_FILES[version]
        most, used = _number(directory / most_file), _number(directory / used_file)
        if most is not None and used is not None:
            # The kernel reclaims inactive page cache before it kills.
            used -= _stat(directory / "memory.stat").get(cache, 0)
            yield Limit(most - used, f"cgroup {directory.name or '/'} {most_file}")
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        pages = _read(proc / "self/statm").split()
        used_bytes = int(pages[0]) * resource.getpagesize() if pages else 0
        yield Limit(soft - used_bytes, "ulimit -v", addresses=True)


def _thread_limits(proc: Path, cgroup: Path) -> Iterator[Limit]:
    running = _read(proc / "loadavg").split()
    most = _number(proc / "sys/kernel/threads-max")
    if most is not None and len(running) > 3:
        yield Limit(most - int(running[3].split("/")[1]), "kernel.threads-max")
    for directory, _ in _cgroups(proc, cgroup, "pids"):
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


def _cgroups(proc: Path, cgroup: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Yield this process's cgroup for a controller and its ancestors, with their version.

    Each of them may limit the process.  Version 2 has one hierarchy; version 1 has one for each controller,
    mounted under the controller's name.
    """
    for line in _read(proc / "self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            root, version = cgroup, 2
        elif controller in controllers.split(","):
            root, version = cgroup / controller, 1
        else:
            continue
        # In a container the path may be the host's, which does not exist below the mount.  The mount's root
        # is the container's own cgroup then.
        directory = root / path.lstrip("/")
        yield directory, version
        yield from ((parent, version) for parent in directory.parents if parent.is_relative_to(root))


def _stat(path: Path) -> dict[str, int]:
    fields = (line.split() for line in _read(path).splitlines())
    return {words[0]: int(words[1]) for words in fields if len(words) == 2 and words[1].isdigit()}


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is no file or no limit ("max")."""
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
