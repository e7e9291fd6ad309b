"""Scenarios with nested guests: their operations, and their errors."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from emulator.errors import BadInput
from emulator.job.emulation import Emulation
from emulator.job.guests import layout_of
from emulator.job.job import Job
from emulator.policy import Policy, preset
from emulator.report.result import Result, Snapshot
from emulator.scenario.config import Scenario, load_scenario, parse_scenario
from emulator.scenario.sections import VmSection

# Every operation of L1, often.
BUSY = """
[machine]
pcpus = 2
ept = {ept0}
vpid = {vpid0}
[[vm]]
vcpus = 2
memory = 16
traces = ["cc1"]
records = 5000
processes = 2
switch_every = 3000
unmap_every = 2000
protect_every = 3000
[vm.nested]
guests = 2
vpid = {vpid}
ept = {ept}
exit_every = 1500
handle = 50
tick_every = 1000
switch_every = 4
vpid_every = 8
invvpid_every = 8
unmap_every = 4
eptp_every = 8
vmxoff_every = 16
[host]
actors = 1
mprotect = 50
[kvm]
smis = 50
[scheduler]
migrations = 300
"""


def busy(*, ept: bool, vpid: bool, vpid0: bool = True, ept0: bool = True) -> Scenario:
    flags = {"ept": ept, "vpid": vpid, "vpid0": vpid0, "ept0": ept0}
    text = BUSY.format_map({key: str(value).lower() for key, value in flags.items()})
    return parse_scenario(text, "busy.toml", Path())


def run(scenario: Scenario, seconds: float, policy: str = "linux-7.3", settle: float = 0) -> Result:
    job = Job(scenario, preset(policy), seed=3, duration=seconds, settle=settle)
    return job.run(lambda now: None, threading.Event())


def run_until(scenario: Scenario, **least: int) -> Result:
    """Run until KVM's statistics have reached these numbers."""
    job = Job(scenario, preset("linux-7.3"), seed=3, duration=60, until=lambda now: reached(now, least))
    return job.run(lambda now: None, threading.Event())


def reached(counts: Snapshot, least: dict[str, int]) -> bool:
    return all(counts.kvm(stat) >= number for stat, number in least.items())


def complaint(text: str) -> str:
    with pytest.raises(BadInput) as caught:
        parse_scenario(text, "own.toml", Path())
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ept", "vpid", "vpid0", "ept0"),
    [
        (True, True, True, True),
        (True, False, True, True),
        (False, False, True, True),
        (False, True, False, True),
        (False, True, True, False),
        (False, False, True, False),
    ],
)
def test_each_operation_of_a_hypervisor_is_done_and_the_run_is_clean(
    ept: bool, vpid: bool, vpid0: bool, ept0: bool
) -> None:
    # KVM shadows L1's EPTs, or without EPT the tables of L1 and L2.
    least = {"nested_run": 50, "smis": 5} | ({"mmu_synced": 1} if ept or not ept0 else {})
    if vpid:
        least["nested_invvpid"] = 1
    if ept:
        least |= {"nested_invept": 1, "nested_roots_freed": 1}
    result = run_until(busy(ept=ept, vpid=vpid, vpid0=vpid0, ept0=ept0), **least)
    snapshot = result.snapshot
    assert not result.failure
    assert not snapshot.violated, result.reports[0].text
    assert reached(snapshot, least)
    assert snapshot.counters["exit_preemption_timer"] > 0
    for stat in ("nested_invept", "nested_roots_freed", "mmu_synced"):
        assert (snapshot.kvm(stat) > 0) == (stat in least), stat
    assert (snapshot.kvm("nested_invvpid") > 0) == vpid
    # Without a VPID, VM entry and VM exit owe L2 and L1 a flush; with one, VM entry does if it is new.
    flushes = snapshot.kvm("nested_transition_flushes")
    assert flushes > snapshot.kvm("nested_run") if not vpid else 0 < flushes < snapshot.kvm("nested_run")


