"""Scenarios: the machine, its VMs, and the rates of operations on them.

A scenario is a TOML file.  Every key is checked; an error names the file, the key, the value found and the
values expected.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from emulator.defaults import DEFAULT_SCENARIO
from emulator.errors import BadInput, one_of, shown
from emulator.scenario.costs import Costs, load_costs
from emulator.scenario.sections import (
    BUSY_PCPUS,
    CostUnit,
    Duration,
    HostSection,
    KvmSection,
    MachineSection,
    PhasesSection,
    SchedulerSection,
    Section,
    VmSection,
)
from emulator.validation import Unit, first_error, parse_toml, read_text

PAGES_PER_MIB = 256


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
    def nested_ept(self) -> bool:
        """Return whether a hypervisor among the guests has EPTs for its nested guests, which KVM shadows."""
        return any(vm.nested is not None and vm.nested.ept for vm in self.vm)

    @property
    def kind_of_host(self) -> dict[str, bool]:
        """Return the properties on which depends what KVM asks a policy (emulator.policy.suitable)."""
        return {"ept": self.machine.ept, "nested_ept": self.nested_ept, "hyperv": self.machine.hyperv}

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

    @model_validator(mode="after")
    def _nested_guests_suit(self) -> Self:
        nested = [vm for vm in self.vm if vm.nested is not None]
        if self.nested_ept and not self.machine.ept:
            raise ValueError("nested.ept = false where machine.ept = false, which offers L1 no EPT")
        if any(vm.disturbed for vm in nested) and self.kvm.resets:
            raise ValueError("kvm.resets = 0 where a vm that is disturbed has nested guests")
        host = self.host
        takes = host.unmap or host.reclaim or host.mprotect or host.migrate or host.collapse
        if takes and any(vm.disturbed and vm.nested and vm.nested.virtualize_apic for vm in nested):
            # Linux pins the APIC-access page of a VMCS12; the model does not.
            raise ValueError(
                "no host.unmap, reclaim, mprotect, migrate or collapse beside virtualize_apic = true"
            )
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
            vm.grown(factors[vm.placement], max(1.0, pcpus / BUSY_PCPUS)) if vm.grows else vm
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
