"""Tasks that do not come to their ends: nothing that they would have done happens; greenlets serve on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from emulator.explore.engine import fibers
from emulator.explore.engine.objects import Objects
from emulator.explore.engine.scheduler import Execution
from emulator.explore.strategies.sampling import Replay

READ = ("x", None, "read")


class Ordered(Replay):
    """The tasks in turn, `n` steps; then it gives up."""

    def __init__(self, n: int, gives_up: bool = True) -> None:
        super().__init__((), then_any=True)
        self.n = n
        self.gives_up = gives_up

    def choose(self, enabled: int, last: int) -> int:
        self.n -= 1
        return -1 if self.gives_up and self.n < 0 else super().choose(enabled, last)


def executed(strategy: Ordered, *bodies: Callable[[Execution], Any]) -> Execution:
    execution = Execution(Objects(), strategy)
    for i, body in enumerate(bodies):
        execution.spawn(f"t{i}", lambda body=body: body(execution))  # type: ignore[misc]
    strategy.begin(len(bodies))
    execution.run()
    return execution


def steps(said: list[object], n: int) -> Callable[[Execution], None]:
    def body(execution: Execution) -> None:
        for i in range(n):
            execution.step(READ, 1, 0)
            said.append(i)

    return body


def test_one_that_was_given_up_ends_there() -> None:
    said = list[object]()
    execution = executed(Ordered(2), steps(said, 5), steps(said, 5))
    assert (execution.pruned, execution.clean, execution.failure) == (True, False, None)
    assert said == [0, 1]
    assert execution.length == 2


def test_one_that_is_stopped_ends_with_its_step() -> None:
    said = list[object]()

    def stops(execution: Execution) -> None:
        execution.step(READ, 1, 0)
        execution.stop()
        said.append("stopped")
        execution.step(READ, 1, 0)
        said.append("went on")

    execution = executed(Ordered(9), stops, steps(said, 5))
    assert (execution.stopped, execution.pruned) == (True, False)
    assert said == ["stopped"]


def test_nothing_happens_on_the_way_out() -> None:
    said = list[object]()

    def tidy(execution: Execution) -> None:
        try:
            execution.step(READ, 1, 0)
            execution.step(READ, 1, 0)
        finally:
            said.append("finally")
            execution.step(READ, 0, 1, lambda: False, "what never comes")
            said.append("tidied up")

    def wrong(execution: Execution) -> None:
        try:
            execution.step(READ, 1, 0)
        finally:
            raise AssertionError("half way")

    execution = executed(Ordered(1), tidy, wrong)
    assert said == ["finally"]
    assert execution.failure is None
    assert not execution.crashed


def test_a_failure_is_the_first_one() -> None:
    def fails(execution: Execution) -> None:
        execution.step(READ, 1, 0)
        raise ValueError("first")

    def wrong(execution: Execution) -> None:
        try:
            execution.step(READ, 1, 0)
        finally:
            raise ValueError("second")

    def fails_at_once(execution: Execution) -> None:
        raise ValueError(str(execution.current.index))

    execution = executed(Ordered(9), fails, wrong)
    assert str(execution.failure) == "first"
    assert execution.crashed
    assert str(executed(Ordered(9), fails_at_once, fails, fails_at_once).failure) == "0"


def test_a_daemon_has_no_retry_loop() -> None:
    """Nothing would wake it: only tasks that are no daemons notice changes."""
    execution = Execution(Objects(), Ordered(9))
    execution.spawn("waits", lambda: execution.step(READ, 1, 0))
    execution.spawn("daemon", lambda: execution.await_change(READ), daemon=True)
    execution.run()
    assert isinstance(execution.failure, AssertionError)


@pytest.mark.parametrize("failed", [False, True])
def test_an_interrupt_on_the_way_out_is_the_failure(failed: bool) -> None:
    def interrupted(execution: Execution) -> None:
        try:
            execution.step(READ, 1, 0)
        finally:
            raise KeyboardInterrupt

    def fails(execution: Execution) -> None:
        execution.step(READ, 1, 0)
        raise ValueError("before")

    execution = executed(Ordered(1), fails if failed else steps([], 3), interrupted)
    assert isinstance(execution.failure, KeyboardInterrupt)


def test_greenlets_serve_again() -> None:
    used = list[set[int]]()
    for n in (0, 1, 5, 1, 0):
        executed(Ordered(n), *(steps([], 3) for _ in range(3)))
        used.append({id(one) for one in fibers._idle.fibers})
    assert all(those == used[0] for those in used)


def test_a_strategy_that_fails_leaves_nobody_behind() -> None:
    class Fails(Ordered):
        def choose(self, enabled: int, last: int) -> int:
            raise ValueError("no idea")

    executed(Ordered(1), steps([], 3), steps([], 3))
    before = len(fibers._idle.fibers)
    with pytest.raises(ValueError, match="no idea"):
        executed(Fails(1), steps([], 3), steps([], 3))
    assert len(fibers._idle.fibers) == before
