"""Calls of a policy's file that do not return end their command: one line, exit status 2, nothing left."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.policy import source
from tests.support import without_progress

pytestmark = pytest.mark.slow

METHOD = """
import threading, time
from emulator.policy import Policy
LOCK = threading.Lock()
LOCK.acquire()
class Mine(Policy):
    def migration(self, cpu, vcpu):
"""
LOOP = "while True: pass"
STUBBORN = """
while True:
    try:
        while True: pass
    except: pass
"""
EXPLORE = ["explore", "return-zap", "--json", "--seconds", "1"]
LITMUS = ["litmus", "return-zap", "--json", "--iterations", "1000"]
RUN = ["run", "migration-storm", "--json", "--log-level", "error"]
SERVE = ["serve", "migration-storm", "--log-level", "error", "--metrics", "0"]
COMPARE = ["compare", "--policy", "linux-7.3", "--duration", "60s"]


def written(directory: Path, body: str, head: str = METHOD) -> Path:
    path = directory / "mine.py"
    path.write_text(head + textwrap.indent(textwrap.dedent(body).strip(), "        " if head else "") + "\n")
    return path


def ended(command: list[str], path: Path) -> str:
    """Run a command line in a process of its own; return its line."""
    line = [sys.executable, "-m", "emulator", *command, "--policy", str(path)]
    found = subprocess.run(line, capture_output=True, text=True, check=False, timeout=110)
    assert (found.returncode, found.stdout) == (2, ""), found
    errors = without_progress(found.stderr)
    assert errors.count("\n") == 1, found.stderr
    return errors


@pytest.mark.parametrize("command", [EXPLORE, LITMUS, RUN, SERVE], ids=lambda command: str(command[0]))
def test_a_loop_is_told_where_it_is(command: list[str], tmp_path: Path) -> None:
    path = written(tmp_path, LOOP)
    line = ended(command, path)
    assert line.startswith(f"flushlab: {path}:8: Mine.migration: ")
    # The machine's own watchdog may find first that this pCPU does not go on.
    assert ("used 2." in line and "s of processor time without returning;" in line) or (
        command in (RUN, SERVE) and "does not return;" in line
    )
    assert "; expected one of all-contexts," in line


@pytest.mark.parametrize("command", [EXPLORE, [*LITMUS, "--jobs", "2"]], ids=["explore", "litmus"])
def test_a_loop_that_catches_everything_ends_with_its_process(command: list[str], tmp_path: Path) -> None:
    path = written(tmp_path, STUBBORN)
    assert f"flushlab: {path}:" in ended(command, path)


@pytest.mark.parametrize(
    ("command", "body"),
    [
        (EXPLORE, "LOCK.acquire()"),
        (["explore", "return-zap", "bounce-zap", "--jobs", "2"], "time.sleep(1000)"),
        (RUN, "LOCK.acquire()"),
    ],
    ids=["explore", "jobs", "run"],
)
def test_a_call_that_sleeps_ends_with_its_process(command: list[str], body: str, tmp_path: Path) -> None:
    path = written(tmp_path, body)
    line = ended(command, path)
    assert line.startswith(f"flushlab: {path}:8: Mine.migration: sleeps and does not return; expected one of")


def test_a_comparison_ends_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, LOOP)
    assert main(["compare", "--policy", str(path), "--policy", "linux-7.3", "--duration", "60s"]) == 2
    assert f"flushlab: {path}:8: Mine.migration: " in capsys.readouterr().err


@pytest.mark.parametrize("body", [LOOP, STUBBORN.replace("except: pass", "finally: raise TypeError")])
def test_a_file_that_does_not_end(
    body: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_LOADING", 0.5)
    path = written(tmp_path, body, "")
    assert main([*EXPLORE, "--policy", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"flushlab: {path}:")


def test_a_busy_policy_is_no_stuck_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Many calls together take longer than one may."""
    body = "for _ in range(300_000): pass\nreturn 'all-contexts'"
    path = written(tmp_path, body)
    before = main([*EXPLORE[:2], "--executions", "100", "--strategy", "random", "--policy", str(path)])
    assert before == 0, capsys.readouterr()
