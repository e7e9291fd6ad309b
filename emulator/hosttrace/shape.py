"""A scenario of the same shape as a traced host: as many vCPUs and CPUs, and the same rates of events.

The scenario is no replay: it has rates, not the order and the pages of the events.  Each assumption about
things that a trace does not show stands as a comment in the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from emulator.defaults import MAX_PCPUS
from emulator.errors import BadInput
from emulator.hosttrace.observed import Observed
from emulator.hosttrace.sums import Vcpu

# MiB of a VM of which a trace does not tell the size, and vCPUs that a VM can have.
_MEMORY: Final = 64
_MOST_VCPUS: Final = 1024
_MOST_PAGES: Final = 1 << 18
_MOST_RATE: Final = 1e6
_ACTORS: Final = 2


def scenario(name: str, observed: Observed) -> str:
    """Return the TOML text of a scenario; raise BadInput if the trace lacks vCPUs or times."""
    seconds = observed.seconds
    if not seconds:
        raise BadInput(
            name, "no times, or those of several recordings", "one recording with times, for its rates"
        )
    vms = _vms(observed)
    if not vms:
        raise BadInput(name, "no vCPU", "a trace with kvm_entry and kvm_exit, for its VMs")
    cpus = len(set().union(*(vcpu.cpus for vcpu in observed.vcpus.values())))
    lines = [
        f"# From {name}: {seconds:.6f} s of a real host.",
        'title = "A host of the shape of a trace"',
        'duration = "5s"',
        "",
        "[machine]",
        f"pcpus = {min(MAX_PCPUS, max(1, cpus))} # CPUs that ran a vCPU",
        *_vm_sections(vms, observed.has_processes),
        *_host(observed, seconds),
        *_kvm(observed, seconds),
        *_scheduler(observed, seconds),
        "",
        "[phases]",
        'storm = "1s"',
        'quiet = "0s" # rates as in the trace, all the time',
    ]
    return "\n".join(lines) + "\n"


def _vms(observed: Observed) -> list[int]:
    """Return the number of vCPUs of each VM."""
    vcpus = [vcpu for vcpu in observed.vcpus.values() if vcpu.entries or vcpu.exits]
    if observed.has_processes:
        return sorted(Counter(vcpu.tgid for vcpu in vcpus).values(), reverse=True)
    return _guessed(vcpus)


def _guessed(vcpus: list[Vcpu]) -> list[int]:
    """Return VMs' sizes from the vCPUs' numbers alone: two vCPUs of one number are of two VMs."""
    numbers = Counter(vcpu.number for vcpu in vcpus)
    return [sum(times > vm for times in numbers.values()) for vm in range(max(numbers.values(), default=0))]


def _vm_sections(vms: list[int], known: bool) -> Iterator[str]:
    if not known:
        yield ""
        yield "# The trace does not tell processes: vCPUs of one number are taken for those of different VMs."
    for vcpus, count in sorted(Counter(vms).items(), reverse=True):
        yield ""
        yield "[[vm]]"
        yield f"count = {count}"
        yield f"vcpus = {min(vcpus, _MOST_VCPUS)}"
        yield f"memory = {_MEMORY} # MiB; assumed"


def _rate(number: float, seconds: float) -> float:
    return round(min(number / seconds, _MOST_RATE), 3)


def _host(observed: Observed, seconds: float) -> Iterator[str]:
    ranges = sum(cause.ranges for cause in observed.causes.values())
    pages = sum(cause.pages for cause in observed.causes.values())
    ages = observed.kinds["kvm_age_hva"]
    unmaps = observed.kinds["kvm_unmap_hva_range"]
    yield ""
    yield "[host] # notifier ranges per second"
    yield f"actors = {_ACTORS if unmaps or ages else 0}"
    if unmaps:
        mean = max(1, min(_MOST_PAGES, round(pages / ranges))) if ranges else 1
        yield f"pages = {mean} # on average; a range does not tell its reason, so all unmap"
        yield f"unmap = {_rate(unmaps, seconds)}"
    if ages:
        yield f"age = {_rate(ages, seconds)}"


def _kvm(observed: Observed, seconds: float) -> Iterator[str]:
    yield ""
    yield "[kvm] # dirty logging leaves no event of its own, and is left out"
    yield f"memslot_cycles = {_rate(observed.kinds['kvm_mmu_zap_all_fast'], seconds)}"
    yield f"smis = {_rate(observed.smis, seconds)}"


def _scheduler(observed: Observed, seconds: float) -> Iterator[str]:
    moves = sum(vcpu.moves for vcpu in observed.vcpus.values())
    yield ""
    yield "[scheduler]"
    if moves:
        yield 'mode = "storm"'
        yield f"migrations = {_rate(moves, seconds)} # entries on another CPU"
    else:
        yield 'mode = "pin"'
