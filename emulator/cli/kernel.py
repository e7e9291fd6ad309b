"""Build a kernel's TDP MMU for a command that runs it in the place of the model's."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from emulator.errors import BadInput
from emulator.output import saying

if TYPE_CHECKING:
    from emulator.cli.run import Request
    from emulator.explore.audit.run import AuditResult
    from emulator.explore.results.suite import Work
    from emulator.explore.results.trace import Goal, Trace
    from emulator.explore.results.verdict import Verdict
    from emulator.kernel_tree.build import Built
    from emulator.kernel_tree.on_machine.core import Tree
    from emulator.litmus.model import LitmusTest
    from emulator.policy import Policy
    from emulator.scenario.config import Scenario

# The exit status for findings in the tree's code.
FOUND: Final = 1


def built_tree(top: Path, *, logged: bool = False) -> Built:
    """Return the tree's object for the machine; print the compiler's messages if it does not build.

    logged: the object logs its accesses to memory.
    """
    from emulator.kernel_tree.build import DoesNotBuild, Use, build

    try:
        return build(top, Use.LOGGED if logged else Use.MACHINE)
    except DoesNotBuild as error:
        for line in error.details[:-1]:
            print(line, file=sys.stderr)
        raise


@dataclass(frozen=True, slots=True)
class TreeReport:
    """The tree of a run, loaded in the run's process, and its findings."""

    built: Built
    tree: Tree
    chosen: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        return {
            "tree": str(self.built.top),
            "version": self.built.version,
            "code": self.built.code,
            "findings": dict(self.tree.findings),
        }

    def text(self) -> str:
        from emulator.kernel_tree.on_machine.suite import findings_text

        text = heading(self.built, self.chosen)
        return text + (f"\n{findings_text(self.tree.findings)}" if self.tree.findings else "")

    def status(self) -> int:
        return FOUND if self.tree.findings else 0


def run_on_kernel(top: Path, request: Request) -> int:
    """Run a scenario with the tree's TDP MMU, in a process of its own; return the exit status."""
    from emulator.cli.run import load_policy, run_request
    from emulator.kernel_tree.execute import policy_for
    from emulator.policy import DEFAULT
    from emulator.scenario.config import load_scaled

    scenario = load_scaled(request.scenario, request.pcpus, request.ept, request.costs)
    chosen = (*([request.policy] if request.policy else []), *request.settings)
    policies = [load_policy(request.policy or DEFAULT, request.settings)] if chosen else []

    def run(report: TreeReport) -> int:
        policy = request.policy or policy_for(report.built.version)
        return run_request(replace(request, policy=policy), report)

    return on_kernel(top, scenario, policies, run, chosen=chosen, as_json=request.as_json)


def on_kernel(
    top: Path,
    scenario: Scenario,
    policies: Sequence[Policy],
    run: Callable[[TreeReport], int],
    *,
    chosen: Sequence[str],
    as_json: bool,
) -> int:
    """Return the exit status of `run`, in a process of its own that has the tree's TDP MMU.

    Raises BadInput before that process begins, for a scenario without EPT, a policy that decides what the
    tree decides, and a tree that does not build.  chosen: the user's words for the policies.
    """
    from emulator import interrupts
    from emulator.kernel_tree.on_machine.child import TreeDied, in_child
    from emulator.kernel_tree.on_machine.points import check_policy_for_tree

    if not scenario.machine.ept:
        expected = "with --kernel, a scenario of a host with EPT"
        raise BadInput(scenario.name, "it needs the shadow MMU", expected)
    for policy in policies:
        check_policy_for_tree(policy)
    built = built_tree(top)
    interrupts.only_note()
    try:
        return in_child(built, lambda tree: run(TreeReport(built, tree, tuple(chosen))), talks=True)
    except TreeDied as error:
        with saying(FOUND):
            print(json.dumps({"kernel": {"failure": error.lines}}) if as_json else error)
        return FOUND


@dataclass(frozen=True, slots=True)
class OnTree:
    """A command's tree, the tests that can run on it, and the policies that decide in the model's part."""

    object: Built
    tests: list[LitmusTest]
    policies: list[str]

    @classmethod
    def built(
        cls,
        top: Path,
        tests: Sequence[LitmusTest],
        policies: list[str],
        *,
        named: bool,
        logged: bool = False,
    ) -> OnTree:
        """Build the tree.  Raises BadInput for tests that do not fit it, and policies that decide for it."""
        from emulator.kernel_tree.execute import policy_for
        from emulator.kernel_tree.on_machine.points import check_policy_for_tree
        from emulator.kernel_tree.on_machine.suite import fitting_tests
        from emulator.litmus.policies import named_policy

        fitting = fitting_tests(tests, named=named)
        for name in policies:
            check_policy_for_tree(named_policy(name))
        built = built_tree(top, logged=logged)
        return cls(built, fitting, policies or [policy_for(built.version)])

    def work(self) -> Callable[..., Any]:
        """Return the function that runs a task of a suite."""
        from emulator.kernel_tree.on_machine.suite import run_on_tree

        return partial(run_on_tree, self.object)

    def exploring(self) -> Callable[..., Any]:
        """Return the function that explores a pair of a suite."""
        from emulator.kernel_tree.on_machine.explored_program import explore_on_tree

        return partial(explore_on_tree, self.object)

    def audit(self, test: LitmusTest, policy: str, executions: int, seed: int) -> AuditResult:
        from emulator.kernel_tree.on_machine.audit import audit_on_tree

        return audit_on_tree(self.object, test, policy, executions, seed)

    def trace(self, work: Work, goal: Goal) -> Trace | Verdict:
        """Return the execution of the search that reaches the goal, or the verdict of a search without it.

        Raises TreeDied if the tree's code ends the process.
        """
        from emulator.kernel_tree.on_machine.explored_program import trace_on_tree

        return trace_on_tree(self.object, work, goal)

    def document(self) -> dict[str, Any]:
        built = self.object
        about = {"tree": str(built.top), "version": built.version, "sources": built.sources}
        return {**about, "code": built.code}


def heading(built: Built, chosen: Sequence[str]) -> str:
    """Return a sentence in 80 columns: which code runs, and which points chosen policies do not decide."""
    from emulator.kernel_tree.on_machine.points import OWN_POINTS

    how = "from the cache" if built.cached else f"{built.harvested} lines of declarations harvested"
    text = f"Linux {built.version} has the TDP MMU and requests to all vCPUs ({how}; sources {built.sources})"
    if chosen:
        text += f", and decides {', '.join(OWN_POINTS)}; {', '.join(chosen)} decides the rest"
    return "\n".join([*textwrap.wrap(text, 80, break_on_hyphens=False), ""])
