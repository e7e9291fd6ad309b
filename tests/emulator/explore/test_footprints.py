"""What is said to be independent is, and what is not conflicts: seen in whole executions."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

from emulator.explore.controlled import installed
from emulator.explore.dpor import Exhaustive
from emulator.explore.objects import Objects
from emulator.explore.scheduler import Label, Task
from emulator.explore.search import Found, Limits, search
from emulator.explore.world import LitmusProgram
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy


class Step(NamedTuple):
    label: Label
    reads: list[Hashable]
    writes: list[Hashable]


class Watched(Exhaustive):
    """All executions, and the steps of the first one."""

    def __init__(self, objects: Objects) -> None:
        super().__init__(objects)
        self.steps: list[Step] = []

    def stepped(self, task: Task) -> None:
        super().stepped(task)
        assert task.label is not None
        of = self.objects.of
        self.steps.append(Step(task.label, of(task.reads), of(task.writes)))


def searched(test: str, policy: str, executions: int) -> tuple[Found, list[Step]]:
    """No samples, no bounds: what is found or proved is found or proved by the reduced search alone."""
    program = LitmusProgram(load_test(test), named_policy(policy))
    try:
        with installed(program.control):
            strategy = Watched(program.objects)
            limits = Limits(executions=executions)
            found = search(program, program.objects, strategy, limits, bool, lambda: False)
    finally:
        program.close()
    return found, strategy.steps


def steps_of(test: str, policy: str, kind: str) -> list[Step]:
    """Those of this kind in the first execution."""
    return [step for step in searched(test, policy, 1)[1] if step.label[0] == kind]


def test_a_walk_from_a_cached_pointer_races_the_freeing_of_the_table() -> None:
    """Nothing else orders them: the link is gone before, the flush comes after."""
    late = "zap_scope=leafs-and-tables,zap_yield=unlock-then-flush"
    found, _ = searched("zap-table-walk", late, 6000)
    assert found.outcome == "walk-after-free"


def roots(names: Iterable[Hashable]) -> set[Hashable]:
    return {name[1] for name in names if isinstance(name, tuple) and name[0] == "custody of root"}


def test_walks_race_the_freeing_of_their_root_alone() -> None:
    _, steps = searched("root-mask-null", "linux-7.3", 1)
    walked = roots(name for step in steps if step.label[0] == "read" for name in step.reads)
    freed = roots(name for step in steps if step.label[0] == "grace period" for name in step.writes)
    assert walked
    assert freed
    assert walked.isdisjoint(freed)  # vCPUs are on the new root by then


def test_a_root_that_was_loaded_before_may_be_any() -> None:
    test = load_test("return-zap")
    _, steps = searched("return-zap", "linux-7.3", 1)
    first = next(step for step in steps if step.label[0] in ("read", "write") and roots(step.reads))
    assert roots(first.reads) == set(range(test.machine.root_frames))


def test_a_grace_period_waits_for_those_who_were_inside() -> None:
    ends = [s for s in steps_of("log-huge", "linux-7.3", "grace period") if s.label[1] == "ends"]
    assert ends
    for step in ends:
        assert ("rcu",) not in step.writes
        assert any(name[0] == "callbacks done" for name in step.writes if isinstance(name, tuple))


def test_an_interrupt_commutes_with_promises() -> None:
    interrupts = steps_of("return-zap", "linux-7.3", "interrupt")
    assert interrupts
    assert all(("custody",) not in step.reads for step in interrupts)


def test_a_test_with_grace_periods_is_proved_in_few_executions() -> None:
    found, _ = searched("log-huge", "linux-7.3", 400)
    assert found.complete
    assert found.schedule is None
