"""The verdicts of `flushlab explore`: printed, with their counterexamples written, as they are reached."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from emulator import interrupts
from emulator.cli.kernel import OnTree, heading
from emulator.errors import BadInput, bad_input_of
from emulator.output import Unwritable, saying, write_file
from emulator.report.cases import Case, ktap
from emulator.report.cases import junit as junit_of

if TYPE_CHECKING:
    from emulator.explore.results.suite import Work
    from emulator.explore.results.verdict import Verdict
    from emulator.litmus.model import LitmusTest

FOUND: Final = 1
# Least columns of a terminal for a verdict beside the names of its test and policy.
_READABLE: Final = 50


class Verdicts:
    """The verdicts of a search.  Each is printed, and its counterexample written, as soon as it is
    reached."""

    def __init__(
        self,
        work: Sequence[Work],
        lines: Lines | None,
        output: Path | None,
        *,
        as_ktap: bool = False,
        junit: Path | None = None,
    ) -> None:
        self.work = work
        self.lines = lines
        self.output = output
        self.as_ktap = as_ktap
        self.junit = junit
        self.verdicts: list[Verdict] = []
        self.kernel: dict[str, str] | None = None  # the tree that was explored
        self.lost: BadInput | None = None
        self.started = time.monotonic()

    def about(self, tree: OnTree, chosen: Sequence[str]) -> Callable[..., Verdict]:
        """Print which tree is explored; return the function that explores a pair."""
        self.kernel = tree.document()
        if self.lines is not None:
            print(heading(tree.object, chosen))
        return tree.exploring()

    @property
    def status(self) -> int:
        found = any(verdict.counterexample is not None or verdict.failure for verdict in self.verdicts)
        return FOUND if found else 0

    def take(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        if verdict.unkept:
            self.lost = self.lost or bad_input_of(verdict.unkept)
        if self.output is not None:
            try:
                _write(self.output, verdict)
            except Unwritable as error:
                self.lost = self.lost or error
        if self.lines is not None:
            with saying(self.status):
                self.lines.print(verdict)

    def end(self) -> int:
        """Print the document or the totals; return the exit status."""
        from emulator.explore.results.verdict import INTERRUPTED
        from emulator.litmus.verdict import proofs

        elapsed = time.monotonic() - self.started
        reached = {(verdict.test, verdict.policy) for verdict in self.verdicts}
        missing = [(w.test.name, w.policy) for w in self.work if (w.test.name, w.policy) not in reached]
        self._write_junit(missing)
        with saying(self.status):
            if self.as_ktap:
                sys.stdout.write(ktap(self._cases(missing)))
            elif self.lines is None:
                document: dict[str, Any] = {"format": 1, "explored": [v.document() for v in self.verdicts]}
                if self.kernel is not None:
                    document["kernel"] = self.kernel
                if interrupts.came():
                    document["not_reached"] = [{"test": test, "policy": policy} for test, policy in missing]
                print(json.dumps(document, indent=1))
            else:
                before = sum(verdict.before for verdict in self.verdicts)
                runs = sum(verdict.executions + verdict.pruned for verdict in self.verdicts) - before
                kept = f", besides {before:,} that --state has kept" if before else ""
                rate = f"{runs / max(elapsed, 1e-9):,.0f} a second"
                print(f"{runs:,} execution{'' if runs == 1 else 's'} in {elapsed:.1f} s, {rate}{kept}")
                if len(self.verdicts) > 1:
                    print(proofs((v.verdict, v.test, v.policy) for v in self.verdicts))
                _show_only(self.verdicts)
        if self.lost is not None:
            print(f"flushlab: {self.lost}", file=sys.stderr)
        cut = sum(verdict.limit == INTERRUPTED for verdict in self.verdicts)
        return interrupts.ended(self.status, len(missing), len(self.work), cut=cut)

    def _cases(self, missing: Sequence[tuple[str, str]]) -> list[Case]:
        reached = [verdict.case() for verdict in self.verdicts]
        return reached + [Case(test, policy, "skipped", "not reached") for test, policy in missing]

    def _write_junit(self, missing: Sequence[tuple[str, str]]) -> None:
        if self.junit is None:
            return
        try:
            write_file("--junit", self.junit, junit_of("flushlab explore", self._cases(missing)))
        except Unwritable as error:
            self.lost = self.lost or error


class Lines:
    """Prints a line for each verdict, or two on a terminal that is too narrow."""

    def __init__(self, tests: Sequence[LitmusTest], policies: Sequence[str]) -> None:
        self.console = Console()
        self.widths = max(len(test.name) for test in tests), max(map(len, policies))

    def print(self, verdict: Verdict) -> None:
        test, policy = self.widths
        names = f"{verdict.test:<{test}}  {verdict.policy:<{policy}}  "
        large = "" if verdict.size is None else f"\n{verdict.size.text()}"
        if not self.console.is_terminal:
            print(names + verdict.summary() + large.replace("\n", "\n    "))
        elif self.console.width - len(names) >= _READABLE:
            row = Table.grid(Column(width=len(names)), Column())
            row.add_row(Text(names), Text(verdict.summary() + large))
            self.console.print(row)
        else:
            self.console.print(Text(names.rstrip()))
            self.console.print(Padding(Text(verdict.summary() + large), (0, 0, 0, 4)))


def _show_only(verdicts: list[Verdict]) -> None:
    """Print the counterexample if it belongs to the only verdict."""
    if len(verdicts) != 1 or verdicts[0].counterexample is None:
        return
    found = verdicts[0].counterexample
    print(f"\n{len(found.steps)} steps, {found.document()['context_switches']} context switches:\n")
    if found.violation is not None:
        print(found.violation["text"])


def _write(directory: Path, verdict: Verdict) -> None:
    if verdict.counterexample is None:
        return
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{verdict.test}-{verdict.policy}")
    verdict.counterexample.write(directory / f"{name}.json")
