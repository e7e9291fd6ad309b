"""`flushlab explore --trace` and `--replay`: one execution, drawn as a whole, or stopped before a step."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final, TypeVar

from emulator import interrupts
from emulator.cli.kernel import OnTree, built_tree, heading
from emulator.errors import BadInput
from emulator.explain.diagram import COURSE_WIDTH, diagram
from emulator.explain.document import course_case
from emulator.explain.explanation import Explanation, Row, explain
from emulator.explain.facts import DEADLOCK
from emulator.explore.engine.scheduler import Divergence
from emulator.explore.results.record import Recording
from emulator.explore.results.replay import MODEL, Code, Stored, replay
from emulator.explore.results.state import state_before
from emulator.explore.results.suite import Work, stop_of
from emulator.explore.results.trace import Goal, goal_of, numbered, traced
from emulator.explore.results.verdict import INTERRUPTED, Verdict
from emulator.kernel_tree.on_machine.child import TreeDied
from emulator.litmus.failure import LitmusFailure
from emulator.litmus.model import LitmusTest
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import FAILED, VIOLATIONS
from emulator.output import make_directory, saying

T = TypeVar("T")

FOUND: Final = 1
DIVERGED: Final = 3
# Without --steps a trace of more rows than this is cut to the first ones, the last ones, and those around the
# first one of each danger.
_MOST: Final = 200
_FIRST, _LAST, _AROUND = 90, 50, 12


def trace(
    tests: Sequence[LitmusTest],
    policies: Sequence[str],
    work: Work,
    number: int | None,
    reach: str | None,
    *,
    steps: bool,
    output: Path | None,
    as_json: bool,
    tree: OnTree | None = None,
) -> int:
    """Draw the execution of the search that is asked for; return the exit status.

    It is 1 if the execution violates or fails, or if no execution reaches the named goal.
    """
    if len(tests) != 1:
        raise BadInput("--trace", f"found {len(tests)} tests", "one test at a time")
    if len(policies) != 1:
        raise BadInput("--trace", f"found {len(policies)} policies", "one policy at a time")
    test, plan = tests[0], work.plan
    if number is not None and number > plan.executions:
        raise BadInput("--number", f"found {number}", f"1 to {plan.executions}, the limit of --executions")
    goal = numbered(number or 1) if reach is None else goal_of(test, reach)
    if output is not None:
        make_directory("--output", output)
    interrupts.only_note()
    try:
        if tree is None:
            found = traced(test, named_policy(policies[0]), plan, goal, stop_of(work))
        else:
            found = tree.trace(work, goal)
    except TreeDied as error:
        return _died(error, as_json)
    if isinstance(found, Verdict):
        return _unreached(found, goal, number, test, policies[0], as_json)
    recording = found.recording
    if output is not None:
        _write(output, recording, reach or str(number or 1))
    status = FOUND if recording.verdict in (VIOLATIONS, FAILED) else 0
    why = "" if reach is None else f", the first that reaches {goal.text}"
    with saying(status):
        if as_json:
            print(json.dumps({"execution": found.number, **recording.document()}, indent=1))
        else:
            if tree is not None:
                print(heading(tree.object, ()))
            head = f"execution {found.number} of the search{why}"
            print("\n".join(textwrap.wrap(head, COURSE_WIDTH, subsequent_indent="    ")))
            _print(recording.document(), steps)
    return status


def _unreached(
    verdict: Verdict, goal: Goal, number: int | None, test: LitmusTest, policy: str, as_json: bool
) -> int:
    """Tell that no execution of the search was the one that was sought."""
    if verdict.limit == INTERRUPTED:
        return interrupts.ended(0, 1, 1)
    ended = verdict.complete or verdict.counterexample is not None
    if number is not None and ended:
        why = "" if verdict.complete else ", the last one violates"
        most = f"1 to {verdict.executions}, as many executions as this search has{why}"
        raise BadInput("--number", f"found {number}", most)
    with saying(FOUND):
        if as_json:
            found = {"reached": False, "goal": goal.text, "executions": verdict.executions}
            head = {"flushlab_unreached": 1, "test": test.name, "policy": policy}
            print(json.dumps({**head, **found}, indent=1))
        else:
            said = f"{test.name} under {policy}: no execution reaches {goal.text}{_how_far(verdict)}"
            print("\n".join(textwrap.wrap(said, COURSE_WIDTH, subsequent_indent="  ")))
    return FOUND


def _how_far(verdict: Verdict) -> str:
    if verdict.counterexample is not None:
        n = verdict.executions
        return f"; the search ended with a violation, in execution {n}: --trace --number {n} shows it"
    if verdict.failure:
        return f"; the search ended with an execution that failed: {verdict.failure}"
    return f" {verdict.searched()}"


def _write(directory: Path, recording: Recording, which: str) -> None:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{recording.test}-{recording.policy}-{which}")
    recording.write(directory / f"{name}.json")


def _print(document: dict[str, Any], steps: bool) -> None:
    """Print a recording's whole course."""
    document = json.loads(json.dumps(document))
    explanation = explain(course_case(document, steps))
    sys.stdout.write(diagram(explanation if steps else _bounded(explanation)))
    violation = document.get("violation")
    # The end of the trace has told of a deadlock already.
    if violation and violation["kind"] != DEADLOCK:
        print(f"\n{violation['text']}")


