"""The guests of a scenario: their memory, OSes, processes, and nested guests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import TYPE_CHECKING

from emulator.errors import BadInput
from emulator.kvm.structs import Vcpu, tdp_enabled
from emulator.machine.runtime import HPAGE_PMD_NR, Cpu
from emulator.scenario.config import PAGES_PER_MIB, Scenario
from emulator.scenario.sections import NestedSection, VmSection
from emulator.traces import Trace, TraceError
from emulator.traces import embedded as embedded_traces
from emulator.traces import load as load_trace
from native import ffi, lib

if TYPE_CHECKING:
    from native._native import U64

# The slot that is deleted and created again: this many pages per vCPU.
SECOND_SLOT_PAGES = 256
# Pages that an SMI handler looks at.
SMI_PAGES = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """Guest-physical memory of a VM, in pages: RAM from 0 on, then the second slot, 2 MiB aligned.

    Each guest OS of the VM, nested ones included, hands out its own pages of both, but the pages of different
    OSes lie side by side.  So they share EPT tables, as in an SMP guest, and a change in a table concerns
    entries that other vCPUs have cached.  If L1 virtualizes APIC accesses, the last page of RAM is none of
    theirs.
    """

    ram: int
    second: int
    oses: int
    virtualizes_apic: bool

    @property
    def second_base(self) -> int:
        return -(-self.ram // HPAGE_PMD_NR) * HPAGE_PMD_NR

    @property
    def gfns(self) -> int:
        return -(-(self.second_base + self.second) // HPAGE_PMD_NR) * HPAGE_PMD_NR

    @property
    def end(self) -> int:
        """Return the end of the RAM that the OSes hand out."""
        return self.ram - self.virtualizes_apic

    @property
    def apic_gfn(self) -> int:
        return self.end if self.virtualizes_apic else 0


def layout_of(vm: VmSection) -> Layout:
    """Return a VM's layout.  Only a disturbed VM has a second slot: no ioctl deletes a slot of other VMs."""
    second = SECOND_SLOT_PAGES * vm.vcpus if vm.disturbed else 0
    oses = vm.vcpus * (1 + vm.nested.guests if vm.nested is not None else 1)
    virtualizes_apic = vm.nested is not None and vm.nested.virtualize_apic
    return Layout(vm.memory * PAGES_PER_MIB, second, oses, virtualizes_apic)


