"""Violations are there as soon as they are found, whatever becomes of the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from loguru import logger

from emulator import __version__
from emulator.cli.main import main
from emulator.report.findings import Findings
from emulator.report.result import Report
from tests.emulator.canned import snapshot, violated
from tests.support import wait_until

COMMAND = [sys.executable, "-m", "emulator"]
SERVICE = "serve --metrics 0 --set migration=none --seed 3 --log-format json"
HEAD = {"scenario": "main", "policy": "mine", "seed": 7}


def report(kind: str, events: bool = True) -> Report:
    return Report(kind, (kind,), f"{kind}: long\n  details", {"events": [{"kind": "ipi"}] if events else []})


@pytest.fixture
def lines() -> list[str]:
    kept: list[str] = []
    logger.remove()
    logger.add(lambda message: kept.append(str(message)), format="{message} {extra}")
    return kept


def test_the_first_of_each_kind_is_told_in_full(lines: list[str], tmp_path: Path) -> None:
    findings = Findings(tmp_path, HEAD)
    assert findings.wanted("use-after-free", False)
    for number, kind in enumerate(("use-after-free", "use-after-free", "guest-stale"), start=1):
        findings.found(number, report(kind))
    assert ["details" in line for line in lines] == [True, False, True]
    assert all("violation-000" in line for line in lines)
    assert not findings.wanted("use-after-free", False)
    assert findings.wanted("use-after-free", True), "one that can be drawn"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"violation-000{n}.json" for n in (1, 2, 3)]


@pytest.mark.slow
def test_the_rest_is_counted_at_each_doubling(lines: list[str]) -> None:
    findings = Findings(None, HEAD)
    for n in range(1, 10_001):
        findings.count(snapshot(violations={"use-after-free": n}))
    assert len(lines) == 13
    assert "8192" in lines[-1]


def test_a_file_says_which_run_it_is_from_and_how_to_draw_it(tmp_path: Path) -> None:
    directory = tmp_path / "a b"
    directory.mkdir()
    findings = Findings(directory, HEAD)
    findings.found(1, report("guest-stale"))
    findings.found(2, report("deadlock", events=False))
    first, second = (json.loads((directory / f"violation-000{n}.json").read_text()) for n in (1, 2))
    assert {key: first[key] for key in HEAD} == HEAD
    assert first["version"] == __version__
    assert first["explain"] == f"flushlab explain '{directory}/violation-0001.json'"
    assert "explain" not in second, "nothing to draw"


def test_what_could_not_be_written_is_said_once_and_tried_again(lines: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "out"
    findings = Findings(directory, HEAD)
    findings.found(1, report("guest-stale"))
    findings.found(2, report("guest-stale"))
    assert sum("not written" in line for line in lines) == 1
    assert findings.finish(violated()) is not None
    directory.mkdir()
    assert findings.finish(violated()) is None
    assert sorted(path.name for path in directory.iterdir()) == ["result.json", "violation-0001.json"]


@pytest.mark.stress
def test_a_service_that_is_killed_leaves_its_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*COMMAND, *f"{SERVICE} --report-dir {out}".split()],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={name: value for name, value in os.environ.items() if not name.startswith("FLUSHLAB_")},
        )
    try:
        wait_until(lambda: len(list(out.glob("violation-*.json"))) > 2, "violations", 90)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    for path in out.glob("violation-*.json"):
        whole = json.loads(path.read_text())
        assert (whole["scenario"], whole["policy"], whole["seed"]) == ("main", "linux-7.3+migration=none", 3)
    written = [json.loads(line) for line in log.read_text().splitlines()[:-1]]
    violations = [line for line in written if line["message"] == "violation"]
    assert "filled by" in violations[0]["text"]
    assert len({line["kind"] for line in violations if "text" in line}) == sum(
        "text" in v for v in violations
    )
    drawn = next(path for path in sorted(out.glob("*.json")) if "explain" in json.loads(path.read_text()))
    capsys.readouterr()
    assert main(["explain", str(drawn)]) == 0
    title = " ".join(capsys.readouterr().out.split("\n\n")[0].split())
    assert "under linux-7.3+migration=none (main)" in title
