"""Is the search exhaustive?  Counts that are known in closed form, and comparison with the search that leaves
nothing out."""

from __future__ import annotations

from collections.abc import Hashable
from math import factorial, prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.explore.engine.objects import Objects
from emulator.explore.engine.scheduler import Task, Wait
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.search import Limits, search
from tests.emulator.explore.tiny_programs import Op, Tiny, explore


def interleavings(*lengths: int) -> int:
    return factorial(sum(lengths)) // prod(factorial(n) for n in lengths)


@pytest.mark.parametrize("lengths", [(1, 1), (2, 3), (4, 4), (2, 2, 2), (1, 2, 3)])
def test_dependent_steps_are_permuted_in_every_way(lengths: tuple[int, ...]) -> None:
    tasks = [[("inc", "x")] * n for n in lengths]
    for reduce in (True, False):
        found = explore(*tasks, reduce=reduce)
        assert found.executions == interleavings(*lengths)
        assert found.complete
    assert found.pruned == 0
    assert found.depth == sum(lengths)


@pytest.mark.parametrize("lengths", [(1, 1), (3, 3), (2, 2, 2), (4, 4, 4)])
def test_independent_steps_are_not_permuted(lengths: tuple[int, ...]) -> None:
    tasks = [[("inc", f"x{i}")] * n for i, n in enumerate(lengths)]
    found = explore(*tasks)
    assert (found.executions, found.pruned, found.complete) == (1, 0, True)


def test_the_search_without_reduction_permutes_them() -> None:
    found = explore([("inc", "x")] * 3, [("inc", "y")] * 3, reduce=False)
    assert found.executions == interleavings(3, 3)


@pytest.mark.parametrize("readers", [1, 2, 3, 4])
def test_readers_of_one_write_see_it_or_not(readers: int) -> None:
    found = explore([("w", "x", "1")], *[[("r", "x")] for _ in range(readers)])
    assert found.executions == 2**readers
    assert len(found.outcomes) == 2**readers


@pytest.mark.parametrize("writers", [2, 3, 4])
def test_writers_of_one_variable(writers: int) -> None:
    found = explore(*[[("w", "x", str(i))] for i in range(writers)])
    assert found.executions == factorial(writers)


def test_store_buffering_has_three_outcomes_when_sequentially_consistent() -> None:
    found = explore([("w", "x", "1"), ("r", "y")], [("w", "y", "1"), ("r", "x")])
    assert len(found.outcomes) == 3
    # Two races, and both of them turned round would be a cycle.
    assert found.executions == 3


def test_lock_orders() -> None:
    critical: list[Op] = [("lock", "l"), ("inc", "x"), ("unlock", "l")]
    for n in (2, 3):
        found = explore(*[critical] * n)
        assert found.executions == factorial(n)
        assert found.complete


def test_a_deadlock_is_found_and_says_who_waits() -> None:
    found = explore(
        [("lock", "a"), ("lock", "b"), ("unlock", "b"), ("unlock", "a")],
        [("lock", "b"), ("lock", "a"), ("unlock", "a"), ("unlock", "b")],
    )
    assert any(outcome.endswith("deadlock t0,t1") for outcome in found.outcomes)
    assert any(outcome.endswith(" ") for outcome in found.outcomes)


def test_a_wait_that_comes_too_late_waits_for_ever() -> None:
    found = explore([("w", "x", "1"), ("w", "x", "2")], [("wait", "x", "1")])
    assert sum("deadlock t1" in outcome for outcome in found.outcomes) == 1
    assert len(found.outcomes) == 2


def test_a_step_that_somebody_else_enables_comes_before_what_it_races_with() -> None:
    # t2 cannot go first, but after t1 it can, and then before either write of t0.
    tasks: list[list[Op]] = [[("w", "x", "1"), ("w", "x", "2")], [("w", "q", "1")], [("when", "q", "x")]]
    found = explore(*tasks)
    assert len(found.outcomes) == 3
    assert set(found.outcomes) == set(explore(*tasks, reduce=False).outcomes)


def test_the_only_bad_interleaving_is_found() -> None:
    # y is 7 only if t1 reads x between the sixth and the seventh increment, and t2 copies right after.
    tasks: list[list[Op]] = [[("inc", "x")] * 7, [("r", "x")], [("inc", "z")] * 3]
    found = explore(*tasks, bad=lambda outcome: "[], [3], []" in outcome)
    assert found.schedule is not None
    assert found.schedule.index(1) in range(3, 7)
    assert [i for i in found.schedule[: found.schedule.index(1)] if i == 0] == [0, 0, 0]
    everything = explore(*tasks)
    assert sum("[], [3], []" in outcome for outcome in everything.outcomes) == 1
    assert everything.outcomes[next(o for o in everything.outcomes if "[], [3], []" in o)] == 1


