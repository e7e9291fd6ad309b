"""The grid of a sweep: its units of work in order, each with a key made of everything that it depends on."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

from emulator import __version__
from emulator.errors import BadInput, shown
from emulator.policy import Policy
from emulator.policy.spelling import digests
from emulator.policy.suitable import check_suits
from emulator.scenario import limits
from emulator.scenario.config import Scenario, load_scaled
from emulator.scenario.vary import Value, varied

KEY_DIGITS: Final = 24
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One run: a point of the grid, a policy as the user spells it, and a seed.

    A process of its own can run it from these values alone.
    """

    scenario: str
    point: tuple[tuple[str, Value], ...]
    policy: str
    name: str  # the policy's name in verdicts
    seed: int
    duration: float | None
    pcpus: int | None = None
    ept: bool | None = None
    costs: Path | None = None
    chaos: int = 0
    unbounded: bool = False
    number: int = 0  # its place in the order of the grid
    key: str = ""

    def shape(self) -> Scenario:
        return varied(load_scaled(self.scenario, self.pcpus, self.ept, self.costs), dict(self.point))

    def __str__(self) -> str:
        return " ".join([*(f"{key}={value}" for key, value in self.point), self.name, f"seed {self.seed}"])


@dataclass(frozen=True)
class Grid:
    """A grid: each combination of the varied values, each policy, each repetition.

    `policies`: each policy as the user spells it, and loaded; the baseline first.  Repetition n has the seed
    `seed` + n.
    """

    scenario: str
    vary: tuple[tuple[str, tuple[Value, ...]], ...]
    policies: tuple[tuple[str, Policy], ...]
    repeat: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Return the units.  A repetition runs each point under each policy once, so that a machine that gets
        warmer or busier affects all alike."""
        keys = [key for key, _ in self.vary]
        points = [
            tuple(zip(keys, values, strict=True))
            for values in itertools.product(*(values for _, values in self.vary))
        ]
        shapes = {point: self._checked(point) for point in points}
        cells = itertools.product(range(self.repeat), points, self.policies)
        return tuple(
            self._unit(number, point, shapes[point], policy, repetition)
            for number, (repetition, point, policy) in enumerate(cells)
        )

    def _checked(self, point: tuple[tuple[str, Value], ...]) -> Scenario:
        """Return a point's scenario; raise BadInput unless it can be run under each policy."""
        pcpus, ept, costs = (self.options.get(key) for key in ("pcpus", "ept", "costs"))
        shape = varied(load_scaled(self.scenario, pcpus, ept, costs), dict(point))
        limits.check(shape)
        for _, policy in self.policies:
            check_suits(policy, shape.name, **shape.kind_of_host)
        return shape

    def _unit(
        self,
        number: int,
        point: tuple[tuple[str, Value], ...],
        shape: Scenario,
        policy: tuple[str, Policy],
        repetition: int,
    ) -> Unit:
        spelled, loaded = policy
        unit = Unit(
            scenario=self.scenario,
            point=point,
            policy=spelled,
            name=loaded.name,
            seed=self.seed + repetition,
            number=number,
            **self.options,
        )
        depends = {
            "version": __version__,
            "scenario": shape.model_dump(mode="json"),
            "costs": repr(shape.cost_table),
            "policy": spelled,
            "files": digests(spelled),
            "seed": unit.seed,
            "duration": unit.duration or shape.duration,
            "chaos": unit.chaos,
            "unbounded": unit.unbounded,
        }
        text = json.dumps(depends, sort_keys=True)
        return replace(unit, key=hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS])


def shard(units: Sequence[T], text: str | None) -> list[T]:
    """Return the units of the shard `I/N`: each N-th one, from the I-th on.  Raises BadInput."""
    if text is None:
        return list(units)
    first, slash, count = text.partition("/")
    if not slash or not first.isdecimal() or not count.isdecimal() or not 1 <= int(first) <= int(count):
        raise BadInput("--shard", f"found {shown(text)}", "I/N with I from 1 to N, as in 1/3")
    return list(units[int(first) - 1 :: int(count)])
