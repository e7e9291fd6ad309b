"""Executions written to files, step by step: counterexamples, and traces of executions that need not violate
anything.  replay.py runs them again.

A trace holds more than a counterexample: the actions of each step (observe.py), and the end of the execution.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from emulator.explain.events import EventTail
from emulator.explore.engine.scheduler import Execution, Task, spelled
from emulator.explore.machine.options import NONE, ExploreOptions
from emulator.explore.machine.policy_reads import NOTHING, Known
from emulator.explore.machine.program import DEADLOCK, LitmusProgram, wait_text
from emulator.explore.results.observe import Observer
from emulator.explore.strategies.sampling import Replay, Sampler
from emulator.explore.strategies.search import Met
from emulator.litmus.failure import LitmusFailure
from emulator.litmus.model import SAFE
from emulator.litmus.ops import Op
from emulator.litmus.verdict import FAILED, VIOLATIONS
from emulator.output import write_file
from emulator.report.violation import ReportCollector

FORMAT: Final = 1
_TIME = re.compile(r",? *[-+]?\d+\.\d us( before)?")
# Values that depend on the time, or on how often frames were freed before.
_UNSTABLE = ("time_ns", "promise_time_ns", "custody")


@dataclass(slots=True)
class Recording:
    """One execution, step by step.

    violation: the oracle's report, or the deadlock; None if there is neither.  final: the events of the
    test's last operations, if the violation is there.  watched: the accesses of a user's policy that are
    steps.  patches: the name and the text of each patch file of the policy.
    kernel, sources: the version of the tree that was explored in the place of the model's code, and the hash
    of its sources; "" for none.
    verdict, trace: of a trace only: SAFE, VIOLATIONS or FAILED, and its content beside the steps.
    """

    test: str
    source: str  # the test's text
    policy: str
    schedule: list[str]
    steps: list[dict[str, Any]]
    actors: dict[str, str]
    violation: dict[str, Any] | None
    final: list[dict[str, Any]] = field(default_factory=list)
    kinds: tuple[str, ...] = field(default=())
    options: ExploreOptions = field(default=NONE)
    watched: Known = field(default=NOTHING)
    patches: tuple[tuple[str, str], ...] = ()
    kernel: str = ""
    sources: str = ""
    verdict: str = ""
    trace: dict[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "test": self.test,
            "policy": self.policy,
            "memory": self.options.memory,
            **self.options.document(),
            "context_switches": sum(a != b for a, b in zip(self.schedule, self.schedule[1:], strict=False)),
            **({"patches": [list(part) for part in self.patches]} if self.patches else {}),
            **({"kernel": self.kernel, "sources": self.sources} if self.kernel else {}),
            **({"watched": self.watched.document()} if self.watched else {}),
            "schedule": self.schedule,
            "actors": self.actors,
            "steps": self.steps,
            **({"final": self.final} if self.final else {}),
            "violation": self.violation,
            **({"verdict": self.verdict, "trace": self.trace} if self.trace is not None else {}),
            "source": self.source,
        }

    def write(self, path: Path) -> None:
        write_file("", path, json.dumps(self.document(), indent=1) + "\n")


class _Recorder:
    """Records each step as it ends; `observer`: and its actions."""

    def __init__(
        self, program: LitmusProgram, execution: Execution, observer: Observer | None = None
    ) -> None:
        self.program = program
        self.execution = execution
        self.observer = observer
        self.steps: list[dict[str, Any]] = []
        self.tail = EventTail(program.machine.m, len(program.machine.cpus))
        self.final: list[dict[str, Any]] = []
        self.violation: dict[str, Any] | None = None

    def __call__(self, task: Task) -> None:
        kind, obj, mode = task.label
        objects = self.program.objects
        touched = _names(objects.of(task.reads & ~task.writes)), _names(objects.of(task.writes))
        self.steps.append(
            {
                "n": len(self.steps),
                "thread": task.name,
                "cpu": self.program.cpu_of(task),
                "kind": kind,
                "object": spelled(obj),
                "mode": "write" if task.writes and mode == "write" else "read" if not task.writes else mode,
                "text": spelled(kind, obj),
                "reads": touched[0],
                "writes": touched[1],
                "events": self.take(),
                **({"did": self.observer.did(task)} if self.observer is not None else {}),
            }
        )
        if self.execution.stopped and self.violation is None:
            self.violation = self.report()

    def take(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        return [event.as_dict() for event in self.tail.take()]

    def ran_alone(self, thread: str, ops: tuple[Op, ...]) -> None:
        """Record operations of `final`."""
        if self.observer is not None:
            self.observer.ran_alone(thread, ops, self.take())

    def end(self, outcome: str) -> tuple[str, ...]:
        """Complete the recording with the execution's outcome, and return the kinds of its violations."""
        if self.violation is None and outcome:
            kind, _, explained = outcome.partition(": ")
            kinds = [kind] if explained else outcome.split(", ")
            self.violation = None if explained else self.report(in_final=True)
            if self.violation is None:
                self.violation = {"kind": kinds[0], "kinds": kinds, "text": outcome}
                if kind == DEADLOCK:
                    self.violation["waits"] = self.program.waits
            # Other accesses of `final` may have caused violations of other kinds.
            return tuple(dict.fromkeys([*self.violation["kinds"], *kinds]))
        return tuple(self.violation["kinds"]) if self.violation is not None else ()

    def report(self, in_final: bool = False) -> dict[str, Any] | None:
        program = self.program
        collector = ReportCollector(program.machine.m)
        reports = collector.finish(program.names(), program.harness.policy.mutants())
        if not reports:
            return None
        report = reports[0]
        if in_final:
            used = report.details["time_ns"]
            self.final = [event.as_dict() for event in self.tail.take() if event.time <= used]
        found: dict[str, Any] = _timeless(
            {"kind": report.kind, "kinds": list(report.kinds), "text": report.text, **report.details}
        )
        return found


