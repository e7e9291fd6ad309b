"""The job behind `flushlab run` and `serve`: boot, run through the phases, stop, and return the result."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from loguru import logger

from emulator.actors.crew import Crew
from emulator.actors.watchdog import ROUND_SECONDS, Watchdog
from emulator.audit import audited
from emulator.errors import BadInput
from emulator.explain.facts import INCONSISTENT
from emulator.job.emulation import Emulation
from emulator.kvm.structs import KvmParams
from emulator.policy import Policy
from emulator.policy.patience import unreturned
from emulator.report.preconditions import preconditions
from emulator.report.receivers import Receivers, read_receivers
from emulator.report.result import Finder, MachineObserver, Report, Result, Snapshot, read_snapshot
from emulator.report.violation import ReportCollector
from emulator.scenario.config import Scenario
from emulator.scenario.costs import modelled_cycles
from native import lib
from native.types import VmId

_PROGRESS_SECONDS = 0.5
# Interval of the search for new reports.  It is short because the event rings are soon overwritten.
_POLL_SECONDS = 0.01
_UNTIL_SECONDS = 0.05
_LEAST_PAUSE = 0.001


class Job:
    """One run of a scenario under a policy.

    `settle`: counting begins after so many seconds, once every VM has run, so that the costs of booting do
    not count.  `duration` is in seconds of wall time or, with a `pace`, in seconds of so many guest accesses
    each; `wall_limit` then ends a run in which the guests make no progress.  `until` ends the run before its
    duration, once it holds of the counts.  `observers` are notified of the native machine while it exists.
    `stop` ends the run early.
    """

    def __init__(
        self,
        scenario: Scenario,
        policy: Policy,
        *,
        seed: int = 0,
        duration: float | None = None,
        chaos: int = 0,
        unbounded: bool = False,
        params: KvmParams | None = None,
        stop_at_violation: bool = False,
        settle: float = 0,
        pace: float = 0,
        wall_limit: float | None = None,
        until: Callable[[Snapshot], bool] | None = None,
    ) -> None:
        self.scenario = scenario
        self.policy = policy
        self.seed = seed
        self.duration = duration
        self.observers: list[MachineObserver] = []
        # Keeps violations while the run goes on, since the process may be killed before its end.
        self.finder: Finder | None = None
        self._chaos, self._unbounded, self._params = chaos, unbounded, params
        self._stop_at_violation = stop_at_violation
        self._settle, self._pace, self._wall_limit, self._until = settle, pace, wall_limit, until

    def run(self, progress: Callable[[Snapshot], None], stop: threading.Event) -> Result:
        with self.policy.confined():
            return self._run(progress, stop)

    def _run(self, progress: Callable[[Snapshot], None], stop: threading.Event) -> Result:
        with Emulation(
            self.scenario,
            self.policy,
            seed=self.seed,
            chaos=self._chaos,
            unbounded=self._unbounded,
            params=self._params,
            pace=self._pace,
        ) as emulation:
            run = _Run(self, emulation, progress, stop)
            for observer in self.observers:
                observer.machine_up(emulation.m, pcpus=emulation.machine.pcpus, vms=self.scenario.vms)
            try:
                run.run()
            finally:
                # Stop the actors first: none may touch the machine once the observers have let it go.  They
                # stop in the middle of operations that hold references and tables, so a run cannot tell what
                # has leaked: `leak` is a violation of litmus tests alone (litmus/leftovers.py).  But none
                # stops within mmu_lock, so what that protects is whole.
                run.late = emulation.stop()
                run.audit()
                for observer in self.observers:
                    observer.machine_down()
            crew = emulation.crew
            error = crew.bad_input() or self._blamed(crew) or (unreturned() if run.late else None)
            if error is not None:
                raise error
            return run.result()

    def _blamed(self, crew: Crew) -> BadInput | None:
        """Return the error of the policy's patch that ended an actor, or None."""
        errors = (death.error for death in crew.deaths if death.error is not None)
        return next(filter(None, map(self.policy.blamed, errors)), None)


