"""A search that visits each state once finds the outcomes that a search of all interleavings finds."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import pytest
from hypothesis import given, settings

from emulator.explore.strategies.dpor import Node
from emulator.explore.strategies.search import Found, Limits, search
from emulator.explore.strategies.stateful import Accesses, Stateful, StatefulNode
from tests.emulator.explore.test_dpor import BLOCKING, GUARDED, RETRYING, programs
from tests.emulator.explore.tiny_programs import Op, Tiny, explore


class Exact:
    """The whole state of a tiny program, between any two steps."""

    def __init__(self, program: Tiny) -> None:
        self.program = program

    def shared(self) -> Hashable:
        registers = tuple(map(tuple, self.program.registers))
        return tuple(sorted(self.program.shared.items())), registers

    def local(self, index: int, history: int) -> Hashable:
        task = self.program.execution.tasks[index]
        return self.program.places[index], task.label, task.done

    def rests(self, index: int) -> bool:
        return True

    def is_read(self, bit: int) -> bool:
        return False

    def is_held(self, bit: int) -> bool:
        return False

    def is_read_under(self, bit: int) -> bool:
        return False


class Told(Exact):
    """The tasks' histories instead of their registers; states are compared when a task is done."""

    def shared(self) -> Hashable:
        # The registers of a task that is done belong to the outcome, and are nobody's local state any more.
        done = (task.done for task in self.program.execution.tasks)
        kept = tuple(tuple(mine) for mine, over in zip(self.program.registers, done, strict=False) if over)
        return tuple(sorted(self.program.shared.items())), kept

    def local(self, index: int, history: int) -> Hashable:
        task = self.program.execution.tasks[index]
        return history, task.label, task.done, task.changed, task.watch

    def rests(self, index: int) -> bool:
        return self.program.execution.tasks[index].done

    def is_read(self, bit: int) -> bool:
        return True

    def is_held(self, bit: int) -> bool:
        return True

    def is_read_under(self, bit: int) -> bool:
        return True


def stateful(
    tasks: list[list[Op]],
    states_of: Callable[[Tiny], Exact] = Exact,
    strategy_of: type[Stateful] = Stateful,
) -> tuple[Found, Stateful]:
    program = Tiny(*tasks)
    strategy = strategy_of(program.objects, states_of(program))
    return search(program, program.objects, strategy, Limits(), lambda _: False), strategy


@pytest.mark.slow
@settings(max_examples=250, deadline=None, derandomize=True)
@given(programs(BLOCKING))
def test_the_same_outcomes_with_exact_states(tasks: list[list[Op]]) -> None:
    found, _ = stateful(tasks)
    assert found.complete
    assert set(found.outcomes) == set(explore(*tasks).outcomes)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(programs(RETRYING))
def test_the_same_outcomes_with_histories(tasks: list[list[Op]]) -> None:
    found, _ = stateful(tasks, Told)
    assert set(found.outcomes) == set(explore(*tasks).outcomes)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(programs(GUARDED))
def test_the_same_outcomes_where_readers_of_a_lock_write(tasks: list[list[Op]]) -> None:
    found, _ = stateful(tasks, Told)
    assert set(found.outcomes) == set(explore(*tasks).outcomes)


class ReadersForgotten(Stateful):
    """A writer's history does not tell the objects that readers before it have written."""

    def _accessed_by(self, node: StatefulNode) -> None:
        super()._accessed_by(node)
        self._under.clear()


def test_a_writer_may_read_what_the_readers_before_it_wrote() -> None:
    tasks: list[list[Op]] = [
        [("see", "l"), ("r", "y")],
        [("r", "y"), ("mark", "l")],
        [("see", "l"), ("w", "y", "1")],
    ]
    wanted = set(explore(*tasks).outcomes)
    assert set(stateful(tasks, Told)[0].outcomes) == wanted
    assert set(stateful(tasks, Told, ReadersForgotten)[0].outcomes) < wanted


@pytest.mark.slow
def test_states_that_come_again_are_visited_once() -> None:
    tasks: list[list[Op]] = [[("inc", "x")] * 4] * 3
    found, strategy = stateful(tasks)
    assert set(found.outcomes) == set(explore(*tasks).outcomes)
    assert strategy.matches > 0
    # The places of three tasks are all that differs.
    assert strategy.size <= 5**3
    assert found.executions + found.pruned < 300


class NoRegisters(Exact):
    def shared(self) -> Hashable:
        return tuple(sorted(self.program.shared.items()))


class NoPlaces(Exact):
    def local(self, index: int, history: int) -> Hashable:
        return self.program.execution.tasks[index].label


class NoVariables(Exact):
    def shared(self) -> Hashable:
        return tuple(map(tuple, self.program.registers))


class SleepForgotten(Stateful):
    """A state stands for any other, whatever was asleep when it was searched."""

    def _complete(self, node: Node) -> None:
        node.slept = 0  # type: ignore[attr-defined]
        super()._complete(node)


class RacesForgotten(Stateful):
    """The steps behind a state of the table race with none of the execution that comes to it."""

    def _race_with(self, below: Accesses) -> None:
        pass


class RacesInPart(Stateful):
    """The steps of one task alone race."""

    def _race_with(self, below: Accesses) -> None:
        super()._race_with({index: below[index] for index in list(below)[:1]})


class Unfinished(Stateful):
    """A state is in the table before everything behind it was searched."""

    def _covered(self, node: Node) -> bool:
        covered = super()._covered(node)
        if not covered and node.key is not None:  # type: ignore[attr-defined]
            self._known_states.setdefault(node.key, []).append((node.slept, {}))  # type: ignore[attr-defined]
        return covered


# Found by trying random programs: each planted fault loses an outcome of one of these.
SMALL: list[list[list[Op]]] = [
    [[("r", "x"), ("w", "y", "1")], [("r", "y"), ("w", "x", "1")], [("inc", "x"), ("w", "z", "1")]],
    [[("inc", "y")], [("inc", "y"), ("w", "y", "2"), ("unlock", "m")], [("r", "y")]],
    [
        [("w", "y", "2"), ("r", "z")],
        [("wait", "x", "0"), ("inc", "z"), ("w", "z", "1")],
        [("unlock", "m"), ("w", "z", "1"), ("unlock", "l")],
        [("inc", "y"), ("r", "x")],
    ],
    [
        [("w", "y", "2"), ("lock", "l"), ("w", "y", "2"), ("r", "y")],
        [("r", "x"), ("w", "y", "1"), ("w", "x", "2"), ("lock", "l")],
        [("inc", "x"), ("inc", "y"), ("when", "x", "y")],
    ],
]


@pytest.mark.parametrize(
    ("states_of", "strategy_of"),
    [
        (NoRegisters, Stateful),
        (NoPlaces, Stateful),
        (NoVariables, Stateful),
        (Exact, SleepForgotten),
        (Exact, RacesForgotten),
        (Exact, RacesInPart),
        (Exact, Unfinished),
    ],
)
def test_a_planted_fault_loses_outcomes(
    states_of: Callable[[Tiny], Exact], strategy_of: type[Stateful]
) -> None:
    lost = 0
    for tasks in SMALL:
        wanted = set(explore(*tasks).outcomes)
        assert set(stateful(tasks)[0].outcomes) == wanted
        lost += len(wanted - set(stateful(tasks, states_of, strategy_of)[0].outcomes))
    assert lost
