"""Sampling: PCT's promise, and its statement in the verdict."""

from __future__ import annotations

import pytest

from emulator.cli.main import main
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.explore.strategies.sampling import Pct
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
