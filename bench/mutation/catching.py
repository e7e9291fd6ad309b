"""catching.toml: the pair that caught each mutant last, which is tried first the next time.

The list is a hint.  A mutant that its pair no longer catches is judged like any other, and so is one that has
taken over the name of another as KVM's code changed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from bench.mutation.generate import Mutant, mutants
from bench.mutation.judge import CAUGHT, Judgement

FILE: Final = Path(__file__).with_name("catching.toml")
_HEADER: Final = """\
# The pair of the suite that caught each mutant last, after the kind of the catch.
# Written by `python -m bench.mutation ... --record`, which keeps the entries of
# mutants that it has not judged, and drops those of mutants that are gone.

"""


@dataclass(frozen=True, slots=True)
class Catch:
    """A catch by explore.  kind: as of a Judgement.  pair: the pair's text."""

    kind: str
    pair: str

    def __str__(self) -> str:
        return f"{self.kind} {self.pair}"


@cache
def catching() -> dict[str, Catch]:
    """Return the listed catches, by the mutants' names."""
    found: dict[str, str] = tomllib.loads(FILE.read_text("utf-8"))
    return {name: Catch(*text.split(" ", 1)) for name, text in found.items()}


def recorded(
    before: dict[str, Catch], judged: Iterable[tuple[Mutant, Judgement]], names: Iterable[str]
) -> str:
    """Return the text of the list with new judgements.  names: all mutants'."""
    found = dict(before)
    for mutant, judgement in judged:
        found.pop(mutant.name, None)
        if judgement.verdict == CAUGHT and judgement.by == "explore":
            found[mutant.name] = Catch(judgement.kind, judgement.pair)
    kept = sorted(found.keys() & set(names))
    return _HEADER + "".join(f'"{name}" = "{found[name]}"\n' for name in kept)


def record(judged: Iterable[tuple[Mutant, Judgement]]) -> None:
    """Write the list anew with new judgements."""
    FILE.write_text(recorded(catching(), judged, [one.name for one in mutants()]), "utf-8")
