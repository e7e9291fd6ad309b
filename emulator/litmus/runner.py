"""Litmus tests on real threads: one per thread of the test, all races real, many executions on one machine.

Executions are numbered by their seed, which decides how late each thread starts and where threads linger.
The hardware decides the races, so a seed makes an outcome likely to repeat, but not certain.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from emulator.errors import BadInput
from emulator.explain.document import VMM
from emulator.litmus.evidence import Evidence, add
from emulator.litmus.failure import KVM_FAILS, LitmusFailure, failure_text
from emulator.litmus.harness import Harness, machine_config, rcu_cpu
from emulator.litmus.leftovers import at_the_end, left_over
from emulator.litmus.model import LitmusTest
from emulator.litmus.thread import LitmusThread
from emulator.litmus.verdict import Outcome
from emulator.machine.runtime import Cpu, Machine, MachineStopped, Mode
from emulator.points import PointKind
from emulator.policy import Policy
from emulator.policy.patience import unreturned
from emulator.report.result import Report
from emulator.report.violation import ReportCollector
from native import VIOLATION_KINDS, ffi, lib

# An execution that takes longer has a thread that waits for ever.
STUCK_SECONDS = 20.0
# The most time between the starts of threads, and of a delay at a point, in microseconds.
_START_SPREAD = 60
_LINGER = 150
# In every other execution, one in this number of points delays its thread, besides the test's own delays.
_CHAOS_ONE_IN = 24
_SWITCH_SECONDS = 2e-5


class Delays:
    """The hook at KVM's ordering points: delays a thread at the test's points, and elsewhere now and then."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness
        self._named = {
            (delay.thread, delay.point, delay.mode): (number, (delay.microseconds or _LINGER) * 1e-6)
            for number, delay in enumerate(harness.test.delays)
        }
        # The numbers of the delays with points that their threads have reached.
        self.passed: set[int] = set()
        self._random = Random(0)
        self._everywhere = False

    def reseed(self, seed: int) -> None:
        self._random.seed(seed)
        self._everywhere = seed % 2 == 1

    def __call__(self, cpu: Cpu, kind: PointKind, obj: object, mode: Mode) -> None:
        thread = self._harness.thread_on(cpu)
        if thread is None:
            return
        delay = None
        if self._named:
            named, name = self._named, thread.name
            delay = named.get((name, kind, mode)) or named.get((name, kind, ""))
        if delay is not None:
            number, seconds = delay
            self.passed.add(number)
            if self._random.random() < 0.6:
                time.sleep(self._random.random() * seconds)
        elif self._everywhere and self._random.random() * _CHAOS_ONE_IN < 1:
            time.sleep(self._random.random() * _LINGER * 1e-6)


class Worker(threading.Thread):
    """One thread of the test, execution after execution."""

    def __init__(self, runner: Runner, number: int) -> None:
        super().__init__(name=f"litmus {number}", daemon=True)
        self.runner = runner
        self.number = number
        self.go = threading.Semaphore(0)
        self.start_late = 0.0
        self.thread: LitmusThread | None = None

    def run(self) -> None:
        while True:
            self.go.acquire()
            if self.thread is None:
                return
            try:
                if self.start_late:
                    time.sleep(self.start_late)
                self.thread.run()
            except MachineStopped:
                pass
            except BaseException as error:
                self.runner.failed(self.thread.name, error)
            self.runner.arrived()


