"""The sections of a scenario's file: the machine, its VMs, and the rates of operations on them.

Rates are per second and for the whole machine, over all actors, during storms; 0 is never.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from emulator.defaults import MAX_PCPUS
from emulator.scenario.delays import NamedDelay
from emulator.validation import Unit
from native import lib

_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h)?")
_MOST_DIGITS = 20
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}

# Ten years: beyond some centuries the C library's clocks overflow.
MAX_SECONDS = 10 * 365 * 24 * 3600.0
_LONGEST_HALT = 10.0
BUSY_PCPUS = 256
NESTED_GUESTS: int = lib.NESTED_GUESTS


def parse_duration(text: object) -> float:
    """Return the seconds in "500ms", "30s", "5m", "1h", or a bare number of seconds.

    >>> parse_duration("5m")
    300.0
    """
    # Compare a number before it is converted: Python refuses to write more than 4300 digits.
    number = isinstance(text, int | float) and not isinstance(text, bool) and text <= MAX_SECONDS
    match = _DURATION.fullmatch(str(text).strip()) if number or isinstance(text, str) else None
    if match is None or len(match["number"]) > _MOST_DIGITS:
        raise ValueError("a duration such as 500ms, 30s, 5m or 1h")
    seconds = float(match["number"]) * _SECONDS[match["unit"]]
    if seconds > MAX_SECONDS:
        raise ValueError(f"a duration of at most {MAX_SECONDS / 3600:.0f}h")
    return seconds


Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0), Unit("seconds")]
Rate = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, strict=True)]


# Operations that a scenario may be about: `compare` gives the cost of each policy per operation.
CostUnit = Literal[
    "migrations",
    "root allocations",
    "pages zapped",
    "SMIs",
    "remote flushes",
    "switches",
    "role windows",
    "round trips",
    "nested roots",
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Geometry(Section):
    """The TLB of each pCPU.  With 0 entries it is unbounded: nothing is ever evicted."""

    l2_entries: Annotated[int, Unit("entries")] = Field(default=1536, ge=0, le=1 << 22, strict=True)
    l2_ways: Annotated[int, Unit("ways")] = Field(default=12, ge=1, le=64, strict=True)
    psc_entries: Annotated[int, Unit("entries")] = Field(default=32, ge=0, le=1 << 16, strict=True)

    @model_validator(mode="after")
    def _whole_sets(self) -> Self:
        if self.l2_entries == 0:
            return self
        sets, rest = divmod(self.l2_entries, self.l2_ways)
        if rest or sets & (sets - 1):
            raise ValueError("l2_entries to be l2_ways times a power of two, or 0 for unbounded")
        return self

    @classmethod
    def unbounded(cls) -> Self:
        return cls(l2_entries=0, l2_ways=12, psc_entries=0)


class MachineSection(Section):
    pcpus: Annotated[int, Unit("pCPUs")] = Field(default=4, ge=1, le=MAX_PCPUS, strict=True)
    geometry: Geometry = Geometry()
    # kvm_intel.ept and kvm_intel.vpid: without EPT KVM shadows the guests' page tables; without VPIDs VM
    # entry and VM exit flush.
    ept: bool = True
    vpid: bool = True
    # The host is a guest of Hyper-V, which shadows KVM's EPTs and flushes them by hypercall.
    hyperv: bool = False
    # Delays at kinds of ordering points in KVM's code, such as "sptes read 2000" (microseconds, at most), as
    # if the host had preempted the thread there: half of the times.  `--chaos` delays at any point.
    delays: tuple[NamedDelay, ...] = ()

    @model_validator(mode="after")
    def _hyperv_with_ept(self) -> Self:
        if self.hyperv and not self.ept:
            raise ValueError("ept = true where hyperv = true: Hyper-V flushes EPTs")
        return self


class NestedSection(Section):
    """Nested guests (L2) of each vCPU: its guest OS (L1) is a hypervisor.

    They have the memory, traces and number of processes of the VM's section, as L1 has.  Rates are in exits
    of nested guests to L1 between two of each operation, on average; 0 is never.
    """

    guests: Annotated[int, Unit("nested guests")] = Field(default=1, ge=1, le=NESTED_GUESTS, strict=True)
    # Whether L1 gives them VPIDs, and EPTs, with accessed and dirty flags, and virtualizes their APIC
    # accesses.
    vpid: bool = True
    ept: bool = True
    accessed_dirty: bool = True
    virtualize_apic: bool = False
    # Accesses between two exits of a nested guest to L1, and of L1 until it enters a nested guest again.
    exit_every: Annotated[int, Unit("guest accesses")] = Field(default=20_000, ge=1, le=1 << 31, strict=True)
    handle: Annotated[int, Unit("guest accesses")] = Field(default=200, ge=1, le=1 << 31, strict=True)
    # Accesses between two exits of a nested guest that KVM handles itself (0: never).
    tick_every: Annotated[int, Unit("guest accesses")] = Field(default=0, ge=0, le=1 << 31, strict=True)
    # VMPTRLD of the VMCS of another nested guest, half of the times behind a VMCLEAR.
    switch_every: Annotated[int, Unit("exits")] = Field(default=0, ge=0, le=1 << 31, strict=True)
    # Another VPID for a nested guest, and INVVPID.
    vpid_every: Annotated[int, Unit("exits")] = Field(default=0, ge=0, le=1 << 31, strict=True)
    invvpid_every: Annotated[int, Unit("exits")] = Field(default=0, ge=0, le=1 << 31, strict=True)
    # Pages that L1 takes away in its EPT, then INVEPT; and another EPT for a nested guest.
    unmap_every: Annotated[int, Unit("exits")] = Field(default=0, ge=0, le=1 << 31, strict=True)
    eptp_every: Annotated[int, Unit("exits")] = Field(default=0, ge=0, le=1 << 31, strict=True)
    # VMXOFF, then VMXON.
    vmxoff_every: Annotated[int, Unit("exits")] = Field(default=0, ge=0, le=1 << 31, strict=True)


class VmSection(Section):
    """`count` VMs of this kind."""

    count: Annotated[int, Unit("VMs")] = Field(default=1, ge=1, le=MAX_PCPUS, strict=True)
    name: str = ""
    # Whether their number grows with the host (`--pcpus`).  The number of other VMs is fixed.
    grows: bool = True
    vcpus: Annotated[int, Unit("vCPUs")] = Field(default=1, ge=1, le=1024, strict=True)
    memory: Annotated[int, Unit("MiB")] = Field(default=64, ge=2, le=1 << 20, strict=True)
    # own: the VM has as many pCPUs as vCPUs.  No other VM runs on them, and its vCPUs do not leave them.
    placement: Literal["shared", "own"] = "shared"
    # Whether the host and KVM's ioctls act on it.
    disturbed: bool = True
    # Embedded names, or paths of .fltrace files beside the scenario. The vCPUs' guest processes take them
    # in turn. Empty: all embedded traces.
    traces: tuple[str, ...] = ()
    # Number of records of each trace that the guests run, from the first one on; 0: all.
    records: Annotated[int, Unit("records")] = Field(default=0, ge=0, strict=True)
    # Address spaces of each vCPU's guest OS.
    processes: Annotated[int, Unit("processes")] = Field(default=2, ge=1, le=64, strict=True)
    guest_huge_pages: bool = False
    # Whether the guest OS maps 2 MiB pages more than once, in one process or in several, each time with its
    # own rights.  Needs guest_huge_pages.
    shared_huge_pages: bool = False
    # Whether the guest OS uses PCIDs: without, each switch of address spaces flushes.
    pcid: bool = True
    # Accesses between two switches of address spaces (0: never).
    switch_every: Annotated[int, Unit("guest accesses")] = Field(
        default=200_000, ge=0, le=1 << 31, strict=True
    )
    # Accesses between two pages that the guest OS unmaps, and that it write-protects (0: never).
    unmap_every: Annotated[int, Unit("guest accesses")] = Field(default=20_000, ge=0, le=1 << 31, strict=True)
    protect_every: Annotated[int, Unit("guest accesses")] = Field(
        default=30_000, ge=0, le=1 << 31, strict=True
    )
    # Accesses between two page tables that the guest OS frees (0: never).  Needs flush_batch.
    table_every: Annotated[int, Unit("guest accesses")] = Field(
        default=100_000, ge=0, le=1 << 31, strict=True
    )
    # Mappings that the guest OS changes, at most, before it invalidates them together.  With 0 it invalidates
    # each at once, as it always does with EPT.
    flush_batch: Annotated[int, Unit("mappings")] = Field(default=32, ge=0, le=64, strict=True)
    # The most accesses for which a vCPU keeps interrupts off when another vCPU asks it to invalidate; mostly
    # it is a few.  Needs flush_batch.
    interrupts_off: Annotated[int, Unit("guest accesses")] = Field(
        default=4096, ge=0, le=1 << 31, strict=True
    )
    # Whether each process has its own tables for the kernel's global pages, as with kernel page-table
    # isolation.  Needs flush_batch.
    own_kernel_tables: bool = False
    # Whether the processes map pages of files.  A device fills them, so that the guest OS itself touches
    # none.  Needs flush_batch.
    file_pages: bool = False
    # Whether the vCPUs run threads of the same processes, under one guest OS.  With EPT each vCPU has an OS
    # and processes of its own.
    threads: bool = False
    # Accesses between two pairs of MOV to CR0 that clear and set CR0.WP, as an OS does that writes to its
    # read-only pages (0: never).  Without EPT they exit; with EPT the bit is the guest's own.
    wp_every: Annotated[int, Unit("guest accesses")] = Field(default=0, ge=0, le=1 << 31, strict=True)
    # The same for CR0.PG (without PCIDs), for CR4.SMEP, and for CR4.PCIDE (with PCIDs).
    pg_every: Annotated[int, Unit("guest accesses")] = Field(default=0, ge=0, le=1 << 31, strict=True)
    smep_every: Annotated[int, Unit("guest accesses")] = Field(default=0, ge=0, le=1 << 31, strict=True)
    pcide_every: Annotated[int, Unit("guest accesses")] = Field(default=0, ge=0, le=1 << 31, strict=True)
    # Whether the OS does in these windows what kernels open them for: with CR0.WP clear it writes to a page
    # that is mapped read-only; with CR4.PCIDE clear it unmaps a page of a process that is not loaded, and
    # invalidates nothing.  Needs flush_batch = 0.
    window_work: bool = False
    # Accesses between two HLTs (0: never), and how long a HLT lasts.
    halt_every: Annotated[int, Unit("guest accesses")] = Field(default=200_000, ge=0, le=1 << 31, strict=True)
    halt: Duration = 0.0001
    # Without exits (KVM_CAP_X86_DISABLE_EXITS) an idle guest stays in guest mode: every IPI interrupts it.
    halt_exits: bool = True
    # The VM's vCPUs run nested guests.
    nested: NestedSection | None = None

    def grown(self, factor: float, idler: float) -> Self:
        """Return this section with `factor` times as many VMs.  VMs that idle in guest mode halt `idler`
        times as long."""
        halt = self.halt if self.halt_exits else min(self.halt * idler, _LONGEST_HALT)
        return self.model_copy(update={"count": max(1, int(self.count * factor)), "halt": halt})

    @model_validator(mode="after")
    def _halts_for_a_while(self) -> Self:
        if self.halt_every and not 1e-6 <= self.halt <= _LONGEST_HALT:
            raise ValueError("halt of 0.001ms to 10s, or halt_every = 0")
        return self


class HostSection(Section):
    """Operations of the host on the VMs' memory, which reach KVM through the mmu_notifier."""

    actors: Annotated[int, Unit("actors")] = Field(default=2, ge=0, le=64, strict=True)
    # Pages of one range that is unmapped, write-protected or migrated.
    pages: Annotated[int, Unit("pages of 4 KiB")] = Field(default=64, ge=1, le=1 << 18, strict=True)
    unmap: Annotated[Rate, Unit("ranges per second")] = 0
    # Ranges of 8 MiB, in two steps that overlap: tables become empty, and walks end in unmapped ranges.
    reclaim: Annotated[Rate, Unit("ranges of 8 MiB per second")] = 0
    mprotect: Annotated[Rate, Unit("ranges per second")] = 0
    migrate: Annotated[Rate, Unit("ranges per second")] = 0
    # 2 MiB ranges: khugepaged and its opposite.
    collapse: Annotated[Rate, Unit("ranges of 2 MiB per second")] = 0
    split: Annotated[Rate, Unit("ranges of 2 MiB per second")] = 0
    # Ranges in which reclaim asks for each page whether the guest has used it.
    age: Annotated[Rate, Unit("ranges per second")] = 0

    @model_validator(mode="after")
    def _somebody_does_it(self) -> Self:
        rates = (self.unmap, self.reclaim, self.mprotect, self.migrate, self.collapse, self.split, self.age)
        if self.actors == 0 and any(rates):
            raise ValueError("at least 1 actor where a rate is not 0")
        return self


