"""Scenarios: the machine, its VMs, and the rates of operations on them.

A scenario is a TOML file.  Every key is checked; an error names the file, the key, the value found and the
values expected.  Rates are per second and for the whole machine, over all actors, during storms; 0 is never.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from emulator.defaults import DEFAULT_SCENARIO, MAX_PCPUS
from emulator.errors import BadInput, one_of, shown
from emulator.scenario.costs import Costs, load_costs
from emulator.validation import Unit, first_error, parse_toml, read_text

PAGES_PER_MIB = 256

_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h)?")
_MOST_DIGITS = 20
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}

# Ten years: beyond some centuries the C library's clocks overflow.
MAX_SECONDS = 10 * 365 * 24 * 3600.0
_LONGEST_HALT = 10.0
_BUSY_PCPUS = 256


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
    "migrations", "root allocations", "pages zapped", "SMIs", "remote flushes", "switches", "CR0.WP windows"
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
    # Accesses between two HLTs (0: never), and how long a HLT lasts.
    halt_every: Annotated[int, Unit("guest accesses")] = Field(default=200_000, ge=0, le=1 << 31, strict=True)
    halt: Duration = 0.0001
    # Without exits (KVM_CAP_X86_DISABLE_EXITS) an idle guest stays in guest mode: every IPI interrupts it.
    halt_exits: bool = True

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

    # Delete and re-create a memslot.
    memslot_cycles: Annotated[Rate, Unit("cycles per second")] = 0
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


class Scenario(Section):
    title: str = ""
    duration: Annotated[Duration, Field(gt=0)] = 30.0
    machine: MachineSection = MachineSection()
    vm: tuple[VmSection, ...] = Field(min_length=1)
    host: HostSection = HostSection()
    kvm: KvmSection = KvmSection()
    scheduler: SchedulerSection = SchedulerSection()
    phases: PhasesSection = PhasesSection()
    # A file that replaces entries of the embedded table of costs, relative to the scenario.
    costs: str = ""

    # Guest accesses in millions that stand for one second of the host's work in comparisons: every policy
    # meets the same work per access, however fast it lets the guests run here.  0: seconds on the wall.
    pace: Annotated[float, Unit("million guest accesses per second")] = Field(
        default=0, ge=0, le=1e6, allow_inf_nan=False
    )
    # Operation for which `compare` gives the costs, besides guest accesses.
    unit: CostUnit | None = None

    # Name, directory and costs of the scenario's files; set by parse_scenario.
    _name: str = PrivateAttr(default="scenario")
    _directory: Path = PrivateAttr(default=Path())
    _cost_table: Costs = PrivateAttr(default_factory=load_costs)

    @property
    def name(self) -> str:
        return self._name

    @property
    def directory(self) -> Path:
        """Return the directory to which paths in the scenario are relative."""
        return self._directory

    @property
    def cost_table(self) -> Costs:
        return self._cost_table

    @property
    def vms(self) -> int:
        return sum(vm.count for vm in self.vm)

    @property
    def vcpus(self) -> int:
        return sum(vm.count * vm.vcpus for vm in self.vm)

    @property
    def own_pcpus(self) -> int:
        """Return the number of pCPUs that belong to one VM each.  They are the first ones of the machine."""
        return sum(vm.count * vm.vcpus for vm in self.vm if vm.placement == "own")

    @property
    def ioctl_callers(self) -> int:
        """Return the number of VMs with a VMM that calls KVM while they run."""
        return sum(vm.count for vm in self.vm if vm.disturbed)

    @property
    def guest_pages(self) -> int:
        """Return the number of 4 KiB pages of all VMs' memory."""
        return sum(vm.count * vm.memory * PAGES_PER_MIB for vm in self.vm)

    @property
    def threads(self) -> int:
        """Return the number of OS threads that a run starts: the pCPUs, a Kvm actor per disturbed VM, the
        hosts, the scheduler and RCU."""
        return self.machine.pcpus + self.ioctl_callers + self.host.actors + 2

    @model_validator(mode="after")
    def _everybody_has_a_pcpu(self) -> Self:
        shared = any(vm.placement == "shared" for vm in self.vm)
        if self.own_pcpus + shared > self.machine.pcpus:
            others = " and one for the others" if shared else ""
            raise ValueError(
                f"machine.pcpus of at least {self.own_pcpus + shared}: {self.own_pcpus} for VMs with "
                f"placement = 'own'{others}"
            )
        return self

    @model_validator(mode="after")
    def _threads_are_not_reset(self) -> Self:
        if self.kvm.resets and any(vm.threads and vm.disturbed for vm in self.vm):
            raise ValueError("kvm.resets = 0 where a vm has threads = true, as an INIT boots one vCPU alone")
        return self

    def scaled(self, pcpus: int) -> Self:
        """Return this scenario on a host with `pcpus` pCPUs.  VMs that grow do so in proportion.

        Rates are not scaled: they are per machine, and a few threads produce them.  Idle guests on many pCPUs
        wake up less often, or a core or two could not run them.
        """
        fixed = sum(vm.count * vm.vcpus for vm in self.vm if vm.placement == "own" and not vm.grows)
        growing = self.own_pcpus - fixed
        factors = {
            "own": (pcpus - fixed) / growing if growing and not self._shares else pcpus / self.machine.pcpus,
            "shared": pcpus / self.machine.pcpus,
        }
        vms = tuple(
            vm.grown(factors[vm.placement], max(1.0, pcpus / _BUSY_PCPUS)) if vm.grows else vm
            for vm in self.vm
        )
        machine = self.machine.model_copy(update={"pcpus": pcpus})
        scaled = self.changed(vm=vms, machine=machine)
        if scaled.own_pcpus + scaled._shares > pcpus:
            raise BadInput(
                "--pcpus", f"found {pcpus}", f"at least {scaled.own_pcpus + scaled._shares} for {self.name}"
            )
        return scaled

    @property
    def _shares(self) -> bool:
        return any(vm.placement == "shared" for vm in self.vm)

    def changed(self, **sections: Any) -> Self:
        """Return a copy with whole sections replaced, for tests and command line options."""
        copy = self.model_copy(update=sections)
        copy._name, copy._directory, copy._cost_table = self._name, self._directory, self._cost_table
        return copy

    def priced(self, costs: Costs) -> Self:
        """Return a copy with another table of costs."""
        copy = self.changed()
        copy._cost_table = costs
        return copy


