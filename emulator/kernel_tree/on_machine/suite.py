"""Litmus tests on a tree's TDP MMU: one process for each test, policy and batch of executions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from emulator.errors import BadInput
from emulator.kernel_tree.build import Built
from emulator.kernel_tree.on_machine.child import TreeDied, in_child
from emulator.litmus.loader import load_test
from emulator.litmus.model import LitmusTest
from emulator.litmus.suite import Progress, Task, run_task
from emulator.litmus.verdict import Outcome


def fitting_tests(tests: Sequence[LitmusTest], *, named: bool) -> list[LitmusTest]:
    """Return the tests that need no other MMU than the TDP MMU.  If the user `named` the tests, another one
    raises BadInput."""
    others = [test for test in tests if not test.machine.ept]
    if named and others:
        raise BadInput(others[0].name, "it needs the shadow MMU", "with --kernel, a test of a host with EPT")
    return [test for test in tests if test.machine.ept]


def run_on_tree(built: Built, task: Task, progress: Progress = lambda done: None) -> list[Outcome]:
    """Run a task with the tree's TDP MMU (emulator.litmus.suite.run_task).

    A crash or another finding in the tree's code is the outcome's failure, unless there are violations.
    """
    return [outcome for name in task.policies for outcome in _run(built, task, name, progress)]


def _run(built: Built, task: Task, policy: str, progress: Progress) -> list[Outcome]:
    one = Task(task.test, (policy,), task.executions, task.seed, task.more)
    try:
        outcomes, findings = in_child(built, lambda tree: (run_task(one), tree.findings))
    except TreeDied as error:
        outcomes, findings = [Outcome(load_test(task.test).name, policy)], Counter({str(error): 1})
    progress(task.executions)
    for outcome in outcomes:
        if findings and not outcome.kinds:
            outcome.failure = findings_text(findings)
    return outcomes


def findings_text(findings: Counter[str]) -> str:
    """Return the findings as text: each once, with its count."""
    return "; ".join(f"{text} ({n:,} times)" if n > 1 else text for text, n in findings.items())
