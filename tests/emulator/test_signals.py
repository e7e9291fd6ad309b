"""Signals at random moments cost nothing that was said, and leave nothing behind.

    FLUSHLAB_SIGNALS=50 FLUSHLAB_SIGNALS_SEED=7 .venv/bin/pytest -s tests/emulator/test_signals.py

sends so many to each command (without it, a few) and prints a table.  A signal comes to the process or to its
group, alone or with others close behind, at any moment from its start to its end, or while it writes its
results to a reader that does not read yet.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from emulator.interrupts import ENDING, SIGNALLED
from emulator.output import PARTIAL
from tests.support import wait_until

TRIALS = int(os.environ.get("FLUSHLAB_SIGNALS", "2"))
SEED = int(os.environ.get("FLUSHLAB_SIGNALS_SEED") or secrets.randbits(16))
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("FLUSHLAB_")}

# {} is a directory of the trial's own.
COMMANDS = {
    "run": "run --duration 1s --set migration=none --json --report-dir {}",
    "serve": "serve --metrics 0 --set migration=none --report-dir {}",
    "compare": "compare --duration 0.5s --policy linux-7.3 --policy root-tlb-gen --json --html {}/page.html",
    "litmus, 1 process": "litmus return-zap kick-cross --jobs 1 --iterations 50 --json",
    "litmus, 2 processes": "litmus return-zap kick-cross --jobs 2 --iterations 50 --json",
    "explore, 1 process": "explore return-zap kick-cross --jobs 1 --executions 100 --json --output {} "
    "--policy lkml-2025-cpu-flushed-mask --policy migration=none",
    "explore, 2 processes": "explore return-zap kick-cross --jobs 2 --executions 100 --json --output {} "
    "--policy lkml-2025-cpu-flushed-mask --policy migration=none",
    "explore, a trace": "explore remote-two-vcpus --trace --number 300 --json --output {}",
    "one search, 2 processes": "explore remote-two-vcpus --jobs 2 --executions 400 --json",
}
# A service has no end of its own: so long after it has booted.
SERVED_SECONDS = 2.0
END_SECONDS = 60.0


@dataclass
class Trial:
    """One process and its end."""

    command: str
    process: subprocess.Popen[bytes]
    directory: Path
    sent: list[str] = field(default_factory=list)
    taken: bool = False  # the process had taken the signals over when the first one was sent

    def send(self, random: Random) -> None:
        """One signal, or a burst."""
        self.taken = bool(_caught(self.process.pid) >> (signal.SIGALRM - 1) & 1)
        for _ in range(random.choice((1, 1, 2, 5))):
            number = random.choice(ENDING)
            with suppress(ProcessLookupError):
                if random.random() < 0.5:
                    os.killpg(self.process.pid, number)
                else:
                    os.kill(self.process.pid, number)
                self.sent.append(number.name)
            time.sleep(random.choice((0.0, 0.0005, 0.01)))

    def check(self, out: bytes, errors: str, trial_text: str) -> str:
        """Return the end of the process in a word."""
        status = self.process.returncode
        trial_text = f"{trial_text}: {self.sent}, taken over: {self.taken}, status {status}\n{errors[-3000:]}"
        if not self.taken and status < 0 and not out:
            return "ended at once"
        early = status - SIGNALLED in ENDING
        assert early or status in (0, 1), trial_text
        assert "Traceback" not in errors, trial_text
        assert out or early, trial_text
        if out and "serve" not in self.command:
            assert out.endswith(b"}\n"), trial_text
            json.loads(out)
        elif out:
            assert b"VIOLATIONS" in out or b"inconclusive" in out or b"clean" in out, trial_text
        self._check_files(bool(out), trial_text)
        return "results" if out else "nothing said"

    def _check_files(self, said: bool, trial_text: str) -> None:
        names = sorted(path.name for path in self.directory.iterdir())
        assert not [name for name in names if name.startswith(PARTIAL)], trial_text
        for name in names:
            if name.endswith(".json"):
                json.loads((self.directory / name).read_text())
        if "--report-dir" in self.command and said:
            reports = json.loads((self.directory / "result.json").read_text())["reports"]
            assert len(names) == 1 + len(reports), trial_text
        if "--html" in self.command and said:
            assert (self.directory / "page.html").read_text().rstrip().endswith("</html>"), trial_text


def _with_hangups() -> None:
    """These tests may run under nohup, their processes may not."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _caught(pid: int) -> int:
    """The signals that a process has handlers for, a bit each."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return int(line.split()[1], 16)
    return 0


def _group(leader: int) -> list[str]:
    """The processes of a group, but those that have ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state != "Z":
                found.append(stat.parent.name)
    return found


