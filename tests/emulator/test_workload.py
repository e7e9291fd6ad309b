"""Phases and pace."""

from __future__ import annotations

import time
from random import Random

import pytest

from emulator.scenario.config import load_scenario
from emulator.scenario.sections import PhasesSection
from emulator.scenario.workload import FLAVOURS, MIGRATIONS, QUIET_LEAST_RATES, Pacer, Workload


def test_storms_alternate_with_quiet_phases_of_every_flavour() -> None:
    workload = Workload(load_scenario())
    assert workload.phase.name == "storm"
    names = []
    for tenth in range(10 * 3 * (len(FLAVOURS) + 1)):
        if workload.advance(tenth / 10):
            names.append(workload.phase.name)
    assert names[1::2] == ["storm"] * len(names[1::2])
    quiet = set(names[0::2])
    assert "quiet: migrations" in quiet
    assert len(quiet) == len(FLAVOURS)


def test_in_a_quiet_phase_only_its_activities_have_a_rate() -> None:
    scenario = load_scenario()
    workload = Workload(scenario)
    assert workload.rate("memslot_cycles") == scenario.kvm.memslot_cycles
    turn = scenario.phases.storm + scenario.phases.quiet
    quiet = (i * turn + scenario.phases.storm for i in range(len(FLAVOURS)))
    assert any(workload.advance(t) and workload.phase.activities == {"memslot_cycles"} for t in quiet)
    assert workload.rate("memslot_cycles") == QUIET_LEAST_RATES["memslot_cycles"]
    assert workload.rate("unmap") == workload.rate(MIGRATIONS) == 0


def test_what_a_scenario_does_not_do_is_no_quiet_phase() -> None:
    scenario = load_scenario()
    quiet = scenario.changed(host=scenario.host.model_copy(update={"unmap": 0.0, "mprotect": 0.0}))
    workload = Workload(quiet)
    for second in range(60):
        workload.advance(float(second))
    assert not any("unmap" in name or "mprotect" in name for name in workload.phases_seen)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pacer_keeps_its_share_of_the_rate() -> None:
    clock = Clock()
    workload = Workload(load_scenario(), clock)
    pacer = Pacer(workload, ("unmap", "mprotect"), 0.5, Random(1))
    done = {"unmap": 0, "mprotect": 0}
    while clock.now < 1.0:
        activity, wait = pacer.next()
        if activity is None:
            clock.now += max(wait, 1e-6)
        else:
            done[activity] += 1
    for activity, times in done.items():
        assert 0.9 < times / (workload.rates[activity] / 2) < 1.1


def test_pacer_forgets_what_it_is_far_behind_with(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    workload = Workload(load_scenario())
    pacer = Pacer(workload, ("unmap",), 1.0, Random(1))
    pacer.next()
    clock.now = 10.0
    at_once = 0
    while pacer.next()[0]:
        at_once += 1
    assert at_once < workload.rates["unmap"] * 0.06


def test_at_the_guests_own_pace_nothing_is_forgotten() -> None:
    """However fast the guests run here: the same work per access."""
    clock = Clock()
    workload = Workload(load_scenario(), clock)
    pacer = Pacer(workload, ("unmap",), 1.0, Random(1))
    pacer.next()
    clock.now = 2.0
    at_once = 0
    while pacer.next()[0]:
        at_once += 1
    assert 0.9 < at_once / (2 * workload.rates["unmap"]) < 1.1
    assert pacer.next()[1] <= 0.001, "the guests' clock may run faster than the wall's"


def test_asked_and_begun_are_counted_from_a_restart_on() -> None:
    clock = Clock()
    scenario = load_scenario("balloon")
    workload = Workload(scenario.changed(phases=PhasesSection(quiet=0)), clock)
    pacer = Pacer(workload, ("unmap",), 1.0, Random(1))

    def work(until: float, calls: int) -> None:
        for _ in range(calls):
            while pacer.next()[0] is None:
                clock.now += 0.001
        workload.advance(until)

    work(1.0, 5)
    workload.restart()
    work(0.5, 7)
    work(2.0, 2)
    (unmap,) = (activity for activity in workload.activities() if activity.name == "unmap")
    assert unmap.begun == 9
    assert unmap.asked == pytest.approx(2 * workload.rates["unmap"])


def test_a_phase_without_an_activity_asks_for_none() -> None:
    workload = Workload(load_scenario(), Clock())
    end = 0.0
    while not workload.phase.quiet:
        workload.advance(end := end + 0.01)
    before = {activity.name: activity.asked for activity in workload.activities()}
    workload.advance(end + 0.01)
    after = {activity.name: activity.asked for activity in workload.activities()}
    assert {name for name, asked in after.items() if asked > before[name]} == set(workload.phase.rates)
