"""Results of the functions: typed, with rows that become a pandas table, and the documents of --json."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from statistics import median
from typing import Any

from rich.console import Console, RenderableType

from emulator.compare.document import comparison_document
from emulator.compare.measure import Measurement
from emulator.compare.runner import Comparison
from emulator.compare.table import comparison_table
from emulator.errors import BadInput
from emulator.explore.results.verdict import Verdict
from emulator.litmus.table import Results
from emulator.report.result import Report
from emulator.report.summary import document, summary

_WIDTH = 120


class Rows(ABC):
    """A result that is a table: rows with the same columns."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """Return the rows, each with its values by column."""

    def to_pandas(self) -> Any:
        """Return the rows as a pandas.DataFrame."""
        try:
            import pandas
        except ImportError:
            found = "pandas is not installed"
            raise BadInput("to_pandas()", found, "it: pip install 'flushlab[data]'") from None
        return pandas.DataFrame(self.rows())


@dataclass(frozen=True, slots=True)
class RunResult(Rows):
    """A run of a scenario under a policy.

    `figures` are those that `compare` shows: rates per million guest accesses have keys that end in `/M`.
    """

    measurement: Measurement

    @property
    def policy(self) -> str:
        return self.measurement.result.policy_name

    @property
    def scenario(self) -> str:
        return self.measurement.result.scenario

    @property
    def seed(self) -> int:
        return self.measurement.result.seed

    @property
    def verdict(self) -> str:
        """Return "clean", "violations" or "inconclusive"."""
        return self.measurement.result.verdict

    @property
    def failure(self) -> str:
        """Return the reason why the run failed and proves nothing; "" if it did not."""
        return self.measurement.result.failure

    @property
    def violations(self) -> Mapping[str, int]:
        """Return the number of violations by kind."""
        return self.measurement.result.snapshot.violations

    @property
    def reports(self) -> tuple[Report, ...]:
        return self.measurement.result.reports

    @property
    def figures(self) -> Mapping[str, float]:
        return self.measurement.values

    @property
    def answers(self) -> Mapping[str, Mapping[str, int]]:
        """Return how often the policy's class gave each answer, by decision point."""
        return self.measurement.result.policy_given

    def rows(self) -> list[dict[str, Any]]:
        head = {"scenario": self.scenario, "policy": self.policy, "seed": self.seed, "verdict": self.verdict}
        return [{**head, **self.figures}]

    def document(self) -> dict[str, Any]:
        """Return the document that `flushlab run --json` prints."""
        return document(self.measurement.result)

    def __str__(self) -> str:
        return _text(summary(self.measurement.result))


@dataclass(frozen=True, slots=True)
class CompareResult(Rows):
    """Policies side by side, the baseline first: a row for each run."""

    comparison: Comparison

    @property
    def policies(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.comparison.columns)

    def runs(self, policy: str) -> list[RunResult]:
        """Return a policy's runs, one for each repetition."""
        return [RunResult(measurement) for measurement in self.comparison.measurements[policy]]

    def verdict(self, policy: str) -> str:
        """Return the worst verdict of a policy's runs."""
        return self.comparison.verdict(policy)

    def median(self, policy: str, figure: str) -> float:
        """Return the median of a figure, which is 0 in runs that do not have it."""
        return median(run.figures.get(figure, 0.0) for run in self.runs(policy))

    def rows(self) -> list[dict[str, Any]]:
        return [row for policy in self.policies for run in self.runs(policy) for row in run.rows()]

    def document(self) -> dict[str, Any]:
        """Return the document that `flushlab compare --json` prints."""
        return comparison_document(self.comparison)

    def __str__(self) -> str:
        console = Console(width=_WIDTH, file=StringIO())
        return _text(comparison_table(self.comparison, console))


@dataclass(frozen=True, slots=True)
class LitmusResult(Rows):
    """Litmus tests on real threads: a row for each test and policy."""

    results: Results

    def verdict(self, test: str, policy: str) -> str:
        (found,) = (row["verdict"] for row in self.rows() if (row["test"], row["policy"]) == (test, policy))
        return str(found)

    @property
    def as_expected(self) -> bool:
        """Return whether each verdict is as its test expects, and no other policy violated."""
        return not self.results.differing() and not self.results.unforeseen()

    def rows(self) -> list[dict[str, Any]]:
        keys = ("test", "policy", "verdict", "executions", "violating", "differs")
        return [
            {**{key: one[key] for key in keys}, "violations": ", ".join(one["violations"])}
            for one in self.document()["outcomes"]
        ]

    def document(self) -> dict[str, Any]:
        """Return the document that `flushlab litmus --json` prints."""
        return self.results.document()


@dataclass(frozen=True, slots=True)
class ExploreResult(Rows):
    """Litmus tests in every interleaving: a row for each test and policy."""

    verdicts: tuple[Verdict, ...]

    def verdict(self, test: str, policy: str) -> str:
        (found,) = (one.verdict for one in self.verdicts if (one.test, one.policy) == (test, policy))
        return found

    def counterexample(self, test: str, policy: str) -> str | None:
        """Return the report of the violation that was found; None if there is none."""
        (one,) = (one for one in self.verdicts if (one.test, one.policy) == (test, policy))
        found = one.counterexample
        return None if found is None or found.violation is None else str(found.violation["text"])

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "test": one.test,
                "policy": one.policy,
                "verdict": one.verdict,
                "executions": one.executions,
                "complete": one.complete,
                "violations": ", ".join(one.kinds),
                "claim": one.summary(),
            }
            for one in self.verdicts
        ]

    def document(self) -> dict[str, Any]:
        """Return the document that `flushlab explore --json` prints."""
        return {"format": 1, "explored": [one.document() for one in self.verdicts]}


def _text(renderable: RenderableType) -> str:
    file = StringIO()
    Console(width=_WIDTH, file=file, highlight=False).print(renderable)
    return file.getvalue()
