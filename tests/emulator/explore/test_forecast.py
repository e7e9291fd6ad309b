"""The share of a search that is done, as the tree so far tells it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.forecast import Stage, share_of_path, share_of_tree, stage_of
from emulator.explore.strategies.search import Found, Limits, search
from emulator.explore.strategies.subtree import rest_of
from emulator.explore.strategies.tree import Tree, wide_search
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy
from tests.emulator.explore.test_tree import Strangers
from tests.emulator.explore.tiny_programs import Op, Tiny

TASKS: list[list[Op]] = [[("inc", "x")] * 3, [("inc", "x")] * 2, [("r", "x")]]


def begun(executions: int, *, reduce: bool = True) -> tuple[Exhaustive, Found]:
    program = Tiny(*TASKS)
    strategy = Exhaustive(program.objects, reduce=reduce)
    limits = Limits(executions=executions, first_only=False)
    return strategy, search(program, program.objects, strategy, limits, lambda outcome: False)


def test_where_all_choices_are_known_the_share_only_grows() -> None:
    """There are 60 interleavings of three, two and one steps; the first choice has three alternatives."""
    shares = [share_of_path(begun(n, reduce=False)[0]) for n in range(1, 60)]
    assert all(one < other for one, other in pairwise(shares))
    assert 0 < shares[0] < 0.1
    assert 0.9 < shares[-1] < 1
    # Those that begin with the first task.
    assert shares[29] == pytest.approx(1 / 3)


@pytest.mark.parametrize("executions", [1, 5, 20])
def test_a_path_and_the_tree_that_it_becomes_have_one_share(executions: int) -> None:
    strategy, found = begun(executions)
    assert found.more
    tree = Tree(None)
    tree.grow(None, -1, rest_of(strategy))
    assert share_of_tree(tree) == pytest.approx(share_of_path(strategy))


def test_a_search_in_parts_comes_to_its_whole_share() -> None:
    program, shares = Tiny(*TASKS), []
    searches: list[tuple[Exhaustive | Tree, Found]] = []
    found = wide_search(
        program,
        program.objects,
        None,
        Limits(),
        lambda outcome: False,
        Strangers(TASKS),
        plain=4,
        part=2,
        keep=lambda left: shares.append(share_of_tree(left.tree)),
        watch=lambda search, found: searches.append((search, found)),
    )
    assert found.complete
    (plain, before), (tree, after) = searches
    assert isinstance(plain, Exhaustive)
    assert isinstance(tree, Tree)
    assert before is after is found
    assert all(0 < share <= 1 for share in shares)
    assert shares[-1] == 1 == stage_of(None, tree, found).share


@pytest.mark.parametrize(
    ("stage", "left"), [(Stage(0, 100, 0.5), 100), (Stage(None, 30, 0.1), 270), (Stage(None, 30, 0.0), None)]
)
def test_what_is_left_follows_from_the_share(stage: Stage, left: int | None) -> None:
    assert stage.left == left


@pytest.mark.parametrize("stateful", [False, True])
def test_a_search_tells_its_stage_before_each_execution(stateful: bool) -> None:
    stages: list[Stage] = []

    def told(runs: int, stage: Callable[[], Stage] | None = None) -> None:
        if stage is not None:
            stages.append(stage())

    plan = Plan(executions=60, stateful=stateful)
    verdict = explore_verdict(load_test("fault-races-unmap"), named_policy("linux-7.3"), plan, told=told)
    assert verdict.limit == "executions"
    rounds = [one for one in verdict.rounds if one["strategy"] in ("exhaustive", "stateful")][2:]
    assert {stage.bound for stage in stages} == {one["preemption_bound"] for one in rounds}
    assert len(stages) >= sum(one["executions"] + one["pruned"] for one in rounds)
    assert bool(stages[-1].states) == stateful
    assert "stateful" in {one["strategy"] for one in rounds} or not stateful
