"""Counterexamples: an execution written to a file, step by step, and its replay."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from emulator.errors import BadInput
from emulator.explain.events import EventTail
from emulator.explore.engine.scheduler import Divergence, Execution, Task, spelled
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.options import NONE, ExploreOptions
from emulator.explore.machine.policy_reads import NOTHING, Known
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.strategies.sampling import Replay
from emulator.litmus.loader import parse_test
from emulator.litmus.policies import named_policy
from emulator.output import write_file
from emulator.policy import check_policy
from emulator.report.violation import ReportCollector
from emulator.validation import first_error, read_json

FORMAT: Final = 1
_EXPECTED = "a counterexample of flushlab explore"
# Keeps the report of a difference on one line, for any contents of a file.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_TIME = re.compile(r",? *[-+]?\d+\.\d us( before)?")
# Values that depend on the time, or on how often frames were freed before.
_UNSTABLE = ("time_ns", "promise_time_ns", "custody")


@dataclass(slots=True)
class Recording:
    """One execution, step by step.

    violation: the oracle's report, or the deadlock; None if there is neither.  final: the events of the
    test's last operations, if the violation is there.  watched: the accesses of a user's policy that are
    steps.
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

    def document(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "test": self.test,
            "policy": self.policy,
            "memory": self.options.memory,
            **self.options.document(),
            "context_switches": sum(a != b for a, b in zip(self.schedule, self.schedule[1:], strict=False)),
            **({"watched": self.watched.document()} if self.watched else {}),
            "schedule": self.schedule,
            "actors": self.actors,
            "steps": self.steps,
            **({"final": self.final} if self.final else {}),
            "violation": self.violation,
            "source": self.source,
        }

    def write(self, path: Path) -> None:
        write_file("", path, json.dumps(self.document(), indent=1) + "\n")


class _Recorder:
    """Records each step as it ends."""

    def __init__(self, program: LitmusProgram, execution: Execution) -> None:
        self.program = program
        self.execution = execution
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
                "events": [event.as_dict() for event in self.tail.take()],
            }
        )
        if self.execution.stopped and self.violation is None:
            self.violation = self.report()

    def end(self, outcome: str) -> tuple[str, ...]:
        """Complete the recording with the execution's outcome, and return the kinds of its violations."""
        if self.violation is None and outcome:
            kind, _, deadlocked = outcome.partition(": ")
            kinds = [kind] if deadlocked else outcome.split(", ")
            self.violation = None if deadlocked else self.report(in_final=True)
            if self.violation is None:
                self.violation = {"kind": kinds[0], "kinds": kinds, "text": outcome}
                if deadlocked:
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


def record(program: LitmusProgram, schedule: tuple[int, ...]) -> Recording:
    """Execute the schedule once more, and record each step."""
    strategy = Replay(schedule, then_any=True)
    execution = Execution(program.objects, strategy)
    program.start(execution)
    recorder = _Recorder(program, execution)
    execution.on_step = recorder
    if execution.stopped:
        recorder.violation = recorder.report()  # before any task has taken a step
    strategy.begin(len(execution.tasks))
    execution.run()
    names = [task.name for task in execution.tasks]
    actors = {str(cpu): name for cpu, name in program.names().items()}
    if execution.failure is not None:
        program.abandon(execution)
        raise execution.failure
    kinds = recorder.end(program.finish(execution))
    return Recording(
        test=program.test.name,
        source=program.test.text,
        policy=program.policy.spelled(),
        schedule=[names[index] for index in strategy.schedule()],
        steps=recorder.steps,
        actors=actors,
        violation=recorder.violation,
        final=recorder.final,
        kinds=kinds,
        options=program.options,
        watched=NOTHING if program.reads is None else program.reads.known,
    )


class _Step(BaseModel):
    """The fields of a step that a replay is compared with."""

    model_config = ConfigDict(strict=True)

    n: int
    thread: str
    cpu: int
    kind: str
    object: str
    mode: str
    text: str
    reads: list[str]
    writes: list[str]
    events: list[dict[str, Any]]


class _Document(BaseModel):
    model_config = ConfigDict(strict=True)

    format: Literal[1]  # FORMAT
    test: str
    source: str
    policy: str
    watched: dict[str, list[str]] = {}
    schedule: list[str]
    steps: list[_Step]
    final: list[dict[str, Any]] = []
    violation: dict[str, Any] | None


def load(path: Path) -> dict[str, Any]:
    """Return a counterexample's document; raises BadInput."""
    document = read_json(path, _EXPECTED)
    try:
        found = _find(document)
        if found is None:
            raise BadInput(str(path), "no counterexample in it", _EXPECTED)
        _Document.model_validate(found)
    except ValidationError as error:
        raise BadInput(str(path), *first_error(error, _Document)) from error
    except RecursionError as error:
        raise BadInput(str(path), "nested too deeply", _EXPECTED) from error
    return found


def _find(document: Any) -> dict[str, Any] | None:
    """Return the counterexample of a file of its own, or the first one in a document of `explore --json`."""
    if isinstance(document, dict):
        if {"schedule", "steps"} <= document.keys():
            return document
        document = list(document.values())
    if isinstance(document, list):
        for item in document:
            found = _find(item)
            if found is not None:
                return found
    return None


def replay(path: Path) -> Recording:
    """Run a recorded execution again; raises Divergence if a step differs from its recording."""
    document = load(path)
    check_policy(document["policy"], f"{path}: policy")
    try:
        test = parse_test(document["source"], document["test"], None)
        policy = named_policy(document["policy"])
        options = ExploreOptions.of(document)
    except BadInput as error:
        raise BadInput(str(path), str(error)) from error
    except ValueError as error:
        raise BadInput(str(path), str(error), _EXPECTED) from error
    known = Known.of(document.get("watched", {}))
    with policy.confined():
        program = LitmusProgram(test, policy, options, known=known, frozen=True)
        again = _replayed(document, program, path)
    _compare(document, json.loads(json.dumps(again.document())))
    return again


def _replayed(document: dict[str, Any], program: LitmusProgram, path: Path) -> Recording:
    try:
        with instrument(program.control):
            names = program.task_names()
            unknown = sorted(set(document["schedule"]) - set(names))
            if unknown:
                raise BadInput(f"{path}: schedule", unknown[0], f"one of {', '.join(names)}")
            schedule = tuple(names.index(name) for name in document["schedule"])
            return record(program, schedule)
    finally:
        program.close()


def _compare(before: dict[str, Any], again: dict[str, Any]) -> None:
    for old, new in zip(before["steps"], again["steps"], strict=False):
        if old != new:
            key = next(key for key in old if old[key] != new.get(key))
            now, then = _SHORT.repr(new.get(key)), _SHORT.repr(old[key])
            raise Divergence(f"step {old['n']} of {old['thread']}: {key} is {now}, was {then}")
    if len(before["steps"]) != len(again["steps"]):
        raise Divergence(f"{len(again['steps'])} steps, but {len(before['steps'])} were recorded")
    for key in ("schedule", "steps", "final", "violation"):
        if before.get(key) != again.get(key):
            raise Divergence(f"{key} is not what was recorded")
