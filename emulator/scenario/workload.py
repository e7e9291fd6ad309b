"""What happens when: storms in which everything acts, and quiet phases in which one thing does.

VMX's answer to most flush requests is INVEPT global, and under a storm it heals what an elided flush left
behind before anyone can use it.  In a quiet phase only one source of danger acts, a different one each time;
a policy that elides the flush of that source has nobody to hide behind.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from emulator.scenario.config import Scenario

# Activities of the actors, as scenarios name their rates.
HOST_ACTIVITIES = ("unmap", "reclaim", "mprotect", "migrate", "collapse", "split", "age")
KVM_ACTIVITIES = ("memslot_cycles", "dirty_log_cycles", "dirty_log_toggles", "smis", "resets")
MIGRATIONS = "migrations"

# What acts in quiet phases, in turn: one source of flushes, or several that only together are dangerous.  A
# number is a rate of its own, in calls per second; None: the scenario's, or more by QUIET_LEAST_RATES.
Flavour = Mapping[str, float | None]
FLAVOURS: tuple[Flavour, ...] = (
    {MIGRATIONS: None},
    {"unmap": None},
    {"resets": None},
    # Faults between the end of logging and recovery replace tables by huge leafs, if khugepaged was at work
    # and unmapping left holes.
    {"collapse": 400.0, "split": 100.0, "unmap": 200.0, "dirty_log_toggles": 60.0},
    {"memslot_cycles": None},
    {"reclaim": None},
    # Logging splits huge pages and recovers them: tables with mapped pages go while CPUs point to them.
    {"collapse": None, "dirty_log_cycles": None, "memslot_cycles": None},
    {"mprotect": None},
    {"collapse": None, "split": None},
    {"dirty_log_cycles": None},
    {"unmap": None, MIGRATIONS: None},
    {"migrate": None},
)
# What a storm sees a few times a second acts more often in a quiet second that it has to itself.
QUIET_LEAST_RATES = {
    "collapse": 200.0,
    "split": 40.0,
    "memslot_cycles": 60.0,
    "dirty_log_cycles": 20.0,
    "resets": 60.0,
}
# Who was late does not make up for more than this.
_LONGEST_ARREARS = 0.05
_LONGEST_ARREARS_PACED = 10.0
# Nobody looks at the clock less often: phases change, and the guests' clock may run faster than the wall's.
_LONGEST_WAIT = 0.05
_LONGEST_WAIT_PACED = 0.001


@dataclass(frozen=True, slots=True)
class Phase:
    """`rates`: calls per second, over all actors, of what acts."""

    name: str
    quiet: bool
    rates: Mapping[str, float]

    @property
    def activities(self) -> frozenset[str]:
        return frozenset(self.rates)


class Workload:
    """The plan of a run and the phase it is in.

    One thread moves it along (`advance`); actors read `phase` and `rate` as often as they like.
    """

    def __init__(self, scenario: Scenario, clock: Callable[[], float] | None = None) -> None:
        # Of the guests' own pace, if given, where nobody is ever too late; else the one on the wall.
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

    def advance(self, elapsed: float) -> bool:
        """Go to the phase that holds `elapsed` seconds after the start. True if it is another one."""
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
        """How often a second the whole machine does this just now."""
        return self.phase.rates.get(activity, 0.0)


def rates_of(scenario: Scenario) -> dict[str, float]:
    """Rates per second by activity, over all actors."""
    host, kvm, scheduler = scenario.host, scenario.kvm, scenario.scheduler
    rates = {activity: float(getattr(host, activity)) for activity in HOST_ACTIVITIES}
    rates |= {activity: float(getattr(kvm, activity)) for activity in KVM_ACTIVITIES}
    storming = scheduler.mode == "storm" and scenario.machine.pcpus > 1
    rates[MIGRATIONS] = float(scheduler.migrations) if storming else 0.0
    return rates


def _quiet_phases(every: Mapping[str, float]) -> tuple[Phase, ...]:
    """The flavours whose activities the scenario has, each once."""
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
    """When one actor does which of its activities: each at `share` of the machine's rate."""

    def __init__(self, workload: Workload, activities: Sequence[str], share: float, rng: Random) -> None:
        self._workload = workload
        self._share = share
        self._rng = rng
        self._due: dict[str, float | None] = dict.fromkeys(activities)

    def next(self) -> tuple[str | None, float]:
        """What is due now (the most overdue first), or None and the seconds until something may be."""
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
        # Irregular, so that two actors do not fall into step.
        gap = self._rng.uniform(0.5, 1.5) / rate if rate else 0.0
        self._due[chosen] = max(soonest + gap, now - self._workload.longest_arrears)
        return chosen, 0.0
