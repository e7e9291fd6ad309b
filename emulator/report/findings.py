"""Violations of a run, kept at the moment they are found: in the log, and as files of --report-dir.

A service may run for weeks and end by SIGKILL, so its findings must not wait for its end.  The first
violation of each kind is logged in full.  The core keeps the events of a few violations of each kind; these
are logged with a line and written as well.  All others are counted, and the log gives their number at each
doubling.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loguru import logger

from emulator import __version__
from emulator.output import Unwritable, write_file
from emulator.report.result import Report, Result, Snapshot
from emulator.report.summary import document, report_document

_OPTION = "--report-dir"


class Findings:
    """The violations of one run.  `head` describes the run and begins each file."""

    def __init__(self, directory: Path | None, head: Mapping[str, Any]) -> None:
        self._directory = directory
        self._head = {"version": __version__, **head}
        self._kinds: set[str] = set()
        self._counted = 0
        self._written: set[int] = set()
        # The reason why files are missing.  It is logged once, and reported again at the end.
        self.lost: Unwritable | None = None

    def wanted(self, kind: str, has_events: bool) -> bool:
        """Return whether a violation is worth a report before the run has ended."""
        return has_events or kind not in self._kinds

    def found(self, number: int, report: Report) -> None:
        """Keep a violation, the `number`-th of the run from 1 on."""
        path = self._keep(number, report)
        log = logger.bind(kind=report.kind, number=number, **({"report": str(path)} if path else {}))
        if report.kind not in self._kinds:
            log = log.bind(text=report.text)
        self._kinds.add(report.kind)
        log.error("violation")

    def count(self, snapshot: Snapshot) -> None:
        """Log the number of violations at each doubling."""
        if snapshot.violated >= max(2 * self._counted, 2):
            self._counted = snapshot.violated
            logger.error("violations so far", **snapshot.violations)

    def finish(self, result: Result) -> Unwritable | None:
        """Write the files that are not yet in the directory; return the error if that fails, else None."""
        if self._directory is None:
            return None
        # Try again to write files that failed before: the disk may have room again.
        self.lost = None
        whole = self._write(self._directory / "result.json", document(result))
        for number, report in enumerate(result.reports, start=1):
            if whole and number not in self._written:
                whole = self._keep(number, report) is not None
        return self.lost

    def _keep(self, number: int, report: Report) -> Path | None:
        if self._directory is None:
            return None
        path = self._directory / f"violation-{number:04}.json"
        head = dict(self._head)
        if report.details.get("events"):
            head["explain"] = f"flushlab explain {shlex.quote(str(path))}"
        if not self._write(path, head | report_document(report)):
            return None
        self._written.add(number)
        return path

    def _write(self, path: Path, content: Mapping[str, Any]) -> bool:
        try:
            write_file(_OPTION, path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        except Unwritable as error:
            if self.lost is None:
                logger.error("report not written", error=str(error))
            self.lost = self.lost or error
            return False
        return True
