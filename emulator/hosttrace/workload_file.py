"""The file of a workload: text with a head, and then a line for each event.

    flushlab-workload 3
    source kvm.trace
    pcpus 3
    vm 0 vcpus 2 pages 1024
    mapped 0 0x0 0x100
    huge 0 0x200
    new 0.1
    without-pge 0.0
    memslot 0 0x100000 0x80000 0x7f589c000000 3
    recorded remote_tlb_flush_requests 16
    left-out 12 zapped SPTEs outside of a notifier's range
    0 enter 0.0 1
    571 write 0.0 0x1be
    620 unmap 0 0x100 0x200

An event's line has the microseconds since the recording began, a verb, the VM or VM.VCPU, and arguments:
`enter` CPU; `stay` CPU, for a vCPU that stays in guest mode from now on, and `leave`, which ends that;
`resume`, which brings the vCPUs into guest mode again that kicks have made leave it; `read` and `write` PAGE;
`huge` PAGE, which the host backs by a huge page from now on; `unmap` START END; `cr4` BITS, which the guest
changes in CR4; `smi`, `rsm`; `log`, which arms the dirty log the first time, and reads it later; `zap-all`;
`recover` START END, blocks that KVM zaps so that huge pages can map them again; `vmrun`, by which a vCPU runs
a nested guest on SVM, and `vmexit`, by which it runs L1 again.
`mapped` has pages that were mapped when the recording began, `huge` in the head a block that a huge page
backed then, `new` a vCPU that had not run by then, and `without-pge` a vCPU whose guest has CR4.PGE clear.
`memslot` VM GFN PAGES HVA RANGES tells the rule by which addresses became pages, for readers: the pages are
numbered as on the host, and RANGES is the number of ranges that it was inferred from, 0 if it was given.
Lines that begin with # are comments.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Final

from emulator.errors import BadInput, shown
from emulator.hosttrace.memslots import Memslot
from emulator.hosttrace.workload import BLOCK, RECORDED, VERBS, Step, Workload
from emulator.kvm.kvm_host import KVM_MMU_CR4_ROLE_BITS
from emulator.validation import read_text

MAGIC: Final = "flushlab-workload"
VERSION: Final = 3
# Version 1 lacks `stay`, `leave`, `resume` and `memslot`, version 2 `recover` and `without-pge`.
_READ: Final = ([MAGIC, "1"], [MAGIC, "2"], [MAGIC, str(VERSION)])
_MOST: Final = 1 << 30
# The most pCPUs that an emulated machine can have.
MOST_PCPUS: Final = 1024
MOST_VCPUS: Final = 1024
MOST_PAGES: Final = 1 << 21


def text_of(workload: Workload) -> str:
    """Return the text of a workload's file."""
    return "\n".join(_lines(workload)) + "\n"


def _lines(workload: Workload) -> Iterator[str]:
    yield f"{MAGIC} {VERSION}"
    yield f"source {' '.join(workload.source.split()) or '-'}"
    yield f"pcpus {workload.pcpus}"
    for vm, (vcpus, pages) in enumerate(zip(workload.vms, workload.pages, strict=True)):
        yield f"vm {vm} vcpus {vcpus} pages {pages}"
    for vm, mapped in enumerate(workload.mapped):
        for start, end in _ranges(mapped):
            yield f"mapped {vm} {start:#x} {end:#x}"
    for vm, page in workload.huge:
        yield f"huge {vm} {page:#x}"
    for vm, vcpu in workload.new:
        yield f"new {vm}.{vcpu}"
    for vm, vcpu in workload.without_pge:
        yield f"without-pge {vm}.{vcpu}"
    for slot in workload.memslots:
        yield f"memslot {slot.vm} {slot.gfn:#x} {slot.pages:#x} {slot.hva:#x} {slot.ranges}"
    for name, count in workload.recorded.items():
        yield f"recorded {name} {count}"
    for reason, count in workload.left_out.items():
        yield f"left-out {count} {reason}"
    for step in workload.steps:
        number, of_vcpu = VERBS[step.verb]
        who = f"{step.vm}.{step.vcpu}" if of_vcpu else str(step.vm)
        values = (step.start, step.end)[:number]
        shown_values = [str(value) if step.verb in ("enter", "stay") else f"{value:#x}" for value in values]
        yield " ".join([str(step.microseconds), step.verb, who, *shown_values])


