"""Numbers the pages, CPUs and vCPUs of a trace for its workload: from 0 on, in their order, without gaps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from emulator.hosttrace.pages import Pages
from emulator.hosttrace.vms import Vms
from emulator.hosttrace.workload import BLOCK, PLACING, VERBS, Step, Workload

_BITS: Final = "cr4"


def numbered(
    source: str,
    steps: list[Step],
    vms: Vms,
    pages: Mapping[int, Pages],
    new: Iterable[tuple[int, int]],
    without_pge: Iterable[tuple[int, int]],
) -> Workload:
    """Return a workload of the steps, which get their numbers; pages are numbered by blocks of 2 MiB."""
    every = range(len(vms.numbers))
    of_vm = [pages[vm] if vm in pages else Pages() for vm in every]
    order = [_order(of_vm[vm], [step for step in steps if step.vm == vm]) for vm in every]
    numbers = [sorted(found) for found in vms.numbers]
    cpus = sorted({step.start for step in steps if step.verb in PLACING})

    def page(vm: int, number: int) -> int:
        return order[vm][number // BLOCK] * BLOCK + number % BLOCK

    for step in steps:
        step.vcpu = numbers[step.vm].index(step.vcpu) if step.vcpu >= 0 else -1
        if step.verb in PLACING:
            step.start = cpus.index(step.start)
        elif _has_page(step):
            step.end = page(step.vm, step.end - 1) + 1 if step.end >= 0 else -1
            step.start = page(step.vm, step.start)
    return Workload(
        source=source,
        pcpus=max(len(cpus), 1),
        vms=[max(len(found), 1) for found in vms.numbers],
        pages=[max(len(found), 1) * BLOCK for found in order],
        mapped=[sorted(page(vm, number) for number in of_vm[vm].before) for vm in every],
        huge=[(vm, page(vm, first)) for vm in every for first in sorted(of_vm[vm].huge_before)],
        new=sorted((vm, numbers[vm].index(number)) for vm, number in new),
        without_pge=sorted((vm, numbers[vm].index(number)) for vm, number in without_pge),
        steps=steps,
    )


def _has_page(step: Step) -> bool:
    return bool(VERBS[step.verb][0]) and step.verb not in PLACING and step.verb != _BITS


def _order(pages: Pages, steps: list[Step]) -> dict[int, int]:
    """Return the numbers of a VM's blocks."""
    found = {number // BLOCK for number in pages.before}
    for step in steps:
        if _has_page(step):
            found.add(step.start // BLOCK)
            if step.end >= 0:
                found.add((step.end - 1) // BLOCK)
    return dict(zip(sorted(found), range(len(found)), strict=True))
