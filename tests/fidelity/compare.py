"""Compare one operation's counts with the expectations of its line of ground_truth.toml."""

from __future__ import annotations

from math import ceil
from typing import Any

from .driver import Driver, VmCounts
from .lines import VCPU_KEYS, Expected, Line


def observed(counts: VmCounts) -> dict[str, Any]:
    """The counters under the fixture's names."""
    per_vcpu = {key: [getattr(vcpu, key) for vcpu in counts.vcpus] for key in VCPU_KEYS}
    return {
        "remote_tlb_flush_requests": counts.remote_tlb_flush_requests,
        "requests": {name: n for name, n in counts.requests.items() if n},
        **per_vcpu,
    }


def expected(line: Line, vcpus: int, result: int, counts: VmCounts) -> dict[str, Any]:
    """Compare as above, with the line's expectations of the VM that was operated on."""

    def number(value: Expected) -> Any:
        return result if value == "result" else value

    # A zap that yields flushes there too, and so do faults that meet; the vCPUs may merge those flushes.
    more = (counts.yields if line.yields else 0) + (counts.refaults if line.refaults else 0)
    requests = {name: number(n) for name, n in line.requests.items()}
    if more:
        requests["TLB_FLUSH"] = requests.get("TLB_FLUSH", 0) + more
    wanted: dict[str, Any] = {
        "remote_tlb_flush_requests": number(line.expect.get("remote_tlb_flush_requests", 0)) + more,
        "requests": requests,
    }
    for key in VCPU_KEYS:
        value = number(line.expect.get(key, 0))
        wanted[key] = value if isinstance(value, list) else [value] * vcpus
    if line.merged or more:
        for key in ("flush_all", "tlb_flush"):
            have = [getattr(vcpu, key) for vcpu in counts.vcpus]
            wanted[key] = accepted(line, have, wanted[key], more)
    return wanted


def accepted(line: Line, have: list[int], due: list[int], more: int) -> list[int]:
    """Return `have`, where requests may have met so that a vCPU flushed that often; `due` elsewhere."""
    least = [fewest(line, len(have), n) for n in due]
    wanted = [
        n if low <= n <= high + more else high + more for n, low, high in zip(have, least, due, strict=True)
    ]
    if line.at_once and not more and not any(n == low for n, low in zip(have, least, strict=True)):
        wanted[0] = least[0]
    return wanted


def fewest(line: Line, vcpus: int, due: int) -> int:
    """Return how few flushes of a vCPU may serve `due` requests.

    More vCPUs than recorded make more requests at once: twice as many may meet.
    """
    merged = line.merged if vcpus <= max(line.vcpus) else 2 * line.merged
    return max(1, ceil(due * (1 - merged)))


def compared(driver: Driver, line: Line, vcpus: int, preset: str) -> list[str]:
    """Run a line's operation on a machine of its own; return the problems."""
    vms = range(max(line.machine.vms, 1))
    with driver.boot(line.machine, vcpus, preset) as bench:
        for step in line.setup:
            bench.step(step)
            bench.settle()
        before = [bench.counts(vm) for vm in vms]
        result = bench.step(line.do)
        bench.settle()
        counts = [bench.counts(vm).since(before[vm]) for vm in vms]
    return problems(line, vcpus, result, counts)


def problems(line: Line, vcpus: int, result: int, counts: list[VmCounts]) -> list[str]:
    """Sentences, none if everything is as recorded. `counts` has every VM of the machine."""
    found = []
    if line.result is not None and result != line.result:
        found.append(f"precondition: {line.do} returned {result}, recorded {line.result}")
    if line.result_min is not None and result < line.result_min:
        found.append(f"precondition: {line.do} returned {result}, expected at least {line.result_min}")
    for vm, seen in enumerate(counts):
        nothing = {"remote_tlb_flush_requests": 0, "requests": {}, **{key: [0] * vcpus for key in VCPU_KEYS}}
        wanted = expected(line, vcpus, result, seen) if vm == line.vm else nothing
        have = observed(seen)
        found += [
            f"VM {vm} {key}: {have[key]}, recorded {wanted[key]}"
            for key in wanted
            if have[key] != wanted[key]
        ]
    if line.executes is not None and vcpus == 1:
        executed = {kind: n for kind, n in counts[line.vm].executed.items() if n}
        if executed != line.executes:
            found.append(f"VM {line.vm} executed: {executed}, recorded {line.executes}")
    return found