def _bounded(explanation: Explanation) -> Explanation:
    """Return the explanation with counts in place of rows, if there are too many.

    The beginning and the end stay, and the rows around the first one with each mark.
    """
    rows = explanation.rows
    if len(rows) <= _MOST:
        return explanation
    marked = {row.mark: i for i, row in reversed(list(enumerate(rows))) if row.mark}
    kept = {*range(_FIRST), *range(len(rows) - _LAST, len(rows))}
    for i in marked.values():
        kept.update(range(max(0, i - _AROUND), min(len(rows), i + _AROUND + 1)))
    shown: list[Row] = []
    for there, group in groupby(range(len(rows)), kept.__contains__):
        numbers = list(group)
        if there:
            shown += [rows[i] for i in numbers]
        else:
            gap = f"... {len(numbers):,} rows left out; --steps shows all, --output keeps them for explain"
            shown.append(Row(explanation.columns[0], (gap,), "", 0, rows[numbers[0]].moment, -1))
    return replace(explanation, rows=tuple(shown))


# --- replay -------------------------------------------------------------------------------------------------


def replay_file(
    path: Path, *, trace: bool, steps: bool, stop_at: int | None, as_json: bool, kernel: Path | None = None
) -> int:
    """Run a recording again, with the tree's code if there is one; return the exit status."""
    try:
        if stop_at is not None:
            state = _replayed(lambda code: state_before(Stored.load(path, code), stop_at), kernel)
            with saying(0):
                print(json.dumps(state, indent=1) if as_json else state_text(state))
            return 0
        recording = _replayed(lambda code: replay(path, trace=trace, code=code), kernel)
    except (Divergence, LitmusFailure) as error:
        print(f"flushlab explore: {path}: diverges: {error}", file=sys.stderr)
        return DIVERGED
    except TreeDied as error:
        return _died(error, as_json)
    failed = recording.verdict == FAILED
    status = FOUND if recording.violation is not None or failed else 0
    with saying(status):
        if as_json:
            print(json.dumps(recording.document(), indent=1))
        else:
            _say_same(recording)
            if trace:
                _print(recording.document(), steps)
            elif recording.violation is not None:
                print(recording.violation["text"])
    return status


def _replayed(replayed: Callable[[Code], T], kernel: Path | None) -> T:
    """Return the result of a function that replays a recording."""
    if kernel is None:
        return replayed(MODEL)
    from emulator.kernel_tree.on_machine.explored_program import replay_on_tree

    interrupts.only_note()
    return replay_on_tree(built_tree(kernel), replayed)


def _died(error: TreeDied, as_json: bool) -> int:
    """Print how the tree's code has ended its process; return the exit status."""
    with saying(FOUND):
        print(json.dumps({"kernel": {"failure": error.lines}}) if as_json else error)
    return FOUND


def _say_same(recording: Recording) -> None:
    same = f"{len(recording.steps)} steps, the same as recorded"
    safe = "" if recording.violation is not None else "; no violation"
    if recording.verdict == FAILED and recording.trace is not None:
        safe = f"; {recording.trace['ended']}"
    tree = f" with the code of Linux {recording.kernel}" if recording.kernel else ""
    print(f"{recording.test} under {recording.policy}{tree}: {same}{safe}")


# --- the state before a step --------------------------------------------------------------------------------


