"""`flushlab explore --audit`: look for actions of explored code that the search does not know of."""

from __future__ import annotations

import json
from collections.abc import Sequence

from emulator import interrupts
from emulator.cli.kernel import OnTree, heading
from emulator.explore.audit.run import AuditResult, by_sentence, run_audit
from emulator.explore.machine.options import ExploreOptions
from emulator.litmus.model import INCONCLUSIVE, LitmusTest
from emulator.litmus.policies import named_policy
from emulator.output import saying

FOUND = 1

_TITLES = {
    "unannounced": "native calls without a named point before them",
    "undescribed": "native functions without a described footprint",
    "shared": "Python state that two tasks touch in either order, without a step that says so",
    "plain": "plain accesses of the tree's code that no step covers",
    "ordered": "steps that should commute, and do not",
    "apart": "ways to one state, as --stateful tells states, that go on differently",
    "failed": "executions that cannot go on, as the test and the policy are",
}
# Number of tests that a finding names if it came up in more.
_NAMED = 4


def audit(
    tests: Sequence[LitmusTest],
    policies: Sequence[str],
    executions: int,
    seed: int,
    options: ExploreOptions,
    as_json: bool,
    tree: OnTree | None = None,
) -> int:
    """Audit each test under each policy; return the exit status, 1 if there is a finding."""
    found: list[AuditResult] = []
    pairs = [(test, name) for name in policies for test in tests]
    interrupts.only_note()
    for test, name in pairs:
        if interrupts.came():
            break
        if tree is None:
            found.append(run_audit(test, named_policy(name), executions, seed, options))
        else:
            found.append(tree.audit(test, name, executions, seed))
    status = 0 if all(one.clean for one in found) else FOUND
    with saying(status):
        if as_json:
            kernel = {} if tree is None else {"kernel": tree.document()}
            print(json.dumps({"format": 1, **kernel, "audited": [one.document() for one in found]}, indent=1))
        else:
            if tree is not None:
                print(heading(tree.object, ()))
            _print(found)
    return interrupts.ended(status, len(pairs) - len(found), len(pairs))


def _print(found: Sequence[AuditResult]) -> None:
    for kind, title in _TITLES.items():
        sentences = by_sentence(found, kind)
        if sentences:
            print(f"{title}:")
        for sentence, (n, tests) in sentences.items():
            more = f" and {len(tests) - _NAMED} more" if len(tests) > _NAMED else ""
            print(f"  {n:>6}x {sentence}  [{', '.join(tests[:_NAMED])}{more}]")
    runs = sum(one.executions for one in found)
    swaps = sum(one.swaps for one in found)
    ways = sum(one.ways for one in found)
    clean = sum(one.clean for one in found)
    vacuous = [f"{one.test} under {one.policy}" for one in found if one.verdict == INCONCLUSIVE]
    print(
        f"{clean} of {len(found)} tests and policies without a finding, {runs:,} random executions of each "
        f"kind, {swaps:,} pairs of steps swapped, {ways:,} pairs of ways to one state continued"
    )
    if vacuous:
        more = f" and {len(vacuous) - _NAMED} more" if len(vacuous) > _NAMED else ""
        print(f"{len(vacuous)} of these inconclusive, no steps to swap: {', '.join(vacuous[:_NAMED])}{more}")