def _ranges(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Yield sorted pages as ranges."""
    start = end = -1
    for page in pages:
        if page != end:
            if end >= 0:
                yield start, end
            start = page
        end = page + 1
    if end >= 0:
        yield start, end


def shipped_workloads() -> dict[str, Path]:
    """Return the workloads that ship with the package, by their names."""
    directory = Path(str(resources.files("emulator").joinpath("workloads")))
    return {path.name: path for path in sorted(directory.glob("*.workload"))}


def read_workload(path: Path) -> Workload:
    """Read a workload, or a shipped one by its name; raise BadInput, which names the line, if it is none."""
    if not path.exists():
        path = shipped_workloads().get(str(path), path)
    lines = read_text(path, "a workload of `flushlab import --workload`", _MOST).splitlines()
    if not lines or lines[0].split() not in _READ:
        found = shown(lines[0]) if lines else "an empty file"
        raise BadInput(f"{path}:1", f"found {found}", f"{MAGIC} {VERSION}")
    workload = Workload("-", 0, [], [], [], [])
    for number, line in enumerate(lines[1:], start=2):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            if words[0].isdecimal():
                workload.steps.append(_step(words, workload))
            else:
                _head(words, workload)
        except (ValueError, IndexError) as error:
            expected = str(error) if isinstance(error, _Unexpected) else "a line of a workload's file"
            raise BadInput(f"{path}:{number}", f"found {shown(line)}", expected) from error
    if not workload.pcpus or not workload.vms:
        raise BadInput(
            str(path), "no pcpus, or no vm", "lines such as 'pcpus 2' and 'vm 0 vcpus 1 pages 512'"
        )
    return workload


class _Unexpected(ValueError):
    """A value is out of its range; the text says what was expected."""


def _number(text: str, least: int, most: int, name: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise _Unexpected(f"a number for {name}") from None
    if not least <= value <= most:
        raise _Unexpected(f"{name} from {least} to {most}")
    return value


def _head(words: list[str], workload: Workload) -> None:
    match words:
        case ["source", *name]:
            workload.source = " ".join(name)
        case ["pcpus", number]:
            workload.pcpus = _number(number, 1, MOST_PCPUS, "pcpus")
        case ["vm", number, "vcpus", vcpus, "pages", pages]:
            _number(number, len(workload.vms), len(workload.vms), "the number of the VM")
            workload.vms.append(_number(vcpus, 1, MOST_VCPUS, "vcpus"))
            size = _number(pages, BLOCK, MOST_PAGES, "pages")
            if size % BLOCK:
                raise _Unexpected(f"pages in blocks of {BLOCK}")
            workload.pages.append(size)
            workload.mapped.append([])
        case ["mapped", number, start, end]:
            vm = _vm(number, workload)
            first = _number(start, 0, workload.pages[vm] - 1, "START")
            workload.mapped[vm].extend(range(first, _number(end, first + 1, workload.pages[vm], "END")))
        case ["huge", number, page]:
            vm = _vm(number, workload)
            workload.huge.append((vm, _block(_number(page, 0, workload.pages[vm] - 1, "PAGE"))))
        case ["new", vcpu]:
            workload.new.append(_vcpu(vcpu, workload))
        case ["without-pge", vcpu]:
            workload.without_pge.append(_vcpu(vcpu, workload))
        case ["memslot", number, gfn, pages, hva, ranges]:
            values = [_number(text, 0, (1 << 64) - 1, "memslot") for text in (gfn, pages, hva, ranges)]
            workload.memslots.append(Memslot(_vm(number, workload), *values))
        case ["recorded", name, count] if name in RECORDED:
            workload.recorded[name] = _number(count, 0, 1 << 62, "the count")
        case ["left-out", count, *reason]:
            workload.left_out[" ".join(reason)] = _number(count, 0, 1 << 62, "the count")
        case _:
            raise _Unexpected(
                "source, pcpus, vm, mapped, huge, new, without-pge, memslot, recorded, left-out,"
                " or an event's microseconds"
            )


def _block(page: int) -> int:
    if page % BLOCK:
        raise _Unexpected(f"a PAGE that is a multiple of {BLOCK:#x}")
    return page


def _vm(text: str, workload: Workload) -> int:
    return _number(text, 0, len(workload.vms) - 1, "the number of a VM above")


def _vcpu(text: str, workload: Workload) -> tuple[int, int]:
    first, dot, second = text.partition(".")
    if not dot:
        raise _Unexpected("VM.VCPU")
    vm = _vm(first, workload)
    return vm, _number(second, 0, workload.vms[vm] - 1, "the number of a vCPU of the VM")


def _step(words: list[str], workload: Workload) -> Step:
    verb = words[1]
    if verb not in VERBS:
        raise _Unexpected(f"one of {', '.join(VERBS)}")
    number, of_vcpu = VERBS[verb]
    if len(words) != 3 + number:
        raise _Unexpected(f"{verb} with {number} arguments behind the {'vCPU' if of_vcpu else 'VM'}")
    vm, vcpu = _vcpu(words[2], workload) if of_vcpu else (_vm(words[2], workload), -1)
    step = Step(_number(words[0], 0, 1 << 62, "microseconds"), verb, vm, vcpu)
    if number:
        most, name = {
            "enter": (workload.pcpus, "CPU"),
            "stay": (workload.pcpus, "CPU"),
            "cr4": (KVM_MMU_CR4_ROLE_BITS + 1, "BITS"),
        }.get(verb, (workload.pages[vm], "PAGE"))
        step.start = _number(words[3], 0, most - 1, name)
    if verb == "cr4" and step.start & ~KVM_MMU_CR4_ROLE_BITS:
        raise _Unexpected(f"BITS of {KVM_MMU_CR4_ROLE_BITS:#x}, which are part of a role")
    if verb == "huge":
        _block(step.start)
    if number == 2:
        step.end = _number(words[4], step.start + 1, workload.pages[vm], "END")
    if workload.steps and step.microseconds < workload.steps[-1].microseconds:
        raise _Unexpected("events in the order of their times")
    return step
