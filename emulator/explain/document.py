"""Files with violations: documents of `run --json` and `litmus --json`, single reports, counterexamples.

A report is any object with a `kind` and `events` (emulator.report.violation writes them), wherever in the
file; a counterexample has a `schedule`, its `steps` carry the events, and its `violation` is a report.  A
trace of explore without a violation is a case, too: all that happened in it is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from emulator.errors import BadInput
from emulator.explain.analysis import RaceAnalysis
from emulator.explain.course import Course, course_of
from emulator.explain.events import Event
from emulator.explain.facts import INCONSISTENT, Facts
from emulator.explain.meanings import REVOKE
from emulator.explain.moments import Moment
from emulator.explain.schema import CounterexampleSchema, ReportSchema, TraceSchema
from emulator.validation import first_error, read_json
from native import VIOLATION_KINDS

# A litmus test's machine gives user space this name, before and after the threads.
VMM = "vmm"
_EXPECTED = "JSON of flushlab run, litmus or explore, with a violation"
_DRAWN = "a violation with events, or a litmus test that ends so, from flushlab explore --output"


@dataclass(frozen=True, slots=True)
class Case:
    """One violation to be explained, or the whole `course` of an execution instead.

    timed: the events' times are nanoseconds, not just an order.
    """

    where: str
    policy: str
    report: Mapping[str, Any]
    facts: Facts
    events: tuple[Event, ...]
    names: Mapping[int, str]
    timed: bool = True
    course: Course | None = None
    analysis: RaceAnalysis = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "analysis", RaceAnalysis(self.facts, self.events))

    @property
    def moments(self) -> list[Moment]:
        return self.analysis.moments if self.course is None else self.course.moments

    def label(self, cpu: int) -> str:
        """Return the title of the CPU's column: CPU0 for a pCPU, as in changelogs, or a thread's name."""
        name = self.names.get(cpu, "")
        return name.replace("pcpu", "CPU") if name else f"CPU{cpu}"

    def levels(self, cpu: int) -> str:
        """Return which guests ran on the CPU, for its column's title, if nested guests (L2) did."""
        events = self.events or tuple(moment.event for moment in self.moments)
        entered = {bool(event.nested) for event in events if event.kind == "entry" and event.cpu == cpu}
        return "" if True not in entered else " (L1, L2)" if False in entered else " (L2)"

    @property
    def columns(self) -> list[int]:
        """Return the CPUs of the moments: pCPUs first, then threads, user space last."""
        cpus = dict.fromkeys(moment.cpu for moment in self.moments)

        def place(cpu: int) -> tuple[bool, bool, int]:
            label = self.label(cpu)
            # Older diagrams have RCU's column between the pCPUs and the threads.
            last = label == VMM or (self.course is not None and label == "rcu")
            return not label.startswith("CPU"), last, cpu

        return sorted(cpus, key=place)

    def quality(self) -> tuple[int, int, int]:
        """Rank this case: greater is better.

        Compared in turn: how many of revocation and culprit are known, how specific the kind is, and how few
        CPUs take part.
        """
        known = (self.analysis.moment(REVOKE), self.analysis.culprit)
        kinds = VIOLATION_KINDS
        rank = kinds.index(self.facts.kind) if self.facts.kind in kinds else len(kinds)
        return sum(moment is not None for moment in known), -rank, -len(self.columns)


def load_cases(path: Path) -> list[Case]:
    """Return the violations of a file in the file's order; raise BadInput if there are none."""
    document = read_json(path, _EXPECTED)
    try:
        cases = list(_cases(document, {}))
        audited = not cases and INCONSISTENT in _kinds(document)
    except _Damaged as error:
        raise BadInput(str(path), f"a damaged report: {error.found}", error.expected) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(str(path), f"a damaged report: {type(error).__name__}: {error}", _EXPECTED) from error
    except RecursionError as error:
        raise BadInput(str(path), "nested too deeply", _EXPECTED) from error
    if cases:
        return cases
    if audited:
        raise BadInput(str(path), "inconsistent, which an audit found after the run: no event tells", _DRAWN)
    raise BadInput(str(path), "no violation with events in it", _EXPECTED)


def _kinds(value: Any) -> Iterator[str]:
    """Yield the kinds of all reports in a document."""
    if isinstance(value, dict) and isinstance(value.get("kind"), str):
        yield value["kind"]
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _kinds(item)


class _Damaged(Exception):
    def __init__(self, found: str, expected: str | None) -> None:
        super().__init__(found)
        self.found, self.expected = found, expected


