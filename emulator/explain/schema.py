"""Schemas of the files that `flushlab explain` reads.  Code behind the check relies on them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# -1: unknown.
_Number = Annotated[int, Field(ge=-1, lt=1 << 64)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Event(_Part):
    kind: str
    cpu: _Number = 0
    vm: _Number = 0
    a: _Number = 0
    b: _Number = 0
    more: _Number = 0
    text: str = ""


class _TimedEvent(_Event):
    time_ns: _Number


class _Entry(_Part):
    kind: str = ""
    size: str = ""
    page: _Number = 0
    frame: _Number = 0
    ep4ta: _Number = 0
    vpid: _Number = 0
    pcid: _Number = 0
    filled_by_vcpu: _Number = 0
    clock: _Number = 0


class _Wait(_Part):
    """A thread that waits for ever."""

    thread: str
    cpu: _Number
    function: str = ""
    waits_for: str
    held_by: list[str] = []


class _Violation(_Part):
    kind: str = ""
    kinds: list[str] | None = None
    pcpu: _Number = 0
    vm: _Number = 0
    vcpu: _Number = 0
    access: str = ""
    gfn: _Number = 0
    frame: _Number = 0
    walk_level: _Number = 0
    promise: str = ""
    live_sptes: _Number = 0
    text: str = ""
    entry: _Entry | None = None
    unsafe_answers: list[str] = []
    waits: list[_Wait] | None = None
    actors: dict[str, str] | None = None
    events: list[_Event] | None = None


class ReportSchema(_Violation):
    """A violation of `run` or `litmus`, with times."""

    time_ns: _Number = 0
    events: list[_TimedEvent]  # type: ignore[assignment]


class _Step(_Part):
    thread: str = ""
    cpu: _Number = 0
    kind: str = ""
    object: str = ""
    text: str = ""
    events: list[_Event] | None = None


class CounterexampleSchema(_Part):
    """A counterexample that `explore` has written."""

    violation: _Violation | None
    steps: list[_Step]
    final: list[_Event] = []
    actors: dict[str, str] | None = None
