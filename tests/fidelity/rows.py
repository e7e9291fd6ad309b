"""Which recorded operations are compared, by which line; `python -m tests.fidelity.rows` prints all of them.

Of the recordings without EPT and with 32-bit guests (recorded.toml).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .lines import SHADOW, Recorded, load

FIXTURE: Final = Path(__file__).with_name("recorded.toml")


@dataclass(frozen=True)
class Row:
    """One recorded operation; `lines` has the ids of the lines that compare it, `left_out` why none does."""

    scenario: str
    number: int
    operation: str
    lines: tuple[str, ...]
    left_out: str

    def __str__(self) -> str:
        compared = ", ".join(self.lines) or f"NOT COMPARED: {self.left_out}"
        return f"{self.scenario} {self.number:3}  {self.operation}\n{'':>28}{compared}"


def numbers(recorded: Recorded) -> list[int]:
    """Return the numbers of the operations that `ops` lists, as ground_truth.toml explains them."""
    found: list[int] = []
    for part in recorded.ops.split(","):
        bounds, _, every = part.partition(":")
        first, _, last = bounds.partition("-")
        found += range(int(first), int(last or first) + 1, int(every or 1))
    return found


def rows() -> list[Row]:
    """Return all recorded operations.  Raises LookupError if a line names one that was not recorded."""
    compared: dict[tuple[str, int], list[str]] = {}
    for line in load((SHADOW,)):
        for recorded in line.recorded:
            for number in numbers(recorded):
                compared.setdefault((recorded.scenario, number), []).append(line.id)
    found = []
    for scenario in tomllib.loads(FIXTURE.read_text())["scenario"]:
        name, left_out = scenario["name"], scenario.get("left_out", {})
        for number, operation in enumerate(scenario["ops"]):
            lines = tuple(compared.pop((name, number), ()))
            found.append(Row(name, number, operation, lines, left_out.get(str(number), "")))
    for (name, number), ids in compared.items():
        raise LookupError(f"line {ids[0]}: operation {number} of {name} is not in {FIXTURE.name}")
    return found


if __name__ == "__main__":
    print("\n".join(map(str, rows())))
    print(f"{sum(bool(row.lines) for row in rows())} of {len(rows())} recorded operations are compared")