def embedded_scenarios() -> dict[str, str]:
    """Return the texts of the scenarios that ship with the package, by name."""
    directory = resources.files("emulator").joinpath("scenarios")
    files = sorted((file.name, file) for file in directory.iterdir() if file.name.endswith(".toml"))
    return {name.removesuffix(".toml"): file.read_text("utf-8") for name, file in files}


def load_scenario(name_or_path: str = DEFAULT_SCENARIO) -> Scenario:
    """Load an embedded scenario by name, or a file.  An argument with a suffix or a slash is a file."""
    if "/" not in name_or_path and "." not in name_or_path:
        embedded = embedded_scenarios()
        if name_or_path in embedded:
            return parse_scenario(embedded[name_or_path], name_or_path, Path())
        expected = one_of(name_or_path, embedded, ", or a .toml file")
        raise BadInput(f"scenario {shown(name_or_path)}", "no such scenario", expected)
    path = Path(name_or_path)
    return parse_scenario(read_text(path, "a readable scenario file"), str(path), path.parent)


def load_scaled(
    name_or_path: str, pcpus: int | None, ept: bool | None, costs: Path | None = None
) -> Scenario:
    """Load a scenario, scaled to `pcpus` pCPUs if given, on a host with EPT or without if `ept` says so, with
    the events' cycles of the file `costs`."""
    scenario = load_scenario(name_or_path)
    if costs is not None:
        scenario = scenario.priced(load_costs(costs, scenario.cost_table))
    if ept is not None:
        scenario = scenario.changed(machine=scenario.machine.model_copy(update={"ept": ept}))
    return scenario if pcpus is None else scenario.scaled(pcpus)


def parse_scenario(text: str, name: str, directory: Path) -> Scenario:
    try:
        scenario = Scenario.model_validate(parse_toml(text, name))
    except ValidationError as error:
        raise BadInput(name, *first_error(error, Scenario)) from error
    scenario._name = name
    scenario._directory = directory
    if scenario.costs:
        scenario._cost_table = load_costs(directory / scenario.costs)
    return scenario
