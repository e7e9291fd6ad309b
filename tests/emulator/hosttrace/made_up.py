"""Traces for the tests: a small host, written in each tool's form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from emulator.hosttrace.lines import Event, Reading, events
from emulator.hosttrace.observed import Observed


class Line(NamedTuple):
    """An event before a tool prints it.  `micros`: the time in microseconds."""

    comm: str
    tid: int
    cpu: int
    micros: int
    name: str
    fields: str

    @property
    def time(self) -> str:
        return f"{self.micros // 1_000_000}.{self.micros % 1_000_000:06d}"

    def ftrace(self, flags: str = "d..1.", tgid: str = "") -> str:
        process = f" ({tgid:>7})" if tgid else ""
        head = f"{self.comm:>16}-{self.tid:<7}{process} [{self.cpu:03d}] {flags} {self.time:>12}"
        return f"{head}: {self.name}: {self.fields}\n"

    def trace_cmd(self) -> str:
        name = f"{self.name}:"
        return f"{self.comm:>16}-{self.tid:<5} [{self.cpu:03d}] {self.time:>12}: {name:<20} {self.fields}\n"

    def latency(self) -> str:
        return f"{self.comm:>8}-{self.tid:<7} {self.cpu:>3}d..1. {self.time}: {self.name}: {self.fields}\n"

    def perf(self, tgid: str = "") -> str:
        thread = f"{tgid}/{self.tid}" if tgid else f"{self.tid}"
        return (
            f"{self.comm:>16} {thread:>7} [{self.cpu:03d}] {self.time:>12}: kvm:{self.name}: {self.fields}\n"
        )


def read(text: Iterable[str]) -> tuple[Reading, list[Event]]:
    reading = Reading()
    return reading, list(events(text, reading))


def observe(text: Iterable[str]) -> Observed:
    observed = Observed()
    for event in read(text)[1]:
        observed.add(event)
    return observed


def entry(tid: int, cpu: int, micros: int, vcpu: int = 0) -> Line:
    return Line("CPU 0/KVM", tid, cpu, micros, "kvm_entry", f"vcpu {vcpu}, rip 0x10041")


def leave(tid: int, cpu: int, micros: int, reason: str = "HLT", info: int = 0, rest: str = "") -> Line:
    fields = f"vcpu 0 reason {reason} rip 0x10041 info1 0x0000000000000000 info2 0x0000000000000000"
    return Line("CPU 0/KVM", tid, cpu, micros, "kvm_exit", f"{fields} intr_info {info:#010x}{rest}")


def unmap(tid: int, cpu: int, micros: int, start: int, end: int) -> Line:
    fields = f"mmu notifier unmap range: {start:#016x} -- {end:#016x}"
    return Line("numad", tid, cpu, micros, "kvm_unmap_hva_range", fields)


def probe(tid: int, cpu: int, micros: int, function: str, rest: str = "", offset: int = 4) -> Line:
    fields = f"({function}+{offset:#x}/0x50 [kvm]){rest}"
    return Line("numad", tid, cpu, micros, f"p_{function}_0", fields)


def spte(tid: int, cpu: int, micros: int, change: str) -> Line:
    return Line("numad", tid, cpu, micros, "kvm_tdp_mmu_spte_changed", f"as id 0 {change}")


def kick(tid: int, cpu: int, micros: int, mask: str) -> Line:
    fields = f"cpumask={mask} callsite=kvm_make_all_cpus_request+0xfd/0x140 [kvm] callback=0x0"
    return Line("numad", tid, cpu, micros, "ipi_send_cpumask", fields)
