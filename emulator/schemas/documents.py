"""The documents as pydantic models.  A document's first key has its version, which changes if a key does."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A part of a document, with these keys and no others."""

    model_config = ConfigDict(extra="forbid")


class Violation(BaseModel):
    """A violation: its kinds, the report as text, and details that depend on the kind."""

    model_config = ConfigDict(extra="allow")

    kind: str
    kinds: list[str]
    text: str


# --- flushlab run -------------------------------------------------------------------------------------------


class Overridden(Part):
    """A decision point that a user's class decides: where, and how often it gave each answer."""

    where: str
    answers: dict[str, int]


class PolicyPart(Part):
    name: str
    decisions: dict[str, str]
    overridden: dict[str, Overridden]


class ActivityPart(Part):
    """An activity of the scenario: calls asked for, and calls begun."""

    name: str
    asked: float
    begun: int


class FlushPart(Part):
    vm: int
    scope: str
    reason: str
    count: int
    necessary: int


class HistogramPart(Part):
    """Durations in seconds; percentiles are upper bounds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    longest: float


class ReceiversPart(Part):
    """A group of pCPUs and the interrupts that reached them."""

    who: str
    pcpus: int
    uninvolved: bool
    ipis: int
    serviced: int
    interruptions: int
    bystanders: int


class CycleLinePart(Part):
    item: str
    group: str
    events: float
    cycles_each: float
    cycles: float
    source: str


class CyclesPart(Part):
    flush: float
    work: float
    lines: list[CycleLinePart]


class RunDocument(Part):
    """The document of `flushlab run --json`.  `kernel`, with --kernel, tells of the tree's code."""

    flushlab: Literal[1]
    verdict: Literal["clean", "violations", "inconclusive"]
    exit_status: int
    scenario: str
    policy: PolicyPart
    seed: int
    elapsed_seconds: float
    interrupted: bool
    failure: str
    totals: dict[str, int]
    activities: list[ActivityPart]
    counters: dict[str, int]
    vms: list[dict[str, int]]
    flushes: list[FlushPart]
    histograms: dict[str, HistogramPart]
    receivers: list[ReceiversPart]
    violations: dict[str, int]
    reports: list[Violation]
    preconditions: dict[str, int]
    custody_tag_rounds: int
    cycles: CyclesPart
    kernel: Any = None


# --- flushlab litmus ----------------------------------------------------------------------------------------


class IdleDelay(Part):
    test: str
    delay: str


class LitmusOutcome(Part):
    """The verdict on one test under one policy; `differs` says how it differs from the expected ones."""

    test: str
    policy: str
    verdict: str
    expected: list[str | list[str]]
    differs: str | None
    preemption_bound: int | None
    executions: int
    violating: int
    violations: dict[str, int]
    evidence: dict[str, int]
    first_seed: int | None
    failure: str | None
    unwatched: list[str] = []
    unordered: list[str] = []
    reports: list[Violation]


class LitmusDocument(Part):
    """The document of `flushlab litmus --json`; `kernel` is there with --kernel."""

    flushlab_litmus: Literal[1]
    seed: int
    executions: int
    idle_delays: list[IdleDelay]
    interrupted: bool = False
    kernel: Any = None
    outcomes: list[LitmusOutcome]


# --- flushlab compare ---------------------------------------------------------------------------------------


class SpreadPart(Part):
    """A figure over the runs of a policy."""

    median: float
    least: float
    most: float


class BoundLinePart(Part):
    item: str
    events: float
    cycles: float
    source: str


class BoundLinesPart(Part):
    """The costs of a policy with perfect knowledge, in one run."""

    flushes: float
    interruptions: float
    refills: float
    cycles: float
    lines: list[BoundLinePart]


class BoundPart(BoundLinesPart):
    """The costs of a policy with perfect knowledge in the baseline's first run, and its figures."""

    figures: dict[str, float]


class ComparedRun(RunDocument):
    """A run, as the document of `flushlab run --json`, and its bound."""

    oracle_optimal: BoundLinesPart = Field(alias="oracle-optimal")


class ComparedPolicy(Part):
    name: str
    verdict: str
    figures: dict[str, SpreadPart]
    runs: list[ComparedRun]


class PairPart(Part):
    """Two policies: the cycles that the cheaper one saves; `always`: at all costs within their ranges."""

    cheaper: str
    dearer: str
    cycles_saved: float
    least: float
    most: float
    always: bool


class TurnPart(Part):
    """A value of a cost at which the order of two policies turns."""

    cost: str
    at: float
    cheaper_below: str
    cheaper_above: str


class RangePart(Part):
    cycles: float
    least: float
    most: float


class SensitivityPart(Part):
    per: str
    cycles: dict[str, float]
    pairs: list[PairPart]
    turns: list[TurnPart]
    ranges: dict[str, RangePart]
    refuted: list[str]


class CompareDocument(Part):
    """The document of `flushlab compare --json`; `units` and `sensitivity` are there with these options."""

    flushlab_comparison: Literal[1]
    scenario: str
    title: str
    pcpus: int
    vms: int
    vcpus: int
    unit: str
    pace_accesses_per_second: float
    duration_seconds: float
    units: int | None = None
    seed: int
    repeat: int
    baseline: str
    exit_status: int
    interrupted: bool
    cut_short: list[str]
    policies: list[ComparedPolicy]
    oracle_optimal: BoundPart | None = Field(alias="oracle-optimal")
    sensitivity: SensitivityPart | None = None


# --- flushlab compare --vary, flushlab merge ----------------------------------------------------------------

Point = dict[str, str | int | float | bool]


class CellPart(Part):
    """A figure of one policy at one point: median, bootstrap interval, ratio to the baseline and p-value."""

    point: Point
    policy: str
    verdict: str
    runs: int
    median: float
    low: float | None
    high: float | None
    ratio: float | None
    p: float | None


class UnitPart(Part):
    """A run of a sweep, as in a line of its store."""

    flushlab_sweep: Literal[1]
    key: str
    number: int
    version: str
    scenario: str
    point: Point
    policy: str
    seed: int
    duration_seconds: float
    verdict: str
    violations: dict[str, int]
    failure: str
    wall_seconds: float
    values: dict[str, float]


class SweepDocument(Part):
    """The document of `flushlab compare --vary ... --json` and of `flushlab merge --json`."""

    flushlab_sweep: Literal[1]
    baseline: str | None
    policies: list[str]
    exit_status: int
    figures: dict[str, list[CellPart]]
    units: list[UnitPart]
