"""Sampling: PCT's promise, and its statement in the verdict; the orders that each walk favours."""

from __future__ import annotations

from collections import Counter
from typing import Final

import pytest

from emulator.cli.main import main
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.explore.strategies.sampling import Pct, Pos, RandomWalk, Sampler, Surw
from emulator.explore.strategies.search import Limits, search
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy
from tests.emulator.explore.tiny_programs import Op, Tiny


@pytest.mark.parametrize("executions", [1, 2, 7])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_guarantee_is_about_the_longest_execution(executions: int, depth: int) -> None:
    task: list[Op] = [("inc", "x"), ("w", "y", "1"), ("inc", "x")]
    program = Tiny(task, task, task)
    strategy = Pct(executions, 1, depth)
    found = search(program, program.objects, strategy, Limits(), lambda _: False)
    assert (found.executions, found.depth) == (executions, 9)
    # 1 / (n * k^(d-1))
    assert strategy.guarantee() == pytest.approx(1 / (3 * 9 ** (depth - 1)))


@pytest.mark.parametrize("executions", [1, 5])
def test_a_verdict_by_pct_says_its_odds(executions: int) -> None:
    plan = Plan("pct", executions=executions, depth=2)
    found = explore_verdict(load_test("return-zap"), named_policy("linux-7.3"), plan)
    # v0, mm, two pCPUs' interrupts and RCU.
    assert found.guarantee == pytest.approx(1 / (5 * found.depth))
    odds = f"PCT's odds for a bug of depth 2: at least 1 in {5 * found.depth:,} an execution"
    assert odds in found.summary()


def test_the_table_has_the_odds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", "return-zap", "--strategy", "pct", "--executions", "1", "--jobs", "1"]) == 0
    assert "PCT's odds" in " ".join(capsys.readouterr().out.split())
    assert main(["explore", "return-zap", "--strategy", "random", "--executions", "1", "--jobs", "1"]) == 0
    assert "odds" not in capsys.readouterr().out


def test_nothing_is_promised_of_what_did_not_run() -> None:
    plan = Plan(strategy="pct")
    found = explore_verdict(load_test("return-zap"), named_policy("linux-7.3"), plan, lambda: True)
    assert (found.executions, found.guarantee) == (0, None)
    assert "odds" not in found.summary()


# Ten steps that concern nothing else, in which a random walk loses its way.
ALONE: Final[list[Op]] = [("inc", "y")] * 10


def values_read(strategy: Sampler, *tasks: list[Op]) -> Counter[int]:
    """Return how often the second task's first read has found each value."""
    program, found = Tiny(*tasks), Counter[int]()

    def count(_: str) -> bool:
        found[program.registers[1][0]] += 1
        return False

    search(program, program.objects, strategy, Limits(), count)
    return found


def test_pos_does_not_sample_the_orders_of_independent_steps() -> None:
    """The read comes last if its priority is below those of eleven steps, which is one case of twelve.

    A random walk would have to choose the first task eleven times.
    """
    tasks: list[list[Op]] = [[*ALONE, ("w", "x", "1")], [("r", "x")]]
    assert 60 <= values_read(Pos(1200, 1), *tasks)[1] <= 140
    assert values_read(RandomWalk(1200, 1), *tasks)[1] <= 5


def test_pos_draws_again_after_a_conflict() -> None:
    """The read comes last if two draws are lost; a priority that stays would make that one case of three."""
    tasks: list[list[Op]] = [[("w", "x", "1"), ("w", "x", "2")], [("r", "x")]]
    assert 440 <= values_read(Pos(2000, 1), *tasks)[2] <= 560


@pytest.mark.parametrize("alone", [[], ALONE])
def test_surw_samples_the_orders_of_the_chosen_steps_alike(alone: list[Op]) -> None:
    writes: list[Op] = [*alone, ("w", "x", "1"), ("w", "x", "2"), ("w", "x", "3")]
    found = values_read(Surw(2001, 1), writes, [("r", "x")])
    assert set(found) == {0, 1, 2, 3}
    assert all(430 <= n <= 570 for n in found.values()), found
    # A random walk favours some of them.
    walked = values_read(RandomWalk(2001, 1), writes, [("r", "x")])
    assert max(walked.values()) > 900


def test_surw_goes_on_where_the_drawn_task_cannot() -> None:
    """The first task waits for the second one, which is to wait for the first one by the draw."""
    tasks: list[list[Op]] = [[("wait", "x", "1"), ("inc", "z")], [("r", "z"), ("w", "x", "1"), ("inc", "z")]]
    program = Tiny(*tasks)
    found = search(program, program.objects, Surw(50, 1), Limits(), lambda _: False)
    assert found.executions == 50
    assert not any("deadlock" in outcome for outcome in found.outcomes)
