"""The document of `flushlab explore --json`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from emulator.schemas.documents import Part


class Counterexample(BaseModel):
    """An execution with a violation: the choices of the scheduler, and the steps that they led to.

    `flushlab explain` and `flushlab explore --replay` read it.  Further keys are for them.
    """

    model_config = ConfigDict(extra="allow")

    format: Literal[1]
    test: str
    policy: str
    memory: str
    context_switches: int
    schedule: list[str]
    actors: dict[str, str]
    steps: list[dict[str, Any]]
    violation: dict[str, Any] | None
    source: str


class RacePart(Part):
    """Two operations of threads that race: how often, and about which objects most."""

    operations: list[str]
    races: int
    objects: list[str]


class SizePart(Part):
    """The races in some random executions of a search that did not end, and the operations that race most."""

    executions: int
    races: int
    most: list[RacePart]


class ExploredPart(Part):
    """The verdict on one test under one policy, and the extent of the search."""

    test: str
    policy: str
    verdict: str
    violations: list[str]
    needs: list[str]
    met: int
    evidence: dict[str, int]
    memory: str
    adversary: dict[str, int] | None
    strategy: str
    seed: int
    complete: bool
    limit: str | None
    preemption_bound: int | None
    executions: int
    pruned: int
    steps: int
    depth: int
    pct_guarantee: float | None
    rounds: list[dict[str, Any]]
    states: int | None = None
    stateless: str | None = None
    failure: str | None
    size: SizePart | None = None
    unwatched: list[str] | None = None
    unordered: list[str] | None = None
    counterexample: Counterexample | None


class PairPart(Part):
    test: str
    policy: str


class ExploreDocument(Part):
    """The document of `flushlab explore --json`.

    `not_reached` is there if a signal ended the search, `kernel` with --kernel.
    """

    format: Literal[1]
    explored: list[ExploredPart]
    not_reached: list[PairPart] | None = None
    kernel: Any = None
