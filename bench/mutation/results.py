"""Results as JSON lines: a line for each pair of the suite, and one for each mutant.

Each line has the fingerprint of its sources, and a pair's the hash of its test's text, so a run goes on where
the last one ended: a survivor is looked at with new tests only.  Where the sources have changed, mutants are
judged anew, and the pair that caught a mutant before is tried first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bench.mutation.catching import Catch, catching
from bench.mutation.generate import Mutant
from bench.mutation.judge import (
    BROKEN,
    CAUGHT,
    COST_ONLY,
    COUNTS,
    THIS_ONE,
    Depth,
    Judgement,
    pending,
    reaches,
)
from bench.mutation.suite import Known, Pair, Shown, text_hash

# A pair that caught others of a mutant's function promises more than those that caught mutants elsewhere.
_THIS_FUNCTION: Final = 1000


def test_of(judgement: Judgement) -> str:
    """Return the test of the pair that caught a mutant, "" if none did."""
    return judgement.pair.partition(" ")[0]


class Results:
    """The findings for one state of the sources.  path: None keeps nothing.  others: files to read only, as
    those of other shards.

    Which pair caught a mutant last is remembered from other states of the sources as well, and from
    catching.toml.
    """

    def __init__(self, path: Path | None, fingerprint: str, others: Sequence[Path] = ()) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.known: dict[Pair, Known] = {}
        self.judged: dict[str, Judgement] = {}
        self._caught: dict[str, Counter[str]] = {}  # by function, and "": how often each pair caught a mutant
        self._catching = dict(catching())  # by mutant: the pair that caught it last
        for name, listed in self._catching.items():
            self._count(name, listed.pair)
        for file in (*others, *([path] if path is not None and path.exists() else [])):
            for line in file.read_text("utf-8").splitlines():
                self._read(json.loads(line))

    def _read(self, line: dict[str, Any]) -> None:
        if "pair" in line:
            pair = Pair(*line["pair"])
            if line["fingerprint"] == self.fingerprint and line["text"] == text_hash(pair.test):
                shown = Shown(**line["shown"] | {"kinds": tuple(line["shown"]["kinds"])})
                lines = frozenset((module, n) for module, ns in line["lines"].items() for n in ns)
                self.known[pair] = Known(pair, shown, line["counts"], lines)
            return
        judgement = Judgement(**line["judgement"])
        self._remember(judgement)
        if line["fingerprint"] == self.fingerprint and line["text"] == text_hash(test_of(judgement)):
            self.judged[line["digest"]] = judgement

    def _remember(self, judgement: Judgement) -> None:
        if judgement.verdict == CAUGHT:
            self._count(judgement.name, judgement.pair)
            self._catching[judgement.name] = Catch(judgement.kind, judgement.pair)

    def _count(self, name: str, pair: str) -> None:
        function = name.partition("@")[2].partition("#")[0]
        for where in (function, ""):
            self._caught.setdefault(where, Counter())[pair] += 1

    def telling(self, mutant: Mutant) -> Mapping[str, int]:
        """Return how much each pair promises for a mutant, by what it has caught, first in its function."""
        found = Counter(self._caught.get("", {}))
        for pair, n in self._caught.get(mutant.function, {}).items():
            found[pair] += _THIS_FUNCTION * n
        if mutant.name in self._catching:
            found[self._catching[mutant.name].pair] += THIS_ONE
        return found

    def counts_tell(self, mutant: Mutant) -> bool:
        """Return whether the last catch of a mutant was by the counts of an execution."""
        return mutant.name in self._catching and self._catching[mutant.name].kind == COUNTS

    def stands(self, mutant: Mutant, known: Sequence[Known], depth: Depth) -> bool:
        """Return whether a mutant has been caught, or only costs, or no look is left to do."""
        found = self.judged.get(mutant.digest)
        if found is None or found.verdict in (CAUGHT, BROKEN, COST_ONLY):
            return found is not None
        return not any(pending(reaches(mutant, known, self.telling(mutant)), depth, found.looked))

    def add_known(self, one: Known) -> None:
        self.known[one.pair] = one
        lines: dict[str, list[int]] = {}
        for module, n in sorted(one.lines):
            lines.setdefault(module, []).append(n)
        shown = one.shown
        self._write({
            "pair": [one.pair.test, one.pair.preset, one.pair.choices],
            "text": text_hash(one.pair.test),
            "shown": asdict(shown),
            "counts": one.counts,
            "lines": lines,
        })  # fmt: skip

    def add(self, mutant: Mutant, judgement: Judgement) -> None:
        self.judged[mutant.digest] = judgement
        self._remember(judgement)
        self._write({
            "digest": mutant.digest,
            "module": mutant.module,
            "line": mutant.line,
            "text": text_hash(test_of(judgement)),
            "judgement": judgement.document(),
        })  # fmt: skip

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"fingerprint": self.fingerprint, **line}) + "\n")
