"""The phases of a run: storms in which all activities act, and quiet phases with one source of danger each.

VMX serves most flush requests with INVEPT global.  Under a storm these flushes soon drop entries that an
elided flush has left stale, so a guest seldom uses one.  In a quiet phase a single source of danger acts, a
different one each time, and a policy that elides the flush of that source is not covered by other flushes.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from emulator.scenario.config import Scenario

# Activities of the actors, as scenarios name their rates.
HOST_ACTIVITIES = ("unmap", "reclaim", "mprotect", "migrate", "collapse", "split", "age")
KVM_ACTIVITIES = ("memslot_cycles", "range_zaps", "dirty_log_cycles", "dirty_log_toggles", "smis", "resets")
MIGRATIONS = "migrations"

# Activities of the quiet phases, in turn: one source of flushes, or several that are dangerous only together.
# A number is a rate in calls per second; None: the scenario's rate, or QUIET_LEAST_RATES if that is higher.
Flavour = Mapping[str, float | None]
FLAVOURS: tuple[Flavour, ...] = (
    {MIGRATIONS: None},
    {"unmap": None},
    {"resets": None},
    # Faults between the end of logging and recovery replace tables by huge leafs, if khugepaged was at work
    # and unmapping left holes.
    {"collapse": 400.0, "split": 100.0, "unmap": 200.0, "dirty_log_toggles": 60.0},
    {"memslot_cycles": None, "range_zaps": None},
    {"reclaim": None},
    # Logging splits huge pages and recovers them: tables with mapped pages go while CPUs point to them.
    {"collapse": None, "dirty_log_cycles": None, "memslot_cycles": None},
    {"mprotect": None},
    {"collapse": None, "split": None},
    {"dirty_log_cycles": None},
    {"unmap": None, MIGRATIONS: None},
    {"migrate": None},
)
# Least rates in quiet phases.  Activities that are rare in a storm act more often in a phase of their own.
QUIET_LEAST_RATES = {
    "collapse": 200.0,
    "split": 40.0,
    "memslot_cycles": 60.0,
    "dirty_log_cycles": 20.0,
    "resets": 60.0,
}
# Seconds of delay that an actor makes up for at most.
_LONGEST_ARREARS = 0.05
_LONGEST_ARREARS_PACED = 10.0
# Seconds that an actor waits at most before it reads the clock again: the phase may have changed, and the
# guests' clock may run faster than wall time.
_LONGEST_WAIT = 0.05
_LONGEST_WAIT_PACED = 0.001


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of the workload.  `rates`: calls per second of each activity, over all actors."""

    name: str
    quiet: bool
    rates: Mapping[str, float]

    @property
    def activities(self) -> frozenset[str]:
        return frozenset(self.rates)


@dataclass(frozen=True, slots=True)
class Activity:
    """An activity of a scenario: the calls that its rates ask for, and those that actors began.

    Actors fall behind where the operations take longer than the rate allows, or where the machine at hand is
    too slow for the scenario.
    """

    name: str
    asked: float
    begun: int


