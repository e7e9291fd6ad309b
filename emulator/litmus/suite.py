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
# Executions of a test that one process runs before it takes another piece.
PIECE = 250

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Task:
    """One test (by name or path), the policies to run it under, and the number of executions."""

    test: str
    policies: tuple[str, ...]
    executions: int
    seed: int
    # Run more executions if chance has not yet shown the expected verdict.
    more: bool = False


def run_task(task: Task, progress: Progress = lambda done: None) -> list[Outcome]:
    """Run a task on one machine for all policies, and on a new one after a failure or a leak."""
    test = load_test(task.test)
    outcomes: list[Outcome] = []
    left = list(task.policies)
    while left and not ending():
        with running(test, task.seed) as runner:
            while left and runner.usable and not ending():
                outcomes.append(_run(runner, left.pop(0), task, progress))
    return outcomes


Work = Callable[..., list[Outcome]]


def _run(runner: Runner, name: str, task: Task, progress: Progress) -> Outcome:
    """Run a test under one policy.  Races depend on chance, so a verdict that differs from the expected one
    only because no violation or danger has occurred yet gets more executions."""
    test, policy = runner.test, named_policy(name)
    expected = expected_of(test, name)
    outcome = runner.run(policy, task.executions, task.seed, progress)
    outcome.policy = name
    for _ in range(MORE_ROUNDS if task.more else 0):
        luck = not outcome.kinds and not outcome.failure
        if not luck or ending() or differs(outcome, test, expected) is None:
            break
        # Stop early at a violation only if one is expected.
        seed = task.seed + outcome.executions
        stop_at = 1 if any(isinstance(one, tuple) for one in expected) else 0
        outcome.add(runner.run(policy, task.executions, seed, stop_at=stop_at))
    return outcome


def _tasks(tests: Sequence[tuple[LitmusTest, tuple[str, ...]]], executions: int, seed: int) -> list[Task]:
    """Return pieces of work, in the order of executions: first some of each test."""
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
    work: Work = run_task,
) -> Iterator[Outcome]:
    """Yield outcomes as they complete, several of a test and policy if there are many executions.

    progress: called with numbers of executions.  work: runs a task, in whichever process.
    """
    tasks = _tasks(tests, executions, seed)
    if jobs == 1:
        for task in tasks:
            yield from work(task, progress)  # yields nothing after a signal
        return
    # Processes, because threads would share one interpreter lock.
    with ProcessPool(jobs) as pool:
        futures = {pool.submit(work, task): task for task in tasks}
        for future in pool.completed(list(futures)):
            task = futures[future]
            progress(task.executions * len(task.policies))
            yield from future.result()
