"""Steps that do not conflict by their footprints are swapped, and it makes no difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from emulator.explore.audit.independence import IndependenceCheck
from emulator.explore.audit.residue import ResidueProgram
from emulator.explore.engine.objects import Objects
from emulator.explore.engine.scheduler import Condition, Execution
from emulator.explore.machine.footprints import FOOTPRINTS
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.options import NONE, ExploreOptions
from emulator.explore.strategies.search import Met
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy

EVERYTHING = ExploreOptions(evict=1, speculate=1, store_buffers=True)


def swapped(
    test: str, policy: str = "linux-7.3", options: ExploreOptions = NONE, executions: int = 60
) -> tuple[int, Counter[str]]:
    program = ResidueProgram(load_test(test), named_policy(policy), options)
    check = IndependenceCheck(program, program.objects, seed=1)
    try:
        with instrument(program.control):
            check.run(executions, 10)
    finally:
        program.close()
    return check.swaps, check.findings


@pytest.mark.slow
@pytest.mark.parametrize("options", [NONE, EVERYTHING])
@pytest.mark.parametrize(
    ("test", "policy"),
    [
        ("entry-races-request", "linux-7.3"),
        ("fault-races-two", "linux-5.14"),
        ("root-replaced-walk", "root-tlb-gen"),
        ("log-huge", "linux-6.12"),
    ],
)
def test_they_commute(test: str, policy: str, options: ExploreOptions) -> None:
    swaps, findings = swapped(test, policy, options)
    assert swaps > 20
    assert not findings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "forgotten", "test", "who"),
    [
        ("kvm_make_request", {"writes": ()}, "entry-races-request", "requests"),
        ("vcpu_set_mode", {"writes": ()}, "entry-races-request", "mode"),
        ("tdp_mmu_set_spte_atomic", {"late": ()}, "fault-races-two", "spte"),
        ("mmu_invalidate_end", {"writes": ()}, "fault-races-unmap", "mmu_invalidate_seq"),
    ],
)
def test_a_footprint_that_does_not_say_all_is_found(
    monkeypatch: pytest.MonkeyPatch, call: str, forgotten: dict[str, Any], test: str, who: str
) -> None:
    monkeypatch.setitem(FOOTPRINTS, call, replace(FOOTPRINTS[call], **forgotten))
    _, findings = swapped(test, executions=400)
    assert any(f"'s {who}" in sentence for sentence in findings), findings


@pytest.mark.slow
def test_the_same_each_time() -> None:
    assert swapped("return-zap", executions=20) == swapped("return-zap", executions=20)


class Program:
    """Two tasks with steps that declare no accesses: `body` combines the first's and the second's moves
    on a list."""

    def __init__(self, first: Body, second: Body) -> None:
        self.bodies = first, second
        self.done: list[str] = []

    def start(self, execution: Execution) -> None:
        self.done = []
        for name, body in zip("ab", self.bodies, strict=True):
            execution.spawn(name, partial(body, self, execution))

    def finish(self, execution: Execution) -> str:
        return " ".join(self.done)

    def met(self) -> Met:
        return Met(True, {})

    def abandon(self, execution: Execution) -> None:
        pass

    def move(self, execution: Execution, what: str, condition: Condition | None = None) -> None:
        execution.step((what, None, "write"), 0, 0, condition)


Body = Callable[[Program, Execution], None]


def notes(program: Program, execution: Execution) -> None:
    program.move(execution, "notes")
    program.done.append(execution.current.name)


def raises_a_flag(program: Program, execution: Execution) -> None:
    program.move(execution, "raises")
    program.done = ["raised"]


def waits_for_it(program: Program, execution: Execution) -> None:
    program.move(execution, "waits", lambda: bool(program.done))


def looks(then: Callable[[Program, Execution], None]) -> Body:
    """... and does that only if it is raised."""

    def body(program: Program, execution: Execution) -> None:
        program.move(execution, "looks")
        if program.done:
            then(program, execution)

    return body


def goes_on(program: Program, execution: Execution) -> None:
    program.move(execution, "goes on")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (notes, notes, {"a's notes, b's notes: something else is left behind"}),
        (raises_a_flag, waits_for_it, {"a's raises, b's waits: the second cannot come first"}),
        (
            raises_a_flag,
            looks(goes_on),
            {
                "a's raises, b's looks: then the result is different",
                "b's looks, a's raises: then the next step cannot follow",
            },
        ),
        (goes_on, goes_on, set()),
    ],
)
def test_each_difference_has_its_sentence(first: Body, second: Body, expected: set[str]) -> None:
    check = IndependenceCheck(Program(first, second), Objects(), seed=1)
    check.run(40, 4)
    found = {sentence for sentence in check.findings if sentence[0] == "a" or "looks" in sentence}
    assert found >= expected
    assert bool(found) == bool(expected)