@pytest.mark.slow
def test_a_rate_of_zero_is_never() -> None:
    scenario = busy(ept=True, vpid=True)
    nested = scenario.vm[0].nested
    assert nested is not None
    names = ("switch_every", "vpid_every", "invvpid_every", "unmap_every", "eptp_every", "vmxoff_every")
    never = nested.model_copy(update=dict.fromkeys(names, 0))
    vm = scenario.vm[0].model_copy(update={"nested": never})
    snapshot = run(scenario.changed(vm=(vm,)), 1.0).snapshot
    assert snapshot.kvm("nested_run") > 20
    assert snapshot.kvm("nested_invept") == snapshot.kvm("nested_roots_freed") == 0
    # The one with which L1 gives each of two nested guests of two vCPUs its VPID.
    assert snapshot.kvm("nested_invvpid") == 4


@pytest.mark.slow
def test_nested_guests_exit_as_often_as_told() -> None:
    scenario = busy(ept=False, vpid=True)
    snapshot = run(scenario, 1.5).snapshot
    nested = scenario.vm[0].nested
    assert nested is not None
    round_trips = snapshot.counters["accesses"] / (nested.exit_every + nested.handle)
    assert snapshot.kvm("nested_run") == pytest.approx(round_trips, rel=0.2)


def test_the_oses_of_a_vm_share_its_memory_and_leave_the_apic_page() -> None:
    plain = layout_of(VmSection(vcpus=2, memory=4))
    assert (plain.oses, plain.end, plain.apic_gfn) == (2, 1024, 0)
    section = parse_scenario(
        "[[vm]]\nvcpus = 2\nmemory = 4\n[vm.nested]\nguests = 3\nvirtualize_apic = true", "own", Path()
    ).vm[0]
    nested = layout_of(section)
    assert (nested.oses, nested.end, nested.apic_gfn, nested.gfns) == (8, 1023, 1023, plain.gfns)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[vm]]\n[vm.nested]\nguests = 4", "vm[0].nested.guests: found 4; expected at most 3 nested guests"),
        ("[[vm]]\n[vm.nested]\nexit_every = 0", "exit_every: found 0; expected at least 1 guest accesses"),
        ("[[vm]]\n[vm.nested]\nepts = true", "vm[0].nested.epts: found an unknown key"),
        (
            "[machine]\nept = false\n[[vm]]\n[vm.nested]",
            "nested.ept = false where machine.ept = false, which offers L1 no EPT",
        ),
        (
            "[kvm]\nresets = 1\n[[vm]]\n[vm.nested]",
            "kvm.resets = 0 where a vm that is disturbed has nested guests",
        ),
        (
            "[host]\ncollapse = 1\n[[vm]]\n[vm.nested]\nvirtualize_apic = true",
            "no host.unmap, reclaim, mprotect, migrate or collapse beside virtualize_apic = true",
        ),
    ],
)
def test_complaints(text: str, expected: str) -> None:
    assert expected in complaint(text)


@pytest.mark.parametrize("name", ["nested-switch", "nested-overcommit", "nested-churn", "nested-kinds"])
def test_a_policy_about_shadowed_epts_suits_them(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.unit in ("round trips", "nested roots")
    Emulation(scenario, Policy(commit_zap="batch")).machine.destroy()


@pytest.mark.slow
def test_l1s_of_each_kind_run_clean() -> None:
    snapshot = run(load_scenario("nested-kinds"), 3.0).snapshot
    assert not snapshot.violated
    assert snapshot.counters["exit_apic_access"] > 2
    for stat in ("nested_run", "nested_invvpid", "nested_invept", "nested_transition_flushes"):
        assert snapshot.kvm(stat) > 2, stat


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "interrupted"), [("linux-7.3", 0), ("lkml-2025-on-each-cpu", 14)])
def test_a_new_root_for_an_ept_of_l1_interrupts_uninvolved_pcpus_as_the_policy_says(
    policy: str, interrupted: int
) -> None:
    # Counting begins behind the boot.
    result = run(load_scenario("nested-churn"), 1.5, policy, settle=0.3)
    assert not result.failure
    roots = result.snapshot.kvm("nested_roots")
    assert roots > 10
    tenants = next(group for group in result.receivers if group.uninvolved)
    assert tenants.pcpus == 14
    # A tenant that leaves guest mode just then is not interrupted.
    assert tenants.interruptions / roots == pytest.approx(interrupted, rel=0.2)