class _Run:
    def __init__(
        self, job: Job, emulation: Emulation, progress: Callable[[Snapshot], None], stop: threading.Event
    ) -> None:
        self.job = job
        self.emulation = emulation
        self.progress = progress
        self.stop = stop
        self.late: list[str] = []
        # All threads ended outside of mmu_lock; the finding of the audit that follows.
        self.quiet = False
        self.inconsistent = ""
        self.stalls: list[str] = []
        self.elapsed = 0.0
        # Seconds by the workload's clock: `elapsed`, unless the guests set the pace.
        self.worked = 0.0
        # The counts at which counting began, and the workload's clock then.
        self.before: tuple[Snapshot, tuple[Receivers, ...]] | None = None
        self.began = 0.0
        self.settled = 0.0  # `elapsed` then
        self.reports = ReportCollector(emulation.m)
        self.watchdog = Watchdog(emulation.crew)

    def run(self) -> None:
        crew, workload = self.emulation.crew, self.emulation.workload
        self.emulation.adopt()
        try:
            self.emulation.start()
            logger.info("booted", pcpus=len(self.emulation.pcpus), vcpus=len(self.emulation.tasks))
            started = time.monotonic()
            self.began = workload.clock()
            next_round = next_progress = next_count = 0.0
            while not self._over():
                if self._look_for_violations() and self.job._stop_at_violation:
                    break
                self.elapsed = time.monotonic() - started
                self.worked = workload.clock() - self.began
                if self._settling() and self._everybody_ran():
                    self._begin()
                if workload.advance(self.worked):
                    logger.debug("phase", name=workload.phase.name)
                self._print_events()
                if self.elapsed >= next_round:
                    next_round = self.elapsed + ROUND_SECONDS
                    self._watch()
                if self.elapsed >= next_progress:
                    next_progress = self.elapsed + _PROGRESS_SECONDS
                    self._progress()
                if self.job._until is not None and self.elapsed >= next_count:
                    next_count = self.elapsed + _UNTIL_SECONDS
                    if not self._settling() and self.job._until(self.counted()):
                        break
                crew.stopped.wait(self._pause())
            self.elapsed = time.monotonic() - started
            self._look_for_violations()
            if not self.stop.is_set() and not crew.stopped.is_set() and not self.stalls:
                self.emulation.hold_mmu()
                self.quiet = True
        finally:
            self.emulation.release()

    def audit(self) -> None:
        """Audit the MMU's structures, once all threads have ended, of a run that ended by itself."""
        crew = self.emulation.crew
        if not self.quiet or self.late or crew.deaths:
            return
        self.inconsistent = audited(self.emulation.machine, self.emulation.vms, live=True)
        if self.inconsistent and self.job.finder is not None:
            self.job.finder.found(len(self.reports) + 1, self._disagreement())

    def _disagreement(self) -> Report:
        return Report(INCONSISTENT, (INCONSISTENT,), f"{INCONSISTENT}: {self.inconsistent}")

    def _look_for_violations(self) -> int:
        """Take the core's new reports and pass the wanted ones to the finder; return how many are new."""
        reports, finder = self.reports, self.job.finder
        new = reports.poll()
        if finder is not None:
            for index in range(len(reports) - new, len(reports)):
                if finder.wanted(reports.kind(index), reports.has_events(index)):
                    report = reports.report(index, self._names(), self.job.policy.mutants())
                    finder.found(index + 1, report)
        return new

    def _progress(self) -> None:
        snapshot = self.snapshot()
        self.progress(snapshot)
        if self.job.finder is not None:
            self.job.finder.count(snapshot)

    def _names(self) -> dict[int, str]:
        """Return the actors by CPU number."""
        return {actor.cpu.id: actor.name for actor in self.emulation.crew.actors}

    def _settling(self) -> bool:
        return bool(self.job._settle) and self.before is None

    def _everybody_ran(self) -> bool:
        """Return whether the settling time is over and every VM has been in guest mode."""
        m, vms = self.emulation.m, map(VmId, range(len(self.emulation.vms)))
        return self.elapsed >= self.job._settle and all(lib.vm_stat(m, vm, lib.STAT_EXITS) for vm in vms)

    def _begin(self) -> None:
        self.before = self.snapshot(), read_receivers(self.emulation.m, self.job.scenario)
        self.emulation.workload.restart()
        self.began, self.worked, self.settled = self.emulation.workload.clock(), 0.0, self.elapsed

    def _over(self) -> bool:
        duration, limit = self.job.duration, self.job._wall_limit
        return (
            self.stop.is_set()
            or self.emulation.crew.stopped.is_set()
            or bool(self.stalls)
            or (duration is not None and self.worked >= duration and not self._settling())
            or (limit is not None and self.elapsed >= limit)
        )

    def _pause(self) -> float:
        """Return the seconds until the next poll; near the end, no more than the run still takes."""
        if self.job.duration is None or not self.worked or self._settling():
            return _POLL_SECONDS
        rest = (self.job.duration - self.worked) * (self.elapsed - self.settled) / self.worked
        return min(max(rest, _LEAST_PAUSE), _POLL_SECONDS)

    def _watch(self) -> None:
        for stall in self.watchdog.check():
            self.watchdog.report(stall)
            self.stalls.append(str(stall))
            logger.error("stall", kind=stall.kind, text=str(stall))

    def _print_events(self) -> None:
        events = self.emulation.crew.events
        while events:
            event, fields = events.popleft()
            logger.bind(**fields).warning(event)

    def snapshot(self) -> Snapshot:
        emulation = self.emulation
        return read_snapshot(
            emulation.m, vms=len(emulation.vms), elapsed=self.elapsed, phase=emulation.workload.phase.name
        )

    def counted(self) -> Snapshot:
        """Return the counts since counting began."""
        snapshot = self.snapshot()
        return snapshot.since(self.before[0]) if self.before is not None else snapshot

    def result(self) -> Result:
        self._print_events()
        snapshot, job = self.counted(), self.job
        receivers = read_receivers(self.emulation.m, job.scenario)
        if self.before is not None:
            receivers = tuple(now.less(then) for now, then in zip(receivers, self.before[1], strict=True))
        reports = self.reports.finish(self._names(), job.policy.mutants())
        if self.inconsistent:
            snapshot = replace(snapshot, violations={**snapshot.violations, INCONSISTENT: 1})
            reports += (self._disagreement(),)
        # The guests go on until the machine has stopped, and their accesses count until then.
        worked = snapshot.counters["accesses"] / job._pace if job._pace else self.worked
        return Result(
            snapshot=snapshot,
            scenario=job.scenario.name,
            policy=job.policy.answers(),
            policy_name=job.policy.name,
            policy_overrides=job.policy.overrides(),
            policy_given=job.policy.given(),
            seed=job.seed,
            reports=reports,
            preconditions=preconditions(snapshot, self.emulation),
            cycles=modelled_cycles(
                job.scenario.cost_table, snapshot.counters, snapshot.vms, snapshot.flushes
            ),
            failure=self._failure(snapshot),
            interrupted=self.stop.is_set(),
            receivers=receivers,
            tag_rounds=int(lib.frames_tag_rounds(self.emulation.machine.m)),
            worked=worked,
            activities=tuple(self.emulation.workload.activities()),
        )

    def _failure(self, snapshot: Snapshot) -> str:
        crew = self.emulation.crew
        deaths = [f"{death}\n{death.traceback}" for death in crew.deaths]
        if self.late:
            deaths.append(f"did not end in time: {', '.join(self.late)}")
        if crew.shut_down and not snapshot.violated:
            # A guest may triple fault after a store by a stale translation has corrupted its memory.  Such a
            # store is a violation, but one may escape: a pCPU's thread checks the translation, is preempted,
            # and stores after a policy that does not wait for the pCPU has freed the frame.  Any other triple
            # fault is a bug of the emulator.  In neither case is the run clean.
            vcpus = ", ".join(str(vcpu) for vcpu in sorted(crew.shut_down))
            deaths.append(f"triple fault of vCPU {vcpus} although no use of a stale translation was seen")
        return "\n".join(deaths)