@contextmanager
def started(command: str, directory: Path, unbuffered: bool = False) -> Iterator[Trial]:
    arguments = [sys.executable, "-m", "emulator", *command.format(directory).split()]
    with (directory.parent / f"{directory.name}.errors").open("wb") as errors:
        process = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1" if unbuffered else ""},
            start_new_session=True,
            preexec_fn=_with_hangups,
        )
    try:
        yield Trial(command, process, directory)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _finished(trial: Trial, trial_text: str) -> bytes:
    try:
        out, _ = trial.process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        trial.process.send_signal(signal.SIGUSR1)
        time.sleep(1)
        pytest.fail(f"{trial_text}: {trial.sent}: still running\n{_errors(trial)}")
    wait_until(lambda: not _group(trial.process.pid), f"the end of all processes ({trial_text})", 30)
    return out


def _errors(trial: Trial) -> str:
    return (trial.directory.parent / f"{trial.directory.name}.errors").read_text()


def _length(command: str, directory: Path) -> float:
    """Seconds that a command takes when it is left alone."""
    directory.mkdir()
    begun = time.monotonic()
    with started(command, directory) as trial:
        if "serve" in command:
            wait_until(lambda: "booted" in _errors(trial), "boot", 60)
            return time.monotonic() - begun + SERVED_SECONDS
        _finished(trial, "undisturbed")
        assert trial.process.returncode in (0, 1), _errors(trial)
    return time.monotonic() - begun


@pytest.mark.stress
@pytest.mark.timeout(120 + TRIALS * 70)
@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_lost_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    command = COMMANDS[name]
    random = Random(f"{SEED} {name}")
    length = _length(command, tmp_path / "undisturbed")
    ends: Counter[str] = Counter()
    for number in range(TRIALS):
        directory = tmp_path / str(number)
        directory.mkdir()
        while_written = random.random() < 0.4
        moment = random.random() * length * (0.9 if while_written else 1.1)
        trial_text = f"{name}, trial {number}, FLUSHLAB_SIGNALS_SEED={SEED}, after {moment:.3f} s"
        with started(command, directory, unbuffered=random.random() < 0.3) as trial:
            if while_written:
                trial_text += " and while results are written"
                if "serve" in command or random.random() < 0.5:
                    time.sleep(moment)
                    trial.send(random)
                assert trial.process.stdout is not None
                select.select([trial.process.stdout], [], [], END_SECONDS)
            else:
                time.sleep(moment)
            trial.send(random)
            out = _finished(trial, trial_text)
            ends[trial.check(out, _errors(trial), trial_text)] += 1
    summary = ", ".join(f"{how} {n}" for how, n in sorted(ends.items()))
    print(f"\n{name:<24} {length:5.1f} s, {TRIALS} trials, seed {SEED}: {summary}")


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_slow_reader_gets_everything(unbuffered: bool, tmp_path: Path) -> None:
    """The document is larger than a pipe, so that the signals come in the middle of a write."""
    with started(COMMANDS["explore, 1 process"], tmp_path, unbuffered) as trial:
        assert trial.process.stdout is not None
        select.select([trial.process.stdout], [], [], END_SECONDS)
        for number in ENDING:
            trial.process.send_signal(number)
            time.sleep(0.1)
        out = _finished(trial, "a slow reader")
    assert len(out) > 1 << 16, "more than a pipe takes at once"
    assert json.loads(out)["explored"]
    assert trial.process.returncode == 1
