"""The scenarios that ship, at several sizes: placement, disturbed VMs, subjects."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from emulator.compare.measure import measure
from emulator.errors import BadInput
from emulator.job.emulation import Emulation, machine_config
from emulator.job.job import Job
from emulator.kvm.kvm_host import X86_CR4_PCIDE
from emulator.policy import preset
from emulator.report.result import Result, Snapshot
from emulator.scenario.config import load_scaled, load_scenario, parse_scenario
from emulator.scenario.sections import VmSection
from native import lib
from native.types import CpuId
from tests.support import wait_until

LINUX = preset("linux-7.3")
# With the subject of each: a counter or statistic that must move.
COMPARED = {
    "partitioned": "roots_allocated",
    "migration-storm": "migrations",
    "dirty-log": "remote_tlb_flush_requests",
    "balloon": "remote_tlb_flush_requests",
    "boot-storm": "roots_allocated",
    "smm-heavy": "smis",
    "mixed": "migrations",
    "pgd-churn": "mmu_synced",
    "wp-churn": "mmu_load",
    "role-churn": "mmu_load",
}


# Conditions hold after a second or two, or much later on a busy machine.
LONGEST = 60.0


def run(name: str, policy: str = "linux-7.3", seconds: float = 1.0, pcpus: int | None = None) -> Result:
    scenario = load_scenario(name)
    if pcpus:
        scenario = scenario.scaled(pcpus)
    job = Job(scenario, preset(policy), seed=3, duration=seconds, settle=0.2)
    return job.run(lambda now: None, threading.Event())


def run_until(name: str, *conditions: Callable[[Snapshot], bool], seconds: float = 0.5) -> Result:
    """Return a clean run that went on for at least so many seconds, and until each condition held."""

    def over(now: Snapshot) -> bool:
        return now.elapsed >= seconds and all(holds(now) for holds in conditions)

    job = Job(load_scenario(name), LINUX, seed=3, duration=LONGEST, settle=0.2, until=over)
    result = job.run(lambda now: None, threading.Event())
    assert not result.failure
    assert not result.snapshot.violated, result.reports[0].text
    assert [holds(result.snapshot) for holds in conditions] == [True] * len(conditions)
    return result


def begun(result: Result, activity: str) -> int:
    """Return how often the host began it."""
    return next(one.begun for one in result.activities if one.name == activity)


def stat(name: str, least: int = 1) -> Callable[[Snapshot], bool]:
    return lambda now: now.kvm(name) >= least


def counter(name: str, least: int = 1) -> Callable[[Snapshot], bool]:
    return lambda now: now.counters[name] >= least


@pytest.mark.slow
def test_shadow_paging_is_clean_and_does_all_that_it_is_about() -> None:
    stats = ("mmu_shadow_zapped", "mmu_pte_write", "mmu_unsync", "mmu_synced")
    result = run_until("shadow", *map(stat, stats))
    assert not result.snapshot.kvm("roots_allocated")


@pytest.mark.slow
def test_pages_that_numa_balancing_moves_interrupt_many_vcpus() -> None:
    result = run("numa-balancing")
    assert not result.failure
    assert not result.snapshot.violated
    requests = result.snapshot.kvm("remote_tlb_flush_requests")
    assert requests > 0
    # About 155 of 172 for each flush; fewer where threads of the pCPUs wait for a core.
    assert result.snapshot.counters["interruptions"] > 20 * requests


@pytest.mark.slow
@pytest.mark.parametrize("pcid", [True, False])
def test_guests_switch_as_often_as_told_and_flush_unless_they_have_pcids(pcid: bool) -> None:
    scenario = load_scaled("pgd-churn", None, True)
    section = next(vm for vm in scenario.vm if vm.pcid == pcid)
    job = Job(scenario.changed(vm=(section,)), LINUX, seed=3, duration=0.3, settle=0.1)
    counters = job.run(lambda now: None, threading.Event()).snapshot.counters
    switches = counters["guest_switches"]
    assert switches == pytest.approx(counters["accesses"] / section.switch_every, rel=0.1)
    assert (counters["guest_invalidations"] > switches) == (not pcid)


@pytest.mark.slow
def test_with_ept_a_guest_without_pcids_starts_without_cr4_pcide() -> None:
    scenario = load_scaled("pgd-churn", None, True)
    with Emulation(scenario, LINUX, seed=1) as emulation:
        has_pcide = [bool(task.vcpu.arch.cr4 & X86_CR4_PCIDE) for task in emulation.tasks]
    assert has_pcide == [vm.pcid for vm in scenario.vm for _ in range(vm.vcpus)]
    assert set(has_pcide) == {False, True}


def test_the_command_line_takes_ept_away_and_gives_it() -> None:
    assert [load_scaled("main", None, ept).machine.ept for ept in (None, False, True)] == [True, False, True]
    assert [load_scaled("shadow", 8, ept).machine.ept for ept in (None, False, True)] == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_each_does_what_it_is_about_and_is_clean(name: str) -> None:
    result = run_until(name, stat(COMPARED[name], 6))
    values = measure(result, load_scenario(name)).values
    assert values["flush cycles/M"] >= values["bound cycles/M"] > 0, "nobody does better than perfectly"
    assert load_scenario(name).unit


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("pcpus", [4, 64, 1024, 4096])
def test_one_parameter_scales_them(name: str, pcpus: int) -> None:
    scenario = load_scenario(name).scaled(pcpus)
    assert scenario.machine.pcpus == pcpus
    assert scenario.own_pcpus <= pcpus
    assert scenario.vcpus >= pcpus * 0.9
    machine_config(scenario, 1, 0, False)


def test_too_small_is_one_line() -> None:
    with pytest.raises(BadInput, match=r"--pcpus: found 2; expected at least 3 for partitioned"):
        load_scenario("partitioned").scaled(2)


def test_vms_that_do_not_grow_stay_as_many() -> None:
    scenario = load_scenario("partitioned").scaled(256)
    assert [vm.count for vm in scenario.vm] == [1, 254]
    assert scenario.ioctl_callers == 1
    assert scenario.threads < 256 + 10, "a tenant that nobody disturbs has no thread but its pCPU's"


def test_idle_guests_of_a_large_host_wake_up_less_often() -> None:
    scenario = load_scenario("partitioned")
    halts = {pcpus: scenario.scaled(pcpus).vm[1].halt for pcpus in (16, 256, 1024)}
    assert halts == pytest.approx({16: 0.1, 256: 0.1, 1024: 0.4})
    assert scenario.scaled(1024).vm[0].halt == scenario.vm[0].halt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[[vm]]\nplacement = 'own'\ncount = 5",
            "machine.pcpus of at least 5: 5 for VMs with placement = 'own'",
        ),
        (
            "[[vm]]\nplacement = 'own'\ncount = 4\n[[vm]]",
            "at least 5: 4 for VMs with placement = 'own' and one",
        ),
        ("[[vm]]\nhalt = '0s'", "halt of 0.001ms to 10s, or halt_every = 0"),
        ("[[vm]]\nplacement = 'mine'", "vm[0].placement: found 'mine'; expected one of 'shared'"),
        ("unit = 'miles'\n[[vm]]", "unit: found 'miles'; expected one of 'migrations'"),
        ("pace = -1\n[[vm]]", "pace: found -1; expected at least 0"),
    ],
)
def test_complaints(text: str, expected: str) -> None:
    from pathlib import Path

    with pytest.raises(BadInput) as caught:
        parse_scenario(text, "own.toml", Path())
    assert expected in str(caught.value)


@pytest.mark.slow
def test_own_pcpus_are_nobody_elses() -> None:
    scenario = load_scenario("mixed")
    with Emulation(scenario, LINUX, seed=1) as emulation:
        emulation.start()
        tenants = [
            task for task, home in zip(emulation.tasks, emulation.homes, strict=True) if len(home) == 1
        ]
        others = [task for task in emulation.tasks if task not in tenants]
        assert len(tenants) == scenario.own_pcpus == 4
        seen: set[int] = set()

        def look() -> bool:
            assert all(task.pcpu in (-1, own) for own, task in enumerate(tenants))
            seen.update(task.pcpu for task in others)
            return seen >= {4, 5, 6, 7}

        wait_until(look, "the others migrate over all pCPUs that are left")
        time.sleep(0.1)
        look()
        assert seen <= {-1, 4, 5, 6, 7}


@pytest.mark.slow
def test_nothing_of_the_host_reaches_undisturbed_vms() -> None:
    result = run_until("mixed", lambda now: sum(vm["remote_tlb_flush_requests"] for vm in now.vms[4:]) > 0)
    assert sum(vm["remote_tlb_flush_requests"] for vm in result.snapshot.vms[:4]) == 0
    groups = {group.who: group for group in result.receivers}
    assert groups["tenants"].uninvolved
    assert groups["tenants"].interruptions == 0, "Linux interrupts who is in the guest of that VM only"


@pytest.mark.slow
def test_flushing_every_pcpu_interrupts_all_who_have_nothing_to_do_with_it() -> None:
    result = run("partitioned", "lkml-2025-on-each-cpu", seconds=1.5, pcpus=24)
    tenants = next(group for group in result.receivers if group.uninvolved)
    roots = result.snapshot.kvm("roots_allocated")
    assert tenants.pcpus == 22
    assert tenants.interruptions / roots > 0.8 * tenants.pcpus
    assert tenants.bystanders == tenants.interruptions


@pytest.mark.slow
def test_the_flushed_mask_as_sketched_is_caught_and_told() -> None:
    """Within its few seconds: the two pCPUs, the zap, and the flush that was elided."""
    scenario = load_scenario("migration-storm")
    job = Job(scenario, preset("lkml-2025-cpu-flushed-mask"), seed=1, duration=scenario.duration)
    result = job.run(lambda now: None, threading.Event())
    assert scenario.duration < 10
    texts = [r.text for r in result.reports if r.kind in ("use-after-free", "stale-after-revoke")]
    assert texts, result.snapshot.violations
    whole = [
        text
        for text in texts
        if "zap gfn" in text
        and "elided: flush for migration" in text
        and len(set(re.findall(r"pcpu\d", text))) > 1
    ]
    assert whole, texts[0]


@pytest.mark.slow
def test_idle_guests_stay_in_guest_mode() -> None:
    with Emulation(load_scenario("partitioned"), LINUX, seed=1) as emulation:
        emulation.start()
        idle = [CpuId(cpu) for cpu in range(2, 16)]
        wait_until(
            lambda: sum(lib.cpu_power(emulation.m, cpu) == lib.CPU_GUEST_HALTED for cpu in idle) > 10,
            "most tenants halt in guest mode",
        )


@pytest.mark.slow
def test_at_the_guests_own_pace_the_work_per_access_is_the_scenarios() -> None:
    scenario = load_scenario("migration-storm")
    job = Job(scenario, LINUX, seed=1, duration=1.0, pace=scenario.pace * 1e6, wall_limit=60, settle=0.2)
    result = job.run(lambda now: None, threading.Event())
    accesses = result.snapshot.counters["accesses"] / 1e6
    assert result.worked == pytest.approx(accesses / scenario.pace)
    assert 1.0 <= result.worked < 2
    requests = result.snapshot.kvm("remote_tlb_flush_requests")
    assert requests == pytest.approx(scenario.host.unmap * accesses / scenario.pace, rel=0.3)


@pytest.mark.slow
def test_books_begin_when_everybody_has_booted() -> None:
    result = run("partitioned", seconds=0.5)
    guest = sum(flush.count for flush in result.snapshot.flushes if flush.reason == "guest")
    assert guest == 0, "vCPUs were created before"
    assert 0.4 < result.snapshot.elapsed < 3


def test_a_second_slot_is_for_those_whose_slots_come_and_go() -> None:
    from emulator.job.guests import layout_of

    assert layout_of(VmSection(memory=4, disturbed=False)).second == 0
    assert layout_of(VmSection(memory=4)).second > 0


@pytest.mark.slow
def test_guests_with_threads_are_clean_and_do_all_that_their_scenario_is_about() -> None:
    stats = ("mmu_synced", "mmu_recycled", "mmu_unsync", "mmu_pte_write", "cached_roots", "smis")
    # An old translation is used before it is invalidated.
    counters = (counter("guest_invalidations", 100), counter("legal_stale"))
    run_until("table-churn", *map(stat, stats), *counters)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "subject", "activity"),
    [
        ("late-threads", "guest_invalidations", "unmap"),
        ("log-toggles", "frames_freed", "dirty_log_toggles"),
        ("late-syncs", "guest_invalidations", "unmap"),
        ("host-protects", "guest_switches", "mprotect"),
        ("huge-aliases", "guest_invalidations", "unmap"),
        ("role-work", "guest_role_windows", "unmap"),
        ("device-faults", "guest_invalidations", "memslot_cycles"),
    ],
)
def test_a_scenario_that_mutants_need_is_clean(name: str, subject: str, activity: str) -> None:
    result = run_until(name, counter(subject, 10), seconds=1.5)
    assert begun(result, activity)


@pytest.mark.slow
def test_faults_on_a_device_that_is_away_make_mmio_sptes() -> None:
    result = run_until("device-slots", stat("pf_mmio_spte_created"), seconds=1.5)
    assert begun(result, "memslot_cycles")


@pytest.mark.slow
def test_pages_become_tables_while_logging_begins_and_ends() -> None:
    result = run_until("logged-tables", stat("mmu_unsync"), stat("mmu_cache_miss"), seconds=1.5)
    assert begun(result, "dirty_log_toggles")


def test_a_slot_stays_away_as_long_as_the_scenario_says() -> None:
    seconds = parse_scenario('[[vm]]\n[kvm]\nslot_gone = "20ms"\n', "mine", Path()).kvm.slot_gone
    assert seconds == 0.02
    assert parse_scenario("[[vm]]\n", "mine", Path()).kvm.slot_gone == 0.0005


@pytest.mark.slow
@pytest.mark.parametrize("ept", [True, False])
def test_the_vcpus_of_a_vm_run_threads_of_the_same_processes_without_ept_only(ept: bool) -> None:
    with Emulation(load_scaled("table-churn", None, ept), LINUX, seed=1) as emulation:
        vcpus = [task.vcpu.id for task in emulation.tasks]
        emulation.adopt()
        try:
            emulation.start()
            accesses = (1 << lib.GUEST_CLOCK_VCPU) - 1
            wait_until(
                lambda: all(lib.guest_clock(emulation.m, vcpu) & accesses > 2000 for vcpu in vcpus),
                "every vCPU has run",
            )
            own_memory = [lib.guest_frames_used(emulation.m, vcpu) > 0 for vcpu in vcpus]
        finally:
            emulation.release()
    assert own_memory == ([True] * 4 if ept else [True, False] * 2)


def test_threads_and_resets_exclude_each_other() -> None:
    text = "[[vm]]\nthreads = true\n[kvm]\nresets = 1\n"
    with pytest.raises(BadInput, match=r"kvm.resets = 0 where a vm has threads = true"):
        parse_scenario(text, "mine", Path())