def _check(value: Mapping[str, Any], schema: type[BaseModel]) -> None:
    try:
        schema.model_validate(value)
    except ValidationError as error:
        raise _Damaged(*first_error(error, schema)) from error


def _cases(value: Any, context: Mapping[str, str]) -> Iterator[Case]:
    if isinstance(value, list):
        for item in value:
            yield from _cases(item, context)
    elif isinstance(value, dict):
        context = {**context, **_context(value)}
        if isinstance(value.get("steps"), list) and "violation" in value:
            build = _counterexample if value["violation"] is not None else _course
            yield build(value, context)
        elif "kind" in value and value.get("events"):
            yield _report(value, context)
        else:
            for item in value.values():
                yield from _cases(item, context)


def _context(value: Mapping[str, Any]) -> dict[str, str]:
    """Return the test, scenario and policy that this object around a report names."""
    context = {key: value[key] for key in ("test", "scenario") if isinstance(value.get(key), str)}
    policy = value.get("policy")
    if isinstance(policy, dict):
        policy = policy.get("name")
    return {**context, "policy": policy} if isinstance(policy, str) else context


def _where(context: Mapping[str, str]) -> str:
    return context.get("test") or context.get("scenario") or ""


def _names(value: Mapping[str, Any]) -> dict[int, str]:
    return {int(cpu): str(name) for cpu, name in (value.get("actors") or {}).items()}


def _report(value: Mapping[str, Any], context: Mapping[str, str]) -> Case:
    _check(value, ReportSchema)
    events = tuple(Event.of_dict(event) for event in value["events"])
    policy = context.get("policy", "")
    return Case(_where(context), policy, value, Facts.of_report(value), events, _names(value))


def _counterexample(value: Mapping[str, Any], context: Mapping[str, str]) -> Case:
    """Build a case of explore's counterexample.  Time stands still in explore, so events are numbered in the
    order of the steps."""
    _check(value, CounterexampleSchema)
    report = dict(value["violation"] or {})
    steps = [event for step in value["steps"] for event in _events_of_step(step)]
    steps += value.get("final") or []
    waits = [_wait(wait) for wait in report.get("waits") or []]
    recorded = [*_before(report.get("events") or [], steps), *steps, *waits]
    events = [Event.of_dict(event, time) for time, event in enumerate(recorded, start=1)]
    report.pop("time_ns", None)
    report.pop("promise_time_ns", None)
    names = _names(value) or _names(report) or _names_of_steps(value["steps"])
    facts = Facts.of_report(report)
    return Case(_where(context), context.get("policy", ""), report, facts, tuple(events), names, timed=False)


def _course(value: Mapping[str, Any], context: Mapping[str, str]) -> Case:
    """Build the case of a recording without a violation."""
    return course_case({"test": _where(context), **context, **value})


def course_case(document: Mapping[str, Any], every_step: bool = False) -> Case:
    """Build the case of a recording that shows its whole course; `every_step`: with a row for each step."""
    _check(document, TraceSchema)
    course = course_of(document, every_step)
    events = tuple(line.event for line in course.lines)
    names = _names(document) or _names_of_steps(document["steps"])
    facts = Facts(kinds=(course.violation,) if course.violation else ("no violation",))
    policy = str(document.get("policy", ""))
    return Case(str(document.get("test", "")), policy, {}, facts, events, names, timed=False, course=course)


def _wait(wait: Mapping[str, Any]) -> dict[str, Any]:
    """Return the place where a thread waits for ever, as the last event of its CPU."""
    where = f"{wait['function']}(): " if wait.get("function") else ""
    held = f", held by {' and '.join(map(str, wait.get('held_by') or ()))}" if wait.get("held_by") else ""
    return {"kind": "waits", "cpu": int(wait["cpu"]), "text": f"{where}waits for {wait['waits_for']}{held}"}


def _before(report: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events that the report has from before the first step, which are those of init."""
    rest, earlier = list(steps), []
    for event in reversed(report):
        if event in rest:
            rest.remove(event)
        else:
            earlier.append(event)
    return earlier[::-1]


def _events_of_step(step: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the events of a step; for a step without events, one event that describes it."""
    events = step.get("events")
    if events:
        return list(events)
    text = str(step.get("text") or f"{step.get('kind', '')} {step.get('object', '')}").strip()
    return [{"kind": "step", "cpu": int(step.get("cpu", 0)), "text": text}]


def _names_of_steps(steps: list[Mapping[str, Any]]) -> dict[int, str]:
    return {int(step["cpu"]): str(step["thread"]) for step in steps if "cpu" in step and "thread" in step}