VARIABLES = st.sampled_from(["x", "y", "z"])
PLAIN = st.one_of(
    st.tuples(st.just("r"), VARIABLES),
    st.tuples(st.just("w"), VARIABLES, st.sampled_from(["1", "2"])),
    st.tuples(st.just("inc"), VARIABLES),
)
BLOCKING = st.one_of(
    PLAIN,
    PLAIN,
    st.tuples(st.sampled_from(["lock", "unlock"]), st.sampled_from(["l", "m"])),
    st.tuples(st.just("wait"), VARIABLES, st.sampled_from(["0", "1", "2"])),
    st.tuples(st.just("when"), VARIABLES, VARIABLES),
)
# The writer of a lock reads the marks that its readers leave.
GUARDED = st.one_of(
    st.tuples(st.sampled_from(["mark", "see"]), st.sampled_from(["l", "m"])),
    st.tuples(st.sampled_from(["mark", "see"]), st.sampled_from(["l", "m"])),
    PLAIN,
)


def programs(operations: st.SearchStrategy[Op]) -> st.SearchStrategy[list[list[Op]]]:
    return st.one_of(
        st.lists(st.lists(operations, min_size=1, max_size=4), min_size=2, max_size=2),
        st.lists(st.lists(operations, min_size=1, max_size=2), min_size=3, max_size=3),
    )


@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True)
@given(programs(PLAIN))
def test_the_same_outcomes_with_and_without_reduction(tasks: list[list[Op]]) -> None:
    reduced, everything = explore(*tasks), explore(*tasks, reduce=False)
    assert set(reduced.outcomes) == set(everything.outcomes)
    assert reduced.executions <= everything.executions


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(programs(BLOCKING))
def test_the_same_outcomes_where_tasks_wait(tasks: list[list[Op]]) -> None:
    reduced, everything = explore(*tasks), explore(*tasks, reduce=False)
    assert set(reduced.outcomes) == set(everything.outcomes)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True)
@given(programs(BLOCKING), st.integers(0, 3))
def test_the_same_outcomes_up_to_a_bound(tasks: list[list[Op]], bound: int) -> None:
    reduced = explore(*tasks, bound=bound)
    everything = explore(*tasks, bound=bound, reduce=False)
    assert set(reduced.outcomes) == set(everything.outcomes)


RETRIES = {"until", "spin"}
RETRYING = st.one_of(
    st.tuples(st.just("w"), VARIABLES, st.sampled_from(["1", "2"])),
    st.tuples(st.just("inc"), VARIABLES),
    st.tuples(st.sampled_from(sorted(RETRIES)), VARIABLES, st.sampled_from(["1", "2"])),
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(programs(RETRYING))
def test_a_retry_loop_is_a_wait(tasks: list[list[Op]]) -> None:
    """A loop is blocked until another task writes an object that the iteration has read; it misses no value
    then, also where it ends after earlier loops of the task."""
    waiting = [[("wait", *op[1:]) if op[0] in RETRIES else op for op in task] for task in tasks]
    assert set(explore(*tasks).outcomes) == set(explore(*waiting).outcomes)


class Relaxes(Exhaustive):
    """All executions, and the objects that the waits of retry loops in each depend on."""

    def __init__(self, objects: Objects) -> None:
        super().__init__(objects)
        self.waits: dict[int, list[Hashable]] = {}
        self.seen: list[list[list[Hashable]]] = []

    def begin(self, tasks: int) -> None:
        super().begin(tasks)
        self.waits = {depth: names for depth, names in self.waits.items() if depth < self.depth}

    def stepped(self, task: Task) -> None:
        if task.label[0] == "relax":
            self.waits[self.depth] = self.objects.of(task.reads)
        super().stepped(task)

    def end(self, tasks: list[Task], deadlock: tuple[Wait, ...]) -> bool:
        self.seen.append(list(self.waits.values()))
        return super().end(tasks, deadlock)


def test_a_retry_loop_waits_for_what_its_last_iteration_has_read() -> None:
    program = Tiny([("r", "x"), ("until", "y", "2")], [("w", "y", "1"), ("w", "x", "1"), ("w", "y", "2")])
    strategy = Relaxes(program.objects)
    assert search(program, program.objects, strategy, Limits(), lambda _: False).complete
    twice = [waits for waits in strategy.seen if len(waits) > 1]
    assert twice
    assert all(waits == [["x", "y"], *[["y"]] * (len(waits) - 1)] for waits in twice)


def test_the_bound_counts_preemptions() -> None:
    tasks: list[list[Op]] = [[("inc", "x")] * 3, [("inc", "x")] * 3]
    assert explore(*tasks, bound=0).executions == 2
    # One preemption: after the first or the second step of the first task, and then on to the end.
    assert explore(*tasks, bound=1).executions == 2 + 4
