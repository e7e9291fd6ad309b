"""Print which operations of the recordings with nested guests are compared, and how exactly.

    python -m tests.fidelity.nested_rows

nested_rows.toml has the recordings; a test compares it with the steps that the other tests execute.  rows.py
has the operations without nested guests.
"""

from __future__ import annotations

import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

from . import nested, nested_ept

ROWS: Final = Path(__file__).with_name("nested_rows.toml")


def rows() -> dict[str, Any]:
    return tomllib.loads(ROWS.read_text())


def compared() -> dict[str, set[str]]:
    """Return the operations that are compared, by recording: names with arguments."""
    found: dict[str, set[str]] = defaultdict(set)
    for fixture in (nested.FIXTURE, nested_ept.FIXTURE):
        for run in tomllib.loads(fixture.read_text())["run"]:
            operations = {step[1] for step in run["steps"] if len(step) > 1}
            for key in ("recorded", "two_vcpus"):
                if key in run:
                    found[run[key]] |= operations
    return found


def inexact_steps() -> set[tuple[str, str]]:
    """Return (recording, first word) of steps some counts of which are not compared."""
    return {
        (run["recorded"], step[0].split()[0])
        for fixture in (nested.FIXTURE, nested_ept.FIXTURE)
        for run in tomllib.loads(fixture.read_text())["run"]
        for step in run["steps"]
        if any("?" in counts for counts in step[2:])
    }


def table() -> str:
    data, found = rows(), compared()
    lines = [f"{'recording':<26}{'operations':>11}{'compared':>10}"]
    for name, operations in data["operations"].items():
        lines.append(f"{name:<26}{operations:>11}{len(found[name]):>10}")
    total = sum(data["operations"].values())
    lines.append(f"{'all':<26}{total:>11}{sum(len(found[name]) for name in data['operations']):>10}")
    for entry in data["inexact"]:
        lines += [
            "",
            f"{entry['step']}, in {', '.join(entry['recordings'])}: {entry['what']},",
            f"  because {entry['why']}",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