class Watchdog(threading.Thread):
    """Checks that init and final end: the thread that runs them cannot check that itself."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(name="litmus watchdog", daemon=True)
        self.runner = runner
        self.end = threading.Event()

    def run(self) -> None:
        while not self.end.wait(STUCK_SECONDS / 4):
            self.runner.look_at_sequences()


class Runner:
    """Runs one test on one machine, under one policy after the other."""

    def __init__(self, test: LitmusTest, seed: int) -> None:
        self.test = test
        self.seed = seed
        self.machine = Machine(machine_config(test, seed))
        self.errors: list[tuple[str, BaseException]] = []
        self._left = 0
        self._lock = threading.Lock()
        self._finished = threading.Semaphore(0)
        self._counts = ffi.new("uint64_t[]", len(VIOLATION_KINDS))
        self._evidence = Evidence(self.machine)
        machine = self.machine
        for cpu in machine.cpus[machine.pcpus :]:
            lib.cpu_online(machine.m, cpu.id)
        self._rcu = threading.Thread(
            target=lib.rcu_thread, args=(machine.m, rcu_cpu(machine).id), daemon=True
        )
        self._harness: Harness | None = None
        self._leaked = False
        self._watchdog = Watchdog(self)
        self._workers = [Worker(self, i) for i in range(len(test.threads))]
        try:
            for thread in self._threads():
                thread.start()
        except RuntimeError:  # the system can start no further thread
            self.close()
            raise

    # --- called by other threads ----------------------------------------------------------------------------

    def failed(self, thread: str, error: BaseException) -> None:
        self.errors.append((thread, error))
        self.machine.stop()

    def arrived(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._finished.release()

    def look_at_sequences(self) -> None:
        alone = None if self._harness is None else self._harness.alone
        if alone is None or time.monotonic() - alone.since < STUCK_SECONDS:
            return
        failure = LitmusFailure(f"{alone.name}: {alone.what!r} waits for ever: no other thread runs")
        self.failed(alone.name, unreturned() or failure)

    # --- running --------------------------------------------------------------------------------------------

    def run(
        self,
        policy: Policy,
        executions: int,
        seed: int,
        progress: Callable[[int], None] = lambda done: None,
        stop_at: int = 0,
    ) -> Outcome:
        """Run executions seed, seed + 1, ...; with stop_at, until this number of them has violated."""
        with policy.confined():
            return self._run(policy, executions, seed, progress, stop_at)

    def _run(
        self, policy: Policy, executions: int, seed: int, progress: Callable[[int], None], stop_at: int
    ) -> Outcome:
        harness = self._harness = Harness(self.test, policy, self.machine)
        outcome = Outcome(self.test.name, policy.name)
        delays = Delays(harness)
        self.machine.install(delays)
        try:
            for i in range(executions):
                self._execute(harness, delays, outcome, seed + i)
                progress(1)
                if stop_at and outcome.violating >= stop_at:
                    break
            harness.teardown()
            self._leaked = bool(left_over(self.machine, ()))
        except KVM_FAILS as error:
            self._explain_failure(outcome, error)
        finally:
            self.machine.install(None)
            outcome.delays_passed |= delays.passed
        return outcome

    def _execute(self, harness: Harness, delays: Delays, outcome: Outcome, seed: int) -> None:
        violations = self._violations()
        lib.oracle_forget(self.machine.m)
        random = Random(seed)
        # With a seed that is a multiple of three, all threads start at once.
        spread = _START_SPREAD * 1e-6 if seed % 3 else 0.0
        delays.reseed(seed)
        harness.reset()
        harness.run_init()
        self._evidence.begin(harness.kvms)
        self._left = len(self._workers)
        for worker, thread in zip(self._workers, harness.threads.values(), strict=True):
            worker.thread = thread
            worker.start_late = random.random() * spread
        for worker in self._workers:
            worker.go.release()
        if not self._finished.acquire(timeout=STUCK_SECONDS):
            self._stuck(harness)
        if self.errors:
            raise MachineStopped
        harness.run_final()
        add(outcome.evidence, self._evidence.found(harness.kvms))
        harness.end_migrations()
        add(outcome.evidence, self._evidence.compared(harness.kvms))
        outcome.executions += 1
        self._judge(outcome, violations, seed, harness)

    def _stuck(self, harness: Harness) -> None:
        threads = harness.threads.values()
        waiting = ", ".join(
            f"{thread.name} after {harness.progress(thread)} operations" for thread in threads
        )
        failure = LitmusFailure(f"no thread makes progress: {waiting}")
        self.errors.append(("runner", unreturned() or failure))
        self.machine.stop()
        self._finished.acquire(timeout=STUCK_SECONDS)

    def _judge(self, outcome: Outcome, before: list[int], seed: int, harness: Harness) -> None:
        after = self._violations()
        if after == before:
            self._count_end(outcome, seed, harness)
            return
        outcome.violating += 1
        if outcome.first is None:
            outcome.first = seed
            outcome.reports = self._reports(harness)
        for kind, old, new in zip(VIOLATION_KINDS, before, after, strict=True):
            if new != old:
                outcome.kinds[kind] = outcome.kinds.get(kind, 0) + new - old

    def _count_end(self, outcome: Outcome, seed: int, harness: Harness) -> None:
        """Look for a leak, or for structures that disagree, when this execution's RCU callbacks have run."""
        harness.main.check(lib.rcu_barrier(harness.main.m, harness.main.id))
        found = at_the_end(self.machine, harness.kvms)
        if not found:
            return
        kind = found.partition(":")[0]
        outcome.violating += 1
        outcome.kinds[kind] = outcome.kinds.get(kind, 0) + 1
        if outcome.first is None:
            outcome.first = seed
            outcome.reports = (Report(kind, (kind,), found, {}),)

    def _reports(self, harness: Harness) -> tuple[Report, ...]:
        """Return this execution's reports: the first of each kind."""
        names: dict[int, str] = {cpu.id: f"pcpu{cpu.id}" for cpu in self.machine.cpus[: self.machine.pcpus]}
        names |= {thread.home.id: name for name, thread in harness.threads.items()}
        names |= {rcu_cpu(self.machine).id: "rcu", harness.main.id: VMM}
        found: dict[str, Report] = {}
        for report in ReportCollector(self.machine.m).finish(names, harness.policy.mutants()):
            found.setdefault(report.kind, report)
        return tuple(found.values())

    def _violations(self) -> list[int]:
        lib.oracle_counts(self.machine.m, self._counts)
        return list(self._counts)

    def _explain_failure(self, outcome: Outcome, error: BaseException) -> None:
        name, cause = self.errors[0] if self.errors else ("runner", error)
        if isinstance(cause, BadInput):
            raise cause
        if not isinstance(cause, KVM_FAILS):
            raise RuntimeError(f"litmus test {self.test.name}, policy {outcome.policy}, {name}") from cause
        outcome.failure = failure_text(name, cause)
        # The next policy cannot use the VMs that are left.
        self.machine.stop()

    @property
    def usable(self) -> bool:
        """Return False after a failure, which has stopped the machine, and after a policy that has leaked.

        The next policy would be charged with the pages that are left.
        """
        return not self.machine.stopping and not self._leaked

    def close(self) -> None:
        self.machine.stop()
        self._watchdog.end.set()
        for worker in self._workers:
            worker.thread = None
            worker.go.release()
        for thread in self._threads():
            if thread.ident is not None:  # has been started
                thread.join(STUCK_SECONDS)
        if not any(thread.is_alive() for thread in self._threads()):
            self.machine.destroy()

    def _threads(self) -> tuple[threading.Thread, ...]:
        return (*self._workers, self._rcu, self._watchdog)


@contextmanager
def running(test: LitmusTest, seed: int = 0) -> Iterator[Runner]:
    """Provide a machine for the test, with threads that release the GIL often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    runner = Runner(test, seed)
    try:
        yield runner
    finally:
        runner.close()
        sys.setswitchinterval(interval)


def run_test(test: LitmusTest, policy: Policy, executions: int, seed: int = 0, **options: Any) -> Outcome:
    """Run one test under one policy, on a machine of its own."""
    with running(test, seed) as runner:
        return runner.run(policy, executions, seed, **options)
