"""A made-up recording of a host, with the probes that tell KVM's own counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from emulator.hosttrace.builder import Builder
from emulator.hosttrace.workload import Workload
from tests.emulator.hosttrace.made_up import Line, entry, observe, probe, read, spte, unmap

# SPTE_MMU_PRESENT_MASK with read, write and execute permission, without and with its write permission.
PRESENT, READ_ONLY = 0x60000000_01000BF7, 0x60000000_01000BF5
# A table's entry: as PRESENT, without PT_PAGE_SIZE_MASK.
TABLE = 0x60000000_01000827
TASKS = (100, 101)  # of the vCPUs
HOST = 50


class _Call(Line):
    """A call, with the caller as `fields`."""

    def ftrace(self, flags: str = "d..1.", tgid: str = "") -> str:
        return super().ftrace(flags, tgid).replace(f"{self.name}: ", f"{self.name} <-")


@dataclass
class Recording:
    """Lines of a trace, in order: each method adds an operation with the calls that KVM makes for it."""

    def __post_init__(self) -> None:
        self.lines: list[Line] = []
        self.micros = 1000
        self.cpu = {task: i + 1 for i, task in enumerate(TASKS)}

    def tick(self, micros: int = 10) -> int:
        self.micros += micros
        return self.micros

    def enter(self, vcpu: int, cpu: int | None = None) -> None:
        task = TASKS[vcpu]
        if cpu is not None and cpu != self.cpu[task]:
            self.cpu[task] = cpu
            self.lines.append(probe(task, cpu, self.tick(), "vmx_flush_tlb_all"))
        self.lines.append(entry(task, self.cpu[task], self.tick(), vcpu))

    def write(self, vcpu: int, gfn: int) -> None:
        task = TASKS[vcpu]
        fields = f"vcpu {vcpu} rip 0x10021 address {gfn << 12:#018x} error_code 0x182"
        self.lines.append(Line("CPU 0/KVM", task, self.cpu[task], self.tick(), "kvm_page_fault", fields))
        self.spte(task, gfn, 0, PRESENT)
        self.lines.append(entry(task, self.cpu[task], self.tick(), vcpu))

    def spte(self, task: int, gfn: int, old: int, new: int, level: int = 1) -> None:
        change = f"gfn {gfn:x} level {level} old_spte {old:x} new_spte {new:x}"
        self.lines.append(spte(task, self.cpu.get(task, 0), self.tick(), change))

    def event(self, vcpu: int, name: str, fields: str) -> None:
        task = TASKS[vcpu]
        self.lines.append(Line("CPU 0/KVM", task, self.cpu[task], self.tick(), name, fields))

    def call(self, vcpu: int, function: str, caller: str) -> None:
        """Add a line of the function tracer."""
        task = TASKS[vcpu]
        self.lines.append(_Call("CPU 0/KVM", task, self.cpu[task], self.tick(), function, caller))

    def probe(self, vcpu: int, function: str, rest: str = "") -> None:
        task = TASKS[vcpu]
        self.lines.append(probe(task, self.cpu[task], self.tick(), function, rest))

    def write_cr(self, vcpu: int, register: int, value: int) -> None:
        self.event(vcpu, "kvm_cr", f"cr_write {register} = {value:#x}")

    def flush(self, request: str = "req=0x300", function: str = "vmx_flush_tlb_all") -> None:
        """Add a request to all vCPUs, and their entries, at which they serve it."""
        if function == "vmx_flush_tlb_all":
            self.lines.append(probe(HOST, 0, self.tick(), "kvm_flush_remote_tlbs"))
        self.lines.append(probe(HOST, 0, self.tick(), "kvm_make_all_cpus_request", f" {request}"))
        for vcpu, task in enumerate(TASKS):
            if function == "vmx_flush_tlb_current":
                self.lines.append(probe(task, self.cpu[task], self.tick(), "kvm_mmu_load"))
            self.lines.append(probe(task, self.cpu[task], self.tick(), function))
            self.enter(vcpu)

    def unmap(self, first: int, mapped: int, pages: int = 256) -> None:
        """Add a notifier's range of which so many pages are mapped; without any KVM does not flush."""
        self.lines.append(unmap(HOST, 0, self.tick(), 0x7F00_0000_0000, 0x7F00_0000_0000 + (pages << 12)))
        for gfn in range(first, first + mapped):
            self.spte(HOST, gfn, PRESENT, 0)
        if mapped:
            self.flush()

    def log(self, gfns: range) -> None:
        self.tick(20_000)
        for gfn in gfns:
            self.spte(HOST, gfn, PRESENT, READ_ONLY)
        self.flush()

    def delete_slot(self, gfns: range) -> None:
        self.lines.append(Line("qemu", HOST, 0, self.tick(), "kvm_mmu_zap_all_fast", "kvm-mmu-valid-gen 0"))
        self.flush("req=0x327", "vmx_flush_tlb_current")
        for gfn in gfns:
            self.spte(HOST, gfn, PRESENT, 0)

    def text(self) -> Iterator[str]:
        return (line.ftrace() for line in self.lines)


def whole() -> Recording:
    """Return a recording with each kind of event."""
    recording = Recording()
    for vcpu in range(2):
        recording.enter(vcpu)
    for gfn in range(0x10000, 0x10010):
        recording.write(gfn % 2, gfn)
    recording.unmap(0x10000, 16)
    recording.unmap(0x20000, 0)  # nothing was mapped there
    for gfn in range(0x10000, 0x10008):
        recording.write(0, gfn)
    recording.unmap(0x30000, 3)  # mapped before the recording began
    for cpu in (3, 1, 3):
        recording.enter(0, cpu)
    recording.log(range(0x10000, 0x10008))
    recording.write(1, 0x10003)
    recording.log(range(0x10003, 0x10004))
    recording.delete_slot(range(0x10000, 0x10008))
    recording.write(0, 0x10000)
    return recording


def workload_of(recording: Recording) -> Workload:
    builder = Builder()
    for event in read(recording.text())[1]:
        builder.add(event)
    return builder.workload("made up", observe(recording.text()))