class Guests:
    """Gives new vCPUs their guests.  The guests replay its arrays, so it must live as long as the machine."""

    def __init__(self, scenario: Scenario, rng: Random) -> None:
        self._scenario = scenario
        self._rng = rng
        self._traces: dict[tuple[str, int], Trace] = {}
        self._handlers: dict[tuple[int, ...], tuple[U64, int]] = {}
        # Those of the last vCPU; the next one runs them as well if the VM has threads.
        self._processes: list[Trace] = []

    def furnish(self, cpu: Cpu, vcpu: Vcpu, section: VmSection, traces: Iterator[Trace]) -> None:
        """Give a vCPU its guest OS, processes, each of which runs the next trace, and nested guests."""
        layout, kvm = layout_of(section), vcpu.kvm
        first = kvm.vcpus[0] is vcpu
        threads = section.threads and not tdp_enabled(kvm)
        if first or not threads:
            self._processes = list(islice(traces, section.processes))
        i = 0 if threads else kvm.vcpus.index(vcpu)
        self._configure(cpu, vcpu, section, layout, i)
        if threads and not first:
            lib.guest_run_threads(cpu.m, vcpu.id, kvm.vcpus[0].id)
        if section.disturbed and self._scenario.kvm.smis:
            lib.guest_set_smi_handler(cpu.m, vcpu.id, *self._smi_handler(layout, self._processes))
        if section.nested is not None:
            self._nest(cpu, vcpu, section, section.nested)

    def _configure(self, cpu: Cpu, vcpu: Vcpu, section: VmSection, layout: Layout, phase: int) -> None:
        """Configure the guest that is chosen, and its processes."""
        config = ffi.new(
            "struct guest_config *",
            {
                "first_gfn": 0,
                "end_gfn": layout.end,
                "stride": 0 if section.threads and not self._scenario.machine.ept else layout.oses,
                "phase": phase,
                "mmio_gfn": layout.second_base,
                "mmio_end_gfn": layout.second_base + layout.second,
                "switch_every": section.switch_every,
                "unmap_every": section.unmap_every,
                "protect_every": section.protect_every,
                "table_every": section.table_every,
                "wp_every": section.wp_every,
                "pg_every": 0 if section.pcid else section.pg_every,
                "smep_every": section.smep_every,
                "pcide_every": section.pcide_every if section.pcid else 0,
                "window_work": section.window_work and not section.flush_batch,
                "hugepages": section.guest_huge_pages,
                "share_blocks": section.guest_huge_pages and section.shared_huge_pages,
                "pcid": section.pcid,
                "paging": 1,
                "batch": section.flush_batch,
                "interrupts_off": section.interrupts_off,
                "own_kernel": section.own_kernel_tables,
                "file_pages": section.file_pages,
                "halt_every": section.halt_every,
                "halt_us": 0 if section.halt_exits else max(1, int(section.halt * 1e6)),
                "seed": self._rng.getrandbits(31),
            },
        )
        nested = section.nested
        if nested is not None:
            # L1's OS: it has a hypervisor, which runs when L1 has handled an exit.
            config.transition_every = nested.handle
            if lib.vcpu_guest_mode(cpu.m, vcpu.id):
                # L1 takes its HLTs, and maps no device's memory for it.
                config.halt_every = config.mmio_gfn = config.mmio_end_gfn = 0
                config.transition_every, config.tick_every = nested.exit_every, nested.tick_every
        cpu.check(lib.guest_configure(cpu.m, vcpu.id, config))
        for trace in self._processes:
            records = ffi.from_buffer("uint64_t[]", trace.records)
            pages = ffi.from_buffer("uint64_t[]", trace.pages)
            cpu.check(
                lib.guest_add_process(cpu.m, vcpu.id, records, len(trace.records), pages, len(trace.pages))
            )

    def _nest(self, cpu: Cpu, vcpu: Vcpu, section: VmSection, nested: NestedSection) -> None:
        """Give a vCPU its nested guests, and L1 the hypervisor that runs them."""
        layout = layout_of(section)
        before = section.vcpus + vcpu.kvm.vcpus.index(vcpu) * nested.guests
        for number in range(1, nested.guests + 1):
            cpu.check(lib.guest_create_nested(cpu.m, vcpu.id, number))
            lib.vcpu_set_guest_mode(cpu.m, vcpu.id, number)
            self._configure(cpu, vcpu, section, layout, before + number - 1)
            if not tdp_enabled(vcpu.kvm):
                # KVM enters it with the registers after power-up (first_guest_state()).
                lib.guest_power_on(cpu.m, vcpu.id)
        lib.vcpu_set_guest_mode(cpu.m, vcpu.id, 0)
        config = {
            "guests": nested.guests,
            "vpid": nested.vpid,
            "ept": nested.ept,
            "ad": nested.accessed_dirty,
            "apic_gfn": layout.apic_gfn,
            "switch_every": nested.switch_every,
            "vpid_every": nested.vpid_every,
            "invvpid_every": nested.invvpid_every,
            "unmap_every": nested.unmap_every,
            "eptp_every": nested.eptp_every,
            "vmxoff_every": nested.vmxoff_every,
        }
        cpu.check(lib.guest_hypervise(cpu.m, vcpu.id, ffi.new("struct hypervisor_config *", config)))

    def _smi_handler(self, layout: Layout, processes: list[Trace]) -> tuple[U64, int]:
        """Return the SMI handler's accesses.  It runs without paging, and reads pages all over the guest's
        RAM without writing any.

        The first pages have numbers that the processes use for linear pages, too: a translation of a linear
        page must not serve an access to the physical page of the same number.
        """
        linear = sorted({int(page) for trace in processes for page in trace.pages if page < layout.ram})
        pages = linear[:SMI_PAGES] + list(range(0, layout.ram, max(1, layout.ram // SMI_PAGES)))
        if (key := tuple(pages)) not in self._handlers:
            gpas = [page << 12 | page % 64 * 8 for page in pages]
            self._handlers[key] = ffi.new("uint64_t[]", gpas), len(gpas)
        return self._handlers[key]

    def traces_of(self, section: VmSection) -> list[Trace]:
        """Return the traces of a VM's section, which its vCPUs' processes take in turn."""
        names = section.traces or tuple(info.name for info in embedded_traces())
        return [self._trace(name, section.records) for name in names]

    def _trace(self, name: str, records: int) -> Trace:
        if (name, records) not in self._traces:
            path = self._scenario.directory / name
            try:
                trace = load_trace(path if path.suffix else name)
            except TraceError as error:
                raise BadInput(f"{self._scenario.name}: vm.traces", str(error)) from error
            self._traces[name, records] = trace.first(records) if records else trace
        return self._traces[name, records]
