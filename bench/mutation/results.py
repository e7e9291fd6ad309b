"""Results as JSON lines: a line for each pair of the suite, and one for each mutant.  Each has
the fingerprint of its sources: a run goes on where the last one ended, and begins anew where they changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.mutation.generate import Mutant
from bench.mutation.judge import Judgement
from bench.mutation.suite import Known, Pair, Shown


class Results:
    """The findings for one state of the sources.  path: None keeps nothing."""

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.known: dict[Pair, Known] = {}
        self.judged: dict[str, Judgement] = {}
        if path is not None and path.exists():
            for line in path.read_text("utf-8").splitlines():
                self._read(json.loads(line))

    def _read(self, line: dict[str, Any]) -> None:
        if line["fingerprint"] != self.fingerprint:
            return
        if "pair" in line:
            pair = Pair(*line["pair"])
            shown = Shown(**line["shown"] | {"kinds": tuple(line["shown"]["kinds"])})
            lines = frozenset((module, n) for module, ns in line["lines"].items() for n in ns)
            self.known[pair] = Known(pair, shown, line["prices"], lines)
        else:
            self.judged[line["digest"]] = Judgement(**line["judgement"])

    def add_known(self, one: Known) -> None:
        self.known[one.pair] = one
        lines: dict[str, list[int]] = {}
        for module, n in sorted(one.lines):
            lines.setdefault(module, []).append(n)
        shown = one.shown
        self._write({
            "pair": [one.pair.test, one.pair.preset, one.pair.choices],
            "shown": {
                "verdict": shown.verdict,
                "kinds": list(shown.kinds),
                "executions": shown.executions,
                "failure": shown.failure,
                "seconds": shown.seconds,
                "complete": shown.complete,
            },
            "prices": one.prices,
            "lines": lines,
        })  # fmt: skip

    def add(self, mutant: Mutant, judgement: Judgement) -> None:
        self.judged[mutant.digest] = judgement
        self._write({
            "digest": mutant.digest,
            "module": mutant.module,
            "line": mutant.line,
            "judgement": judgement.document(),
        })  # fmt: skip

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"fingerprint": self.fingerprint, **line}) + "\n")