class KvmSection(Section):
    """Operations that each VM's VMM requests from KVM."""

    # Delete and re-create a memslot, and how long it stays away.
    memslot_cycles: Annotated[Rate, Unit("cycles per second")] = 0
    slot_gone: Duration = 0.0005
    # Zap the pages of a huge page, as a change of MTRRs does (kvm_zap_gfn_range).
    range_zaps: Annotated[Rate, Unit("ranges per second")] = 0
    # Arm dirty logging, read it a few times, disarm it (which recovers huge pages).
    dirty_log_cycles: Annotated[Rate, Unit("cycles per second")] = 0
    # Arm dirty logging and disarm it again, as a cancelled live migration does.
    dirty_log_toggles: Annotated[Rate, Unit("times per second")] = 0
    # System-management interrupts, each to one vCPU.
    smis: Annotated[Rate, Unit("SMIs per second")] = 0
    # Shadow pages that a VM may have (KVM_SET_NR_MMU_PAGES); 0: as many as it needs.
    mmu_pages: Annotated[int, Unit("shadow pages")] = Field(default=0, ge=0, le=1 << 20, strict=True)
    # INITs, each to one vCPU; the vCPU's guest boots again.
    resets: Annotated[Rate, Unit("INITs per second")] = 0


class SchedulerSection(Section):
    mode: Literal["storm", "balance", "pin"] = "storm"
    # vCPUs moved to another pCPU, in storm mode.
    migrations: Annotated[Rate, Unit("migrations per second")] = 2000


class PhasesSection(Section):
    """Storms alternate with quiet phases, in which only the source of flushes under test acts."""

    storm: Duration = 2.0
    quiet: Duration = 1.0

    @model_validator(mode="after")
    def _some_storm(self) -> Self:
        if self.storm <= 0:
            raise ValueError("storm to be longer than 0s")
        return self
