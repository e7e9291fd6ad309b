"""Runs the scenario under each policy in turn, and again for each repetition.

A repetition runs each policy once, so that a machine that gets warmer or busier affects all policies alike.
Repetition n has the seed + n, for every policy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from emulator.compare.bound import Bound
from emulator.compare.measure import Measurement, measure, units_of
from emulator.compare.rows import singular
from emulator.job.job import Job
from emulator.policy import Policy
from emulator.report.result import Result, Snapshot
from emulator.report.summary import short
from emulator.scenario.config import Scenario

# Seconds for booting, which is not compared.
_SETTLE = 0.5
# A run at the guests' own pace may take so many times its duration, plus some seconds to start.
_WALL_FACTOR = 8.0
_WALL_EXTRA = 20.0

# Called after each run, with its number from 1 on, the number of runs, and its result.
Finished = Callable[[int, int, Result], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan of a comparison.  The first policy is the baseline."""

    scenario: Scenario
    policies: tuple[Policy, ...]
    repeat: int
    duration: float
    seed: int
    chaos: int = 0
    unbounded: bool = False
    # Whether also to tell how the order of the policies depends on the table of costs.
    sensitivity: bool = False
    # The file of costs that replaces entries of the scenario's table, as the command line names it.
    costs: Path | None = None
    # The user's names of the scenario and the policies, for the command that runs the comparison again.
    named: tuple[str, tuple[str, ...]] | None = None
    # Operations of the scenario's unit after which a run ends; None: `duration` alone ends it.
    units: int | None = None

    @property
    def runs(self) -> int:
        return self.repeat * len(self.policies)

    @property
    def per(self) -> tuple[str, str]:
        """Return the basis on which costs are compared: its suffix in keys, and its name.

        It is the scenario's unit, if there is one and no pace.  With a pace all policies have as much work
        per access, so it is a million guest accesses.
        """
        unit = self.scenario.unit
        return (
            ("/unit", singular(unit)) if unit and not self.scenario.pace else ("/M", "million guest accesses")
        )

    @property
    def length(self) -> str:
        """Return the end of each run, in words."""
        seconds, pace = f"{self.duration:g} s", self.scenario.pace
        if pace:
            seconds += f" of {pace:g} M guest accesses each"
        return f"{self.units:,} {self.scenario.unit} or {seconds}" if self.units else seconds


@dataclass(frozen=True, slots=True)
class Comparison:
    """The results: measurements by policy, one for each repetition (fewer if interrupted)."""

    plan: Plan
    measurements: Mapping[str, Sequence[Measurement]]
    interrupted: bool = False
    # Runs that did not do all their work within the time limit, as "policy, repetition n".
    cut_short: tuple[str, ...] = ()

    @property
    def baseline(self) -> str:
        return self.plan.policies[0].name

    @property
    def columns(self) -> list[tuple[str, Sequence[Measurement]]]:
        """Return the policies that have at least one run, the baseline first, with their runs."""
        return [(name, runs) for name, runs in self.measurements.items() if runs]

    @property
    def bound(self) -> Bound | None:
        """Return `oracle-optimal` for the baseline's first run."""
        runs = self.measurements.get(self.baseline)
        return runs[0].bound if runs else None

    def verdict(self, policy: str) -> str:
        """Return the worst verdict of a policy's runs: a violation in one of them is decisive."""
        verdicts = [m.result.verdict for m in self.measurements[policy]]
        return next((v for v in ("violations", "inconclusive", "clean") if v in verdicts), "not run")

    @property
    def exit_status(self) -> int:
        results = [m.result for _, runs in self.columns for m in runs]
        if any(result.failure for result in results):
            return 3
        return 1 if any(result.snapshot.violated for result in results) else 0


