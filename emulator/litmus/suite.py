"""Many tests under many policies, on several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from emulator.litmus.loader import load_test
from emulator.litmus.model import LitmusTest
from emulator.litmus.policies import expected_of, named_policy
from emulator.litmus.runner import Runner, running
from emulator.litmus.verdict import Outcome, differs
from emulator.processes import ProcessPool, ending

MORE_ROUNDS = 20
# Executions that one process does of a test before it takes another piece.
PIECE = 250

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Task:
    """One test (by name or path), the policies to run it under, and how often."""

    test: str
    policies: tuple[str, ...]
    executions: int
    seed: int
    # Go on where luck has not shown yet what is expected.
    more: bool = False


def run_task(task: Task, progress: Progress = lambda done: None) -> list[Outcome]:
    """One machine for all policies, a new one after a failure."""
    test = load_test(task.test)
    outcomes: list[Outcome] = []
    left = list(task.policies)
    while left and not ending():
        with running(test, task.seed) as runner:
            while left and runner.usable and not ending():
                outcomes.append(_run(runner, left.pop(0), task, progress))
    return outcomes


def _run(runner: Runner, name: str, task: Task, progress: Progress) -> Outcome:
    """Races are luck: a verdict that is not the expected one because something has not happened yet, is given
    more executions."""
    test, policy = runner.test, named_policy(name)
    expected = expected_of(test, name)
    outcome = runner.run(policy, task.executions, task.seed, progress)
    outcome.policy = name
    for _ in range(MORE_ROUNDS if task.more else 0):
        luck = not outcome.kinds and not outcome.failure
        if not luck or ending() or differs(outcome, test, expected) is None:
            break
        # No violation is waited for where none is expected.
        seed = task.seed + outcome.executions
        stop_at = 1 if any(isinstance(one, tuple) for one in expected) else 0
        outcome.add(runner.run(policy, task.executions, seed, stop_at=stop_at))
    return outcome


def _tasks(tests: Sequence[tuple[LitmusTest, tuple[str, ...]]], executions: int, seed: int) -> list[Task]:
    """Pieces of work, in the order of executions: first some of each test."""
    return [
        Task(
            str(test.path) if test.path else test.name,
            policies,
            min(PIECE, executions - done),
            seed + done,
            more=executions <= PIECE,
        )
        for done in range(0, executions, PIECE)
        for test, policies in tests
    ]


def run_suite(
    tests: Sequence[tuple[LitmusTest, tuple[str, ...]]],
    executions: int,
    seed: int,
    jobs: int,
    progress: Progress,
) -> Iterator[Outcome]:
    """Outcomes as they come, several of a test and policy if there are many executions; progress in
    executions."""
    tasks = _tasks(tests, executions, seed)
    if jobs == 1:
        for task in tasks:
            yield from run_task(task, progress)  # nothing of it after a signal
        return
    # Processes of their own: threads of one would share one interpreter lock.
    with ProcessPool(jobs) as pool:
        futures = {pool.submit(run_task, task): task for task in tasks}
        for future in pool.completed(list(futures)):
            task = futures[future]
            progress(task.executions * len(task.policies))
            yield from future.result()
