"""`flushlab drift TREE --run`: do the model and the tree's own code agree?"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emulator import interrupts
from emulator.output import saying

if TYPE_CHECKING:
    from emulator.kernel_tree.build import Built
    from emulator.kernel_tree.execute import Executed

DIFFERS = 1


def execute_tree(top: Path, policy: str | None, operations: int, seed: int, *, as_json: bool) -> int:
    """Build the tree, compare it, and print the result; return the exit status."""
    from emulator.kernel_tree.build import DoesNotBuild, build
    from emulator.kernel_tree.execute import execute, policy_for

    try:
        built = build(top)
    except DoesNotBuild as error:
        for line in error.details:
            print(line, file=sys.stderr)
        raise
    chosen = policy or policy_for(built.version)
    interrupts.only_note()
    progress = _progress if sys.stderr.isatty() else None
    result = execute(built, chosen, operations, seed, progress)
    status = _status(result)
    with saying(status):
        if as_json:
            print(json.dumps(document_of(built, result), indent=1))
        else:
            sys.stdout.write(_text(built, result))
    return status


def _status(result: Executed) -> int:
    if result.differences or result.died:
        return DIFFERS
    return interrupts.status() if result.interrupted else 0


def _progress(operations: int) -> None:
    print(f"\r{operations:,} operations", end="", file=sys.stderr, flush=True)


def document_of(built: Built, result: Executed) -> dict[str, Any]:
    return {
        "flushlab_drift_run": 1,
        "version": built.version,
        "policy": result.policy,
        "counts": result.counts,
        "differences": result.differences,
        "argued": result.argued,
        "died": result.died or None,
        "operations_before": result.last,
        "said": result.said if result.died else None,
        "interrupted": result.interrupted,
        "build": {
            "harvested_lines": built.harvested,
            "rounds": built.rounds,
            "stubs": list(built.stubs),
            "cached": built.cached,
        },
    }


def _text(built: Built, result: Executed) -> str:
    from emulator.kernel_tree.report import as_text

    tree = f"Linux {built.version}"
    how = "from the cache" if built.cached else f"{built.harvested} lines of declarations harvested"
    lines = [f"{tree}, its own TDP MMU ({how}), beside the model's {result.policy}", ""]
    for number, found in enumerate(result.differences, 1):
        lines.append(as_text(number, found, result.policy, tree, built.top))
    if result.died:
        lines += [f"The process that runs the tree's code died: {result.died}", f"in sequence {result.seed}:"]
        lines += [
            f"    {at}. {text}" for at, text in enumerate(result.last[-10:], max(1, len(result.last) - 9))
        ]
        lines += ["its last words:", *[f"    {line}" for line in result.said.splitlines()[-12:]]]
    if result.interrupted:
        lines.append(f"Interrupted in sequence {result.seed}.")
    if result.counts:
        lines += _counts_text(result.counts, len(result.differences))
        for reason, number in result.argued.items():
            lines += textwrap.wrap(
                f"known and harmless, {number:,} times: {reason}", 80, subsequent_indent="  "
            )
    return "\n".join(lines) + "\n"


def _counts_text(counts: dict[str, int], shown: int) -> list[str]:
    differing = counts["differing"]
    lines = [
        f"{counts['operations']:,} operations in {counts['sequences']:,} sequences,",
        f"{counts['flushes']:,} flushes, {counts['yields']:,} yields,",
        f"{counts['inside']:,} operations of other CPUs inside, {counts['tables']:,} tables given to RCU",
        f"{differing:,} sequences differ" if differing else "no difference",
    ]
    if differing > shown:
        lines.append("Shown is one for each operation and kind of difference.")
    return lines