def paced_job(
    scenario: Scenario,
    policy: Policy,
    seed: int,
    duration: float,
    *,
    chaos: int,
    unbounded: bool,
    units: int | None = None,
) -> Job:
    """Return a run with costs that can be compared: it counts after the boot only, at the scenario's pace.

    units: operations of the scenario's unit that end it before its duration.
    """
    pace = scenario.pace * 1e6
    return Job(
        scenario,
        policy,
        seed=seed,
        duration=duration,
        chaos=chaos,
        unbounded=unbounded,
        settle=_SETTLE,
        pace=pace,
        wall_limit=duration * _WALL_FACTOR + _WALL_EXTRA if pace else None,
        until=None if units is None else lambda counts: units_of(counts, scenario) >= units,
    )


@dataclass
class Comparer:
    """The job of a session.  `run` compares; `view`, called by another thread, draws the progress."""

    plan: Plan
    finished: Finished | None = None
    _done: int = 0
    _policy: str = ""
    _repetition: int = 0
    _started: float = field(default_factory=time.monotonic)
    _now: Snapshot | None = None
    _share: float = 0.0

    def run(self, progress: Callable[[Snapshot], None], stop: threading.Event) -> Comparison:
        plan = self.plan
        measurements: dict[str, list[Measurement]] = {policy.name: [] for policy in plan.policies}
        cut_short: list[str] = []
        for repetition in range(plan.repeat):
            for policy in plan.policies:
                result = self._run_one(policy, repetition, stop)
                if stop.is_set():
                    return Comparison(plan, measurements, interrupted=True, cut_short=tuple(cut_short))
                if not self._complete(result) and not result.failure:
                    cut_short.append(f"{policy.name}, repetition {repetition + 1}")
                measurements[policy.name].append(measure(result, plan.scenario))
                self._done += 1
                if self.finished is not None:
                    self.finished(self._done, plan.runs, result)
        return Comparison(plan, measurements, cut_short=tuple(cut_short))

    def _run_one(self, policy: Policy, repetition: int, stop: threading.Event) -> Result:
        plan = self.plan
        self._policy, self._repetition, self._now, self._share = policy.name, repetition, None, 0.0
        seed = plan.seed + repetition
        job = paced_job(
            plan.scenario,
            policy.fresh(),
            seed,
            plan.duration,
            chaos=plan.chaos,
            unbounded=plan.unbounded,
            units=plan.units,
        )
        return job.run(self._progress, stop)

    def _complete(self, result: Result) -> bool:
        """Return whether a run has done the work that ends it."""
        plan = self.plan
        if plan.units is not None:
            return units_of(result.snapshot, plan.scenario) >= plan.units
        return result.worked >= plan.duration

    def _progress(self, snapshot: Snapshot) -> None:
        plan = self.plan
        pace = plan.scenario.pace * 1e6
        worked = snapshot.counters["accesses"] / pace if pace else snapshot.elapsed
        self._share = min(worked / plan.duration, 1.0)
        if plan.units is not None:
            self._share = max(self._share, min(units_of(snapshot, plan.scenario) / plan.units, 1.0))
        self._now = snapshot

    def view(self) -> RenderableType:
        """Return a line with a bar, the current run, the time left, and the guests' rates."""
        plan = self.plan
        share = (self._done + self._share) / plan.runs
        elapsed = time.monotonic() - self._started
        line = Table.grid(padding=(0, 1))
        text = Text(f"run {min(self._done + 1, plan.runs)} of {plan.runs}", style="bold")
        text.append(f"  {self._policy}", style="cyan")
        if plan.repeat > 1:
            text.append(f"  repetition {self._repetition + 1} of {plan.repeat}", style="dim")
        if share > 0.02:
            text.append(f"  {elapsed * (1 - share) / share:.0f}s left")
        if self._now is not None and self._now.elapsed > 0.1:
            rate = self._now.counters["accesses"] / max(self._now.elapsed, 1e-9)
            text.append(f"  {short(rate)} accesses/s", style="dim")
            if self._now.violated:
                text.append(f"  {self._now.violated} violations", style="bold red")
        line.add_row(ProgressBar(total=1.0, completed=share, width=30), text)
        return line
