"""Audit the search on a tree's code: the accesses that no step covers, and the footprints of the steps."""

from __future__ import annotations

from collections import Counter

from emulator.explore.audit.residue import ResidueProgram
from emulator.explore.audit.run import AuditResult, Parts, run_audit
from emulator.explore.machine.control import Control
from emulator.kernel_tree.build import Built
from emulator.kernel_tree.on_machine.child import TreeDied, in_child
from emulator.kernel_tree.on_machine.core import Tree
from emulator.kernel_tree.on_machine.explored_program import TreeProgram
from emulator.kernel_tree.on_machine.plain import PlainAccesses
from emulator.litmus.model import LitmusTest
from emulator.litmus.policies import named_policy


class TreeResidue(TreeProgram, ResidueProgram):
    """A test on a tree, with the final state in its outcome."""


def audit_on_tree(built: Built, test: LitmusTest, policy: str, executions: int, seed: int = 0) -> AuditResult:
    """Audit one test on a tree that logs its accesses (Use.LOGGED); in a process of its own."""

    def audited(tree: Tree) -> tuple[AuditResult, Counter[str]]:
        made: list[PlainAccesses] = []

        def races(control: Control) -> PlainAccesses:
            made.append(PlainAccesses(control, tree))
            return made[-1]

        parts = Parts(TreeResidue, races, "the tree's code has state of its own")
        result = run_audit(test, named_policy(policy), executions, seed, parts=parts)
        result.plain.update(made[-1].sentences(built))
        return result, tree.findings

    try:
        result, findings = in_child(built, audited)
    except TreeDied as error:
        result, findings = AuditResult(test.name, policy, executions), Counter({str(error): 1})
    result.failed.update(findings)
    return result
