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


class _CachedEntry(_Part):
    cpu: _Number
    page: _Number
    size: str
    kind: str
    frame: _Number
    ep4ta: _Number


class _Operation(_Part):
    n: _Number
    text: Annotated[str, Field(pattern=r"\S")]


class _Access(_Part):
    completed: bool
    tlb: str
    exit: str = ""
    frame: _Number = 0


class _Changes(_Part):
    filled: list[_CachedEntry] = []
    dropped: list[_CachedEntry] = []
    dangers: dict[str, _Number] = {}


class _Did(_Changes):
    op: _Operation | None = None
    done: list[_Operation] = []
    access: _Access | None = None


class _TracedStep(_Step):
    n: int
    mode: str = ""
    did: _Did | None = None


class _Alone(_Changes):
    """Operations of `final`."""

    thread: str
    cpu: _Number
    ops: list[str]
    events: list[_Event]


class _Thread(_Part):
    vcpu: _Number | None
    home: _Number


class _Trace(_Part):
    init: list[str]
    threads: dict[str, _Thread]
    tlbs: list[_CachedEntry]
    final: list[_Alone]
    tlbs_at_end: list[_CachedEntry]
    needs: list[str]
    evidence: dict[str, _Number]
    ended: str
    unfinished: _Step | None = None


class TraceSchema(CounterexampleSchema):
    """A trace that `explore` has written, whatever its verdict, or a recording without a violation."""

    test: str = ""
    policy: str = ""
    verdict: str = ""
    steps: list[_TracedStep]  # type: ignore[assignment]
    trace: _Trace | None = None
