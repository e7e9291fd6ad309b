"""A search in parts finds the same as a plain one, by whichever processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from math import factorial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.cli.main import main
from emulator.explore.engine.objects import Objects
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.explore.results.workers import FIRST_PARTS, Team
from emulator.explore.strategies.search import Found, Limits
from emulator.explore.strategies.subtree import Outcome, Part, search_part
from emulator.explore.strategies.tree import PLAIN, Tree, wide_search
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy
from tests.emulator.explore.test_dpor import BLOCKING, interleavings, programs
from tests.emulator.explore.tiny_programs import Op, Tiny, explore


class Strangers:
    """Each part is done by a process that has never seen the program, and numbers its objects differently."""

    def __init__(self, tasks: Sequence[Sequence[Op]], bad: Callable[[str], bool] = lambda _: False) -> None:
        self.tasks = tasks
        self.bad = bad
        self.parts = 0

    def outcomes(self, parts: Sequence[Part]) -> Iterator[Outcome]:
        for part in parts:
            self.parts += 1
            objects = Objects()
            for name in "zyxqlm" if self.parts % 2 else "mlqxyz":
                objects.bit(name)
            yield search_part(Tiny(*self.tasks, objects=objects), objects, part, self.bad)


def explore_wide(
    *tasks: Sequence[Op], bound: int | None = None, most: int = 0, plain: int = 1, part: int = 1
) -> tuple[Found, int]:
    program, team = Tiny(*tasks), Strangers(tasks)
    found = wide_search(
        program,
        program.objects,
        bound,
        Limits(executions=most),
        lambda _: False,
        team,
        plain=plain,
        part=part,
    )
    return found, team.parts


@pytest.mark.parametrize("lengths", [(2, 3), (4, 4), (2, 2, 2)])
@pytest.mark.parametrize("part", [1, 3, 1000])
def test_dependent_steps_are_permuted_in_every_way(lengths: tuple[int, ...], part: int) -> None:
    found, parts = explore_wide(*[[("inc", "x")] * n for n in lengths], part=part)
    assert (found.executions, found.complete) == (interleavings(*lengths), True)
    assert parts > 1


def test_writers_and_locks() -> None:
    for n in (2, 3, 4):
        assert explore_wide(*[[("w", "x", str(i))] for i in range(n)])[0].executions == factorial(n)
    critical: list[Op] = [("lock", "l"), ("inc", "x"), ("unlock", "l")]
    assert explore_wide(*[critical] * 3)[0].executions == factorial(3)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(programs(BLOCKING), st.sampled_from([None, None, 0, 1, 2]), st.sampled_from([1, 2, 7]))
def test_the_same_as_a_plain_search(tasks: list[list[Op]], bound: int | None, part: int) -> None:
    plain = explore(*tasks, bound=bound)
    wide, _ = explore_wide(*tasks, bound=bound, part=part)
    assert wide.outcomes.keys() == plain.outcomes.keys()
    assert (wide.complete, wide.bounded_away) == (plain.complete, plain.bounded_away)
    assert (wide.executions, wide.pruned) == (plain.executions, plain.pruned)
    if bound is None:
        assert wide.outcomes.keys() == explore(*tasks, reduce=False).outcomes.keys()


@pytest.mark.parametrize("most", [1, 5, 50, 69, 70, 71])
def test_a_budget_is_exact(most: int) -> None:
    """Seventy interleavings."""
    found, _ = explore_wide([("inc", "x")] * 4, [("inc", "x")] * 4, most=most, part=16)
    assert found.executions == min(most, 70)
    assert found.complete == (most >= 70)


def test_what_is_given_up_half_way_is_limited_as_well() -> None:
    limits = Limits(executions=3, runs=8)
    assert not limits.reached(Found(executions=2, pruned=5))
    assert limits.reached(Found(executions=2, pruned=6))
    assert limits.reached(Found(executions=3))
    assert not Limits().reached(Found(executions=10**9, pruned=10**9))


@pytest.mark.slow
def test_the_time_of_a_large_search_has_an_end() -> None:
    """Near the root of this one nearly everything is pruned."""
    plan = Plan(executions=1200, minimize=False)
    found = explore_verdict(load_test("bounce-two-vcpus"), named_policy("linux-7.3"), plan)
    assert (found.executions, found.limit) == (1200, "executions")
    assert found.pruned < 4 * found.executions


def test_what_is_stopped_is_not_complete() -> None:
    tasks: list[list[Op]] = [[("inc", "x")] * 4, [("inc", "x")] * 4]
    program, answers = Tiny(*tasks), iter([False] * 8 + [True] * 1000)
    stopped = lambda: next(answers)  # noqa: E731
    found = wide_search(
        program, program.objects, None, Limits(), lambda _: False, Strangers(tasks), stopped, plain=2, part=2
    )
    assert 0 < found.executions < 70
    assert not found.complete


def test_a_node_is_forgotten_when_everything_behind_it_is_done() -> None:
    program = Tiny([("inc", "x")] * 3, [("inc", "x")] * 3)
    trees: list[Tree] = []
    grow = Tree.grow

    def seen(tree: Tree, *args: object) -> None:
        trees.append(tree)
        grow(tree, *args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tree, "grow", seen)
        wide_search(
            program,
            program.objects,
            None,
            Limits(),
            lambda _: False,
            Strangers(program.tasks),
            plain=1,
            part=1,
        )
    assert trees
    assert trees[0].root is None


@pytest.mark.slow
def test_several_processes_find_what_one_finds() -> None:
    """More than are done plainly, and than this process does alone."""
    program = LitmusProgram(load_test("zap-range-fault"), named_policy("linux-7.3"))
    found: list[Found] = []
    told: list[int] = []
    with instrument(program.control):
        for jobs in (1, 3):
            told.clear()
            with Team(program, jobs, lambda: False, told.append) as team:
                one = wide_search(program, program.objects, None, Limits(), bool, team, plain=8, part=8)
                found.append(one)
                assert (team._pool is not None) == (jobs > 1)
                assert (0 < sum(told) < one.executions + one.pruned) == (jobs > 1)
    program.close()
    assert found[0] == found[1]
    assert found[0].complete
    assert found[0].executions > PLAIN + 8 * FIRST_PARTS


@pytest.mark.slow
def test_documents_do_not_depend_on_the_number_of_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emulator.explore.results.workers.FIRST_PARTS", 0)
    texts = []
    for jobs in ("1", "3"):
        arguments = ["explore", "return-zap-other-vcpu", "--bound", "2", "--json", "--jobs", jobs]
        assert main(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    (verdict,) = json.loads(texts[0])["explored"]
    assert verdict["preemption_bound"] == 2
    assert verdict["rounds"][-1]["executions"] > PLAIN


def test_the_only_bad_interleaving_is_found() -> None:
    tasks: list[list[Op]] = [[("inc", "x")] * 7, [("r", "x")], [("inc", "z")] * 3]
    program = Tiny(*tasks)
    team = Strangers(tasks, lambda outcome: "[], [3], []" in outcome)
    found = wide_search(
        program,
        program.objects,
        None,
        Limits(),
        lambda outcome: "[], [3], []" in outcome,
        team,
        plain=1,
        part=1,
    )
    assert found.schedule is not None
    assert found.schedule.index(1) in range(3, 7)
    assert "[], [3], []" in found.outcome