class Workload:
    """The plan of a run and the phase it is in.

    One thread moves it along (`advance`); actors read `phase` and `rate` as often as they like.
    """

    def __init__(self, scenario: Scenario, clock: Callable[[], float] | None = None) -> None:
        # The guests' own clock, if given: by it, an actor makes up for almost any delay.  Else wall time.
        self.clock = clock or time.monotonic
        self.longest_wait = _LONGEST_WAIT_PACED if clock else _LONGEST_WAIT
        self.longest_arrears = _LONGEST_ARREARS_PACED if clock else _LONGEST_ARREARS
        self.rates = rates_of(scenario)
        self._storm = scenario.phases.storm
        self._quiet = scenario.phases.quiet
        every = {activity: rate for activity, rate in self.rates.items() if rate}
        self._storm_phase = Phase("storm", False, every)
        self._quiet_phases = _quiet_phases(every)
        self.phase = self._storm_phase
        self.phases_seen: Counter[str] = Counter({self.phase.name: 1})
        self._asked: defaultdict[str, float] = defaultdict(float)
        self._reckoned = 0.0  # seconds up to which `_asked` goes
        self._begun: list[Counter[str]] = []  # per actor
        self._before: Counter[str] = Counter()  # begun before the counts

    def register(self, begun: Counter[str]) -> None:
        """Take part of an actor's count of the calls that it has begun."""
        self._begun.append(begun)

    def restart(self) -> None:
        """Count from now on; the seconds of `advance` begin at 0 again."""
        self._asked.clear()
        self._reckoned = 0.0
        self._before = sum(self._begun, Counter())

    def activities(self) -> list[Activity]:
        """Return the activities that the scenario asked for, up to the last `advance`."""
        begun = sum(self._begun, Counter())
        return [
            Activity(name, asked, begun[name] - self._before[name]) for name, asked in self._asked.items()
        ]

    def advance(self, elapsed: float) -> bool:
        """Enter the phase that holds `elapsed` seconds after the start; return whether it is a new one."""
        for activity, rate in self.phase.rates.items():
            self._asked[activity] += rate * (elapsed - self._reckoned)
        self._reckoned = elapsed
        phase = self._phase_at(elapsed)
        if phase is self.phase:
            return False
        self.phase = phase
        self.phases_seen[phase.name] += 1
        return True

    def _phase_at(self, elapsed: float) -> Phase:
        if not self._quiet or not self._quiet_phases:
            return self._storm_phase
        turn, within = divmod(elapsed, self._storm + self._quiet)
        if within < self._storm:
            return self._storm_phase
        return self._quiet_phases[int(turn) % len(self._quiet_phases)]

    def rate(self, activity: str) -> float:
        """Return the current rate of an activity per second, over the whole machine."""
        return self.phase.rates.get(activity, 0.0)


def rates_of(scenario: Scenario) -> dict[str, float]:
    """Return the rate of each activity per second, over all actors."""
    host, kvm, scheduler = scenario.host, scenario.kvm, scenario.scheduler
    rates = {activity: float(getattr(host, activity)) for activity in HOST_ACTIVITIES}
    rates |= {activity: float(getattr(kvm, activity)) for activity in KVM_ACTIVITIES}
    storming = scheduler.mode == "storm" and scenario.machine.pcpus > 1
    rates[MIGRATIONS] = float(scheduler.migrations) if storming else 0.0
    return rates


def _quiet_phases(every: Mapping[str, float]) -> tuple[Phase, ...]:
    """Return the quiet phases of a scenario with these rates.

    A flavour's phase has those of its activities that the scenario has.  A set of activities gets one phase,
    and a flavour with migrations none unless the scenario has all of its activities.
    """
    phases: dict[frozenset[str], Phase] = {}
    for flavour in FLAVOURS:
        present = {activity: own for activity, own in flavour.items() if activity in every}
        if not present or (len(present) < len(flavour) and MIGRATIONS in flavour):
            continue
        rates = {a: own or max(every[a], QUIET_LEAST_RATES.get(a, 0.0)) for a, own in present.items()}
        phase = Phase("quiet: " + " and ".join(sorted(rates)), True, rates)
        phases.setdefault(phase.activities, phase)
    return tuple(phases.values())


class Pacer:
    """Schedules the activities of one actor, each at `share` of the machine's rate."""

    def __init__(self, workload: Workload, activities: Sequence[str], share: float, rng: Random) -> None:
        self._workload = workload
        self._share = share
        self._rng = rng
        self._due: dict[str, float | None] = dict.fromkeys(activities)
        self._begun: Counter[str] = Counter(dict.fromkeys(activities, 0))
        workload.register(self._begun)

    def next(self) -> tuple[str | None, float]:
        """Return the activity that is most overdue and 0; or None and the seconds until one may be due."""
        now = self._workload.clock()
        chosen, soonest = None, now + self._workload.longest_wait
        for activity, due in self._due.items():
            rate = self._workload.rate(activity) * self._share
            if not rate:
                self._due[activity] = None
                continue
            if due is None:
                due = self._due[activity] = now + self._rng.random() / rate
            if due < soonest:
                chosen, soonest = activity, due
        if chosen is None or soonest > now:
            return None, max(soonest - now, 0.0)
        rate = self._workload.rate(chosen) * self._share
        # Gaps are irregular, so that two actors do not fall into step.
        gap = self._rng.uniform(0.5, 1.5) / rate if rate else 0.0
        self._begun[chosen] += 1
        self._due[chosen] = max(soonest + gap, now - self._workload.longest_arrears)
        return chosen, 0.0
