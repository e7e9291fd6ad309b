"""Documents about one race or one tree: explain; explore --trace, --replay, --stop-at, --audit; drift."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from emulator.schemas.documents import Part

# --- flushlab explain ---------------------------------------------------------------------------------------


class ActorPart(Part):
    cpu: int
    label: str


class MomentPart(Part):
    """A line of the diagram: its time or step, where the file has one, and its part in the race."""

    cpu: int
    text: list[str]
    part: str
    mark: int
    event: str
    time_ns: int | None = None
    step: int | None = None


class LegendPart(Part):
    mark: int
    part: str
    text: str


class ExplainDocument(Part):
    """The document of `flushlab explain --format json`; a trace has an opening and a closing."""

    flushlab_explanation: Literal[1]
    title: str
    policy: str
    kinds: list[str]
    actors: list[ActorPart]
    moments: list[MomentPart]
    legend: list[LegendPart]
    opening: list[str] | None = None
    closing: list[str] | None = None


# --- flushlab explore --trace, --replay and --stop-at -------------------------------------------------------


class ExecutionDocument(Part):
    """An execution, step by step: a recording, as `explore --output` writes it.

    `explore --replay --json` prints it, and `explore --trace --json`, with `execution`, its number.
    """

    format: Literal[1]
    test: str
    policy: str
    memory: str
    adversary: dict[str, int] | None
    context_switches: int
    schedule: list[str]
    actors: dict[str, str]
    steps: list[dict[str, Any]]
    violation: dict[str, Any] | None
    source: str
    execution: int | None = None
    patches: list[list[str]] | None = None
    kernel: str | None = None
    sources: str | None = None
    watched: Any = None
    final: list[dict[str, Any]] | None = None
    verdict: str | None = None
    trace: dict[str, Any] | None = None


class UnreachedDocument(Part):
    """The document of `flushlab explore --trace --json` if no execution of the search is the one sought."""

    flushlab_unreached: Literal[1]
    test: str
    policy: str
    reached: Literal[False]
    goal: str
    executions: int


class OperationPart(Part):
    n: int
    of: int
    text: str


class TaskPart(Part):
    name: str
    cpu: str
    done: bool
    operation: OperationPart | None
    function: str
    next: str
    can_go_on: bool
    waits_for: str
    held_by: list[str]


class VcpuState(Part):
    vcpu: int
    vm: int
    mode: str
    cpu: str
    root: int | None
    requests: list[str]


class LockPart(Part):
    vm: int
    held_by: list[str]
    mode: str = Field(alias="for")
    waiting: int


class RcuPart(Part):
    readers: list[str]
    callbacks: int


class StateDocument(Part):
    """The document of `flushlab explore --replay FILE --stop-at STEP --json`: all before this step."""

    flushlab_state: Literal[1]
    test: str
    policy: str
    step: int
    steps: int
    thread: str
    next: str
    tasks: list[TaskPart]
    vcpus: list[VcpuState]
    locks: list[LockPart]
    rcu: RcuPart
    tlbs: list[dict[str, Any]]
    rights: list[dict[str, Any]]


# --- flushlab explore --audit -------------------------------------------------------------------------------


class AuditedPart(Part):
    """The findings of one test under one policy: sentences, and how often each came up."""

    test: str
    policy: str
    verdict: str
    executions: int
    unannounced: dict[str, int]
    undescribed: dict[str, int]
    shared: dict[str, int]
    swaps: int
    ordered: dict[str, int]
    ways: int
    stateless: str | None
    apart: dict[str, int]
    failed: dict[str, int]
    plain: dict[str, int]


class AuditDocument(Part):
    """The document of `flushlab explore --audit --json`."""

    format: Literal[1]
    audited: list[AuditedPart]


# --- flushlab drift -----------------------------------------------------------------------------------------


class CitationPart(Part):
    file: str
    line: int
    how: str


class PlacePart(Part):
    file: str
    first: int
    last: int
    fingerprint: str


class FunctionPart(Part):
    """A kernel function that the model cites; `diff` is there with --diff."""

    name: str
    status: str
    citations: list[CitationPart]
    places: list[PlacePart]
    same_as: list[str]
    renamed: list[str]
    similar: list[str]
    diff: str | None = None


class DriftDocument(Part):
    """The document of `flushlab drift TREE --json`."""

    flushlab_drift: Literal[1]
    tree: str
    version: str
    compared_with: str
    counts: dict[str, int]
    functions: list[FunctionPart]
    found_nowhere: dict[str, list[CitationPart]]


class BuildPart(Part):
    harvested_lines: int
    rounds: int
    stubs: list[str]
    cached: bool


class DriftRunDocument(Part):
    """The document of `flushlab drift TREE --execute --json`."""

    flushlab_drift_run: Literal[1]
    version: str
    policy: str
    counts: dict[str, int]
    differences: list[dict[str, Any]]
    argued: dict[str, int]
    died: str | None
    operations_before: list[str]
    said: str | None
    interrupted: bool
    build: BuildPart