def state_text(state: dict[str, Any]) -> str:
    """Return a state as lines of 80 columns."""
    lines = [
        f"{state['test']} under {state['policy']}",
        f"before step {state['step']} of {state['steps']}: {state['thread']} is next, with {state['next']}",
        "",
        *_tasks(state["tasks"]),
        "",
        *_vcpus(state["vcpus"]),
        *_locks(state),
        "",
        *_tlbs(state["tlbs"]),
        "",
        *_custody(state["rights"]),
    ]
    return "\n".join(piece for line in lines for piece in _folded(line))


def _folded(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(line, COURSE_WIDTH, subsequent_indent=indent, break_on_hyphens=False) or [""]


def _tasks(tasks: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["tasks"]
    width = max((len(task["name"]) for task in tasks), default=0)
    for task in tasks:
        lines.append(f"  {task['name']:<{width}}  {_stands(task)}")
        if not task["done"]:
            wait = f"; waits for {task['waits_for']}" if task["waits_for"] else ""
            held = f", held by {' and '.join(task['held_by'])}" if task["held_by"] else ""
            lines.append(f"  {'':<{width}}  next: {task['next']}{wait}{held}")
    return lines


def _stands(task: dict[str, Any]) -> str:
    if task["done"]:
        return "done"
    op = task["operation"]
    doing = f"{op['text']} (operation {op['n']} of {op['of']})" if op else ""
    where = f"on {_cpu(task['cpu'])}" if task["cpu"] and task["cpu"] != task["name"] else ""
    inside = f"in {task['function']}()" if task["function"] else ""
    return ", ".join(part for part in (doing, where, inside) if part) or "at work"


def _cpu(name: str) -> str:
    return name.replace("pcpu", "CPU")


def _vcpus(vcpus: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["vCPUs"]
    for vcpu in vcpus:
        where = f"loaded on {_cpu(vcpu['cpu'])}" if vcpu["cpu"] else "not loaded"
        root = "" if vcpu["root"] is None else f", root {vcpu['root']:#x}"
        asked = ", ".join(vcpu["requests"]) or "none"
        lines.append(f"  v{vcpu['vcpu']}  {vcpu['mode']}, {where}{root}; requests pending: {asked}")
    return lines


def _locks(state: dict[str, Any]) -> list[str]:
    lines = []
    for lock in state["locks"]:
        held = f"held for {lock['for']} by {', '.join(lock['held_by'])}" if lock["held_by"] else "free"
        waiting = f"; {lock['waiting']} waiting" if lock["waiting"] else ""
        lines.append(f"mmu_lock of VM {lock['vm']}: {held}{waiting}")
    rcu = state["rcu"]
    if rcu["readers"] or rcu["callbacks"]:
        readers = ", ".join(map(_cpu, rcu["readers"])) or "none"
        lines.append(f"RCU: readers {readers}; callbacks pending: {rcu['callbacks']}")
    return lines


def _tlbs(tlbs: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["TLBs"]
    for tlb in tlbs:
        tables = f"; {tlb['tables']} cached tables" if tlb["tables"] else ""
        n = len(tlb["entries"])
        lines.append(f"  CPU{tlb['cpu']}: {n} translation{'' if n == 1 else 's'}{tables}")
        lines += [f"    {_entry(entry)}" for entry in tlb["entries"]]
    return lines


def _entry(entry: dict[str, Any]) -> str:
    tags = {
        "combined": "VPID {vpid}, PCID {pcid}, EP4TA {ep4ta:#x}",
        "guest-physical": "EP4TA {ep4ta:#x}",
        "linear": "VPID {vpid}, PCID {pcid}",
    }[entry["kind"]].format_map(entry)
    size = "" if entry["size"] == "4K" else f" {entry['size']}"
    now = f": {entry['now']}" if entry["now"] else ""
    return f"page {entry['page']:#x} to frame {entry['frame']:#x}{size}, {tags}{now}"


def _custody(rights: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["custody of pages"]
    for right in rights:
        host = "" if right["host_has_it"] else "; the host has no frame for it"
        vm = f"VM {right['vm']} " if right["vm"] else ""
        lines.append(f"  {vm}gfn {right['gfn']:#x} to frame {right['frame']:#x}: {right['now']}{host}")
    return lines if rights else [*lines, "  nothing was mapped"]