def _timeless(value: Any) -> Any:
    """Return the value without parts that differ between two runs of one schedule."""
    if isinstance(value, str):
        return _TIME.sub("", value)
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in _UNSTABLE}
    if isinstance(value, list | tuple):
        return [_timeless(item) for item in value]
    return value


def _names(objects: list[Hashable]) -> list[str]:
    return sorted(spelled(obj) for obj in objects if obj != ("everything",))


def record(program: LitmusProgram, schedule: tuple[int, ...], *, trace: bool = False) -> Recording:
    """Execute the schedule once more, and record each step; `trace`: as a trace, even if it fails."""
    strategy = Replay(schedule, then_any=True)
    execution, recorder = recorded(program, strategy, trace=trace)
    names = [task.name for task in execution.tasks]
    actors = {str(cpu): name for cpu, name in program.names().items()}
    failure, kinds = execution.failure, tuple[str, ...]()
    if failure is not None:
        program.abandon(execution)
    else:
        try:
            kinds = recorder.end(_finished(program, execution, recorder))
        except LitmusFailure as error:
            failure = error
    if failure is not None and not (trace and isinstance(failure, LitmusFailure)):
        raise failure
    recording = Recording(
        test=program.test.name,
        source=program.test.text,
        policy=program.policy.spelled(),
        patches=() if program.policy.patch is None else program.policy.patch.texts,
        schedule=[names[index] for index in strategy.schedule()],
        steps=recorder.steps,
        actors=actors,
        violation=recorder.violation,
        final=recorder.final,
        kinds=kinds,
        options=program.options,
        watched=NOTHING if program.reads is None else program.reads.known,
    )
    if recorder.observer is not None:
        recording.verdict = FAILED if failure is not None else VIOLATIONS if kinds else SAFE
        recording.trace = _trace(program, execution, recorder, failure)
    return recording


def recorded(
    program: LitmusProgram, strategy: Sampler, *, trace: bool = False
) -> tuple[Execution, _Recorder]:
    """Run one execution up to its end, which `program.finish()` must follow, and record its steps."""
    execution = Execution(program.objects, strategy)
    program.start(execution)
    recorder = _Recorder(program, execution, Observer(program) if trace else None)
    execution.on_step = recorder
    if execution.stopped:
        recorder.violation = recorder.report()  # before any task has taken a step
    strategy.begin(len(execution.tasks))
    execution.run()
    return execution, recorder


def _finished(program: LitmusProgram, execution: Execution, recorder: _Recorder) -> str:
    program.control.on_alone = recorder.ran_alone if recorder.observer is not None else None
    try:
        return program.finish(execution)
    finally:
        program.control.on_alone = None


def _trace(
    program: LitmusProgram, execution: Execution, recorder: _Recorder, failure: BaseException | None
) -> dict[str, Any]:
    """Return a trace's content beside its steps: its beginning, its dangers, and its end."""
    observer, test = recorder.observer, program.test
    assert observer is not None
    met = program.met() if failure is None else Met(False, {})
    return {
        "init": list(test.init),
        "threads": observer.facts(),
        "tlbs": observer.at_start,
        "final": observer.alone,
        "tlbs_at_end": observer.entries(),
        "needs": list(test.expect.needs),
        "met": met.precondition,
        "evidence": {name: n for name, n in sorted(met.evidence.items()) if n},
        "ended": _ended(program, execution, failure),
        **({"unfinished": _unfinished(program, execution, recorder)} if execution.crashed else {}),
    }


def _ended(program: LitmusProgram, execution: Execution, failure: BaseException | None) -> str:
    """Return why the execution ended, as a sentence without its full stop."""
    if failure is not None:
        return f"it cannot go on: {failure}"
    if execution.deadlock:
        return "blocked for ever: " + "; ".join(map(wait_text, program.waits))
    if execution.stopped:
        return "at the first violation"
    if execution.too_long:
        return f"after {execution.limit:,} steps, the most that an execution has"
    return "all operations are done"


def _unfinished(program: LitmusProgram, execution: Execution, recorder: _Recorder) -> dict[str, Any]:
    """Return the step in which the execution failed: its end never came."""
    task = execution.tasks[execution.last]
    text = spelled(*task.label[:2])
    cpu = program.cpu_of(task)
    return {"thread": task.name, "cpu": cpu, "text": text, "events": recorder.take()}
