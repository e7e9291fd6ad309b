"""Litmus tests on a tree's code in every interleaving: a process of its own for each test and policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results.record import Recording
from emulator.explore.results.replay import Code
from emulator.explore.results.rounds import Told, silent
from emulator.explore.results.suite import Work, stop_of
from emulator.explore.results.trace import Goal, Trace, traced
from emulator.explore.results.verdict import Verdict, explore_verdict
from emulator.kernel_tree.build import Built
from emulator.kernel_tree.on_machine.child import TreeDied, in_child
from emulator.kernel_tree.on_machine.core import Tree
from emulator.kernel_tree.on_machine.explored import Explored
from emulator.kernel_tree.on_machine.suite import findings_text
from emulator.kernel_tree.on_machine.tdp_mmu import IN_THE_TREE, TreeKvm
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import FAILED

T = TypeVar("T")


class TreeProgram(LitmusProgram):
    """A litmus test on the tree that this process has loaded."""

    constant = (Tree, Explored)
    aside = MappingProxyType({**LitmusProgram.aside, **IN_THE_TREE})

    def __init__(self, *args: Any, **options: Any) -> None:
        assert TreeKvm.loaded is not None
        self._tree = TreeKvm.loaded
        super().__init__(*args, **options)
        self._tree.explore(Explored(self._tree, self.control).handlers)

    def _keep(self) -> None:
        super()._keep()
        if self.initial is not None:
            self._tree.keep()

    def _put_back(self, initial: Any) -> None:
        super()._put_back(initial)
        self._tree.put_back()


def explore_on_tree(built: Built, work: Work, jobs: int = 1, told: Told = silent) -> Verdict:
    """Explore one test under one policy with the tree's TDP MMU (emulator.explore.results.suite.explore_one).

    A crash or another finding in the tree's code is the verdict's failure, unless there are violations.
    """

    def explored(tree: Tree) -> tuple[Verdict, Any]:
        policy = named_policy(work.policy)
        verdict = explore_verdict(work.test, policy, work.plan, stop_of(work), build=TreeProgram)
        return verdict, tree.findings

    try:
        verdict, findings = in_child(built, explored)
        failure = findings_text(findings)
    except TreeDied as error:
        verdict = Verdict(work.test.name, work.policy, work.plan, work.test.expect.needs)
        failure, findings = str(error), Counter()
    if verdict.counterexample is not None:
        verdict.counterexample.kernel, verdict.counterexample.sources = built.version, built.sources
        _add_findings(verdict.counterexample, findings)
    if failure and not verdict.kinds:
        verdict.verdict, verdict.failure = FAILED, failure
    verdict.policy = work.policy
    told(verdict.executions + verdict.pruned)
    return verdict


def trace_on_tree(built: Built, work: Work, goal: Goal) -> Trace | Verdict:
    """Return the execution of the search that reaches the goal, or the verdict of a search in which none does
    (emulator.explore.results.trace.traced).

    Raises TreeDied if the tree's code ends the process.
    """

    def found(tree: Tree) -> Trace | Verdict:
        return traced(work.test, named_policy(work.policy), work.plan, goal, stop_of(work), TreeProgram)

    trace = in_child(built, found)
    if isinstance(trace, Trace):
        trace.recording.kernel, trace.recording.sources = built.version, built.sources
    return trace


def replay_on_tree(built: Built, replayed: Callable[[Code], T]) -> T:
    """Return the result of a function that replays a recording, called in a process that has the tree's TDP
    MMU.

    Raises TreeDied if the tree's code ends the process, or the error that the function raises.
    """
    return in_child(built, lambda tree: replayed(Code(TreeProgram, built.version, built.sources)))


def _add_findings(found: Recording, findings: Mapping[str, int]) -> None:
    """Add what the tree's code has complained of to the story of a violation."""
    if found.violation is None or not findings:
        return
    lines = list(findings)
    found.violation["tree"] = [*found.violation.get("tree", ()), *lines]
    text = [
        found.violation["text"],
        "  the tree's code, in all executions:",
        *(f"    {line}" for line in lines),
    ]
    found.violation["text"] = "\n".join(text)
