"""One line of a trace as text: which task, on which CPU, when, and the event.

The tools print the same events in dialects of their own:

    qemu-8397    [002] d..1.  1404.389366: kvm_exit: vcpu 1 ...       ftrace; 4 or 5 flags, by kernel
    CPU 0/KVM-7289 (  7200) [023] d....  2925.640961: kvm_entry: ...  with the option record-tgid
    CPU-2386625 [094] 6598425.465404: kvm_entry:            vcpu 1    trace-cmd report; no flags
    qemu-8397      2d..1. 1404.389366: kvm_exit: ...                  both, latency format
    fc_vcpu 1  599500 [039] 1377662.550600: kvm:kvm_entry:  vcpu 1    perf script
    qemu-8397    [002] d..1.  1404.389366: kvm_mmu_load <-vcpu_run    ftrace's function tracer

A task's name may have blanks, slashes, dashes and digits.  A line that is none of these is `Other`: a tool's
heading, a stack, a program's output.  Lines that tell of lost events are counted, because a trace with a gap
proves no absence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

# A longer line is a file of another kind.
MAX_LINE: Final = 1 << 16

_TIME: Final = r"(?P<s>\d+)\.(?P<f>\d{6,9}):\s+"
# irqs-off, need-resched, hardirq/softirq, preempt-depth, and since 5.14 migrate-disable.
_FLAGS: Final = r"[A-Za-z.]{3}[0-9a-f.]{1,2}"
_DASHED: Final = re.compile(
    r"\s*(?P<comm>.{1,24}?)-(?P<tid>\d+)\s+"
    rf"(?:\(\s*(?P<tgid>\d+|-+)\)\s+)?(?:{_FLAGS}\s+)?\[(?P<cpu>\d+)\]\s+(?:{_FLAGS}\s+)?{_TIME}(?P<rest>.*)"
)
_LATENCY: Final = re.compile(
    rf"\s*(?P<comm>.{{1,24}}?)-(?P<tid>\d+)\s+(?P<cpu>\d+){_FLAGS}\s+{_TIME}(?P<rest>.*)"
)
_PERF: Final = re.compile(
    r"\s*(?P<comm>\S.{0,23}?)\s+(?:(?P<tgid>\d+)/)?(?P<tid>\d+)\s+"
    rf"(?:{_FLAGS}\s+)?\[(?P<cpu>\d+)\]\s+(?:{_FLAGS}\s+)?{_TIME}(?:\d+\s+)?(?P<rest>.*)"
)
_EVENT: Final = re.compile(r"(?:(?P<system>[\w-]+):)?(?P<name>[\w.-]+):\s*(?P<fields>.*)")
_CALL: Final = re.compile(r"(?P<name>[\w.]+) <-(?P<caller>[\w.]+)")
# bpftrace's printf, perhaps through `uniq -c`: no task and no time.
_PAIRS: Final = re.compile(r"\s*(?:(?P<times>\d+)\s+)?(?P<name>\S+)\s+(?P<fields>\w+=\S+(?:\s+\w+=\S+)+)\s*")
_LOST: Final = re.compile(r"\[LOST (?P<n>\d+) EVENTS\]|LOST (?P<m>\d+) events!|(?P<some>\[LOST EVENTS\])")


class Dialect(StrEnum):
    DASHED = "ftrace or trace-cmd"
    LATENCY = "latency format"
    PERF = "perf script"
    PAIRS = "bpftrace"


class Event(NamedTuple):
    """An event of the trace.

    `time` is in nanoseconds of the trace's clock, -1 where the line has none, as are `tid` and `cpu` then.
    `tgid` is the process, -1 if the trace does not tell.  `times`: the number of events for which the line
    stands.  `caller` is set for a call seen by the function tracer.
    """

    comm: str
    tid: int
    tgid: int
    cpu: int
    time: int
    name: str
    fields: str
    caller: str = ""
    times: int = 1


@dataclass
class Reading:
    """Sums of the lines that were read: events, lines that are none, and the events that were lost."""

    lines: int = 0
    events: int = 0
    other: int = 0
    lost: int = 0
    lost_unknown: bool = False
    first_other: list[str] = field(default_factory=list)
    dialects: dict[Dialect, int] = field(default_factory=dict)

    def note_other(self, line: str) -> None:
        if found := _LOST.search(line):
            self.lost += int(found["n"] or found["m"] or 0)
            self.lost_unknown |= found["some"] is not None
        elif line.strip() and not line.startswith("#"):
            self.other += 1
            if len(self.first_other) < _SHOWN:
                self.first_other.append(line.rstrip()[:MAX_LINE])


_SHOWN: Final = 3


def events(lines: Iterable[str], reading: Reading) -> Iterator[Event]:
    """Yield the events of the lines; add what was read to `reading`."""
    known: list[tuple[Dialect, re.Pattern[str]]] = [
        (Dialect.DASHED, _DASHED),
        (Dialect.LATENCY, _LATENCY),
        (Dialect.PERF, _PERF),
    ]
    for line in lines:
        reading.lines += 1
        for place, (form, pattern) in enumerate(known):
            if (head := pattern.match(line)) is not None:
                dialect, event = form, _event(head)
                if place:
                    # A file is in one dialect as a rule: try that one first.
                    known.insert(0, known.pop(place))
                break
        else:
            dialect, event = Dialect.PAIRS, _pairs(line)
        if event is None:
            reading.note_other(line)
            continue
        reading.events += 1
        reading.dialects[dialect] = reading.dialects.get(dialect, 0) + 1
        yield event


def _event(head: re.Match[str]) -> Event | None:
    rest = head["rest"]
    caller = ""
    if (what := _EVENT.match(rest)) is not None:
        name, fields = what["name"], what["fields"]
    elif (call := _CALL.match(rest)) is not None:
        name, fields, caller = call["name"], "", call["caller"]
    else:
        return None
    groups = head.groupdict()
    tgid = groups.get("tgid")
    time = int(head["s"]) * 1_000_000_000 + int(head["f"].ljust(9, "0"))
    process = int(tgid) if tgid is not None and tgid.isdigit() else -1
    return Event(head["comm"], int(head["tid"]), process, int(head["cpu"]), time, name, fields, caller)


def _pairs(line: str) -> Event | None:
    found = _PAIRS.fullmatch(line.rstrip("\n"))
    if found is None:
        return None
    return Event("", -1, -1, -1, -1, found["name"], found["fields"], times=int(found["times"] or 1))
