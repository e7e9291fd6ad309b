"""Processes that work for a command never outlive it, and never keep it from ending."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support import processor_seconds, wait_until, without_progress

pytestmark = pytest.mark.slow

COMMANDS = {
    "one search": ["explore", "remote-two-vcpus", "--executions", "1000000"],
    "several searches": ["explore", "remote-two-vcpus", "bounce-two-vcpus", "--executions", "1000000"],
    "proofs": ["litmus", "remote-two-vcpus", "bounce-two-vcpus", "--explore", "--iterations", "1000000"],
    "threads": ["litmus", "remote-two-vcpus", "bounce-two-vcpus", "--iterations", "1000000"],
}
UNLIMITED = {"one search", "several searches"}

# As `python -m emulator`, but the processes of one search begin with its second part: the parts that it
# searches before take seconds, in which there is one process.
AT_ONCE = """
import runpy
from emulator.explore.results import workers
workers.FIRST_PARTS = 1
runpy.run_module("emulator", run_name="__main__", alter_sys=True)
"""

# Interrupted as soon as so many processes have started, before the parent has noted them.
INTERRUPTED = """
import os, signal, sys
from multiprocessing import popen_spawn_posix

launch, launched = popen_spawn_posix.Popen._launch, []

def launch_and_interrupt(self, process):
    launch(self, process)
    launched.append(process)
    if len(launched) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGINT)

popen_spawn_posix.Popen._launch = launch_and_interrupt
from emulator.cli.main import main
from emulator.explore.results import workers
workers.FIRST_PARTS = 1
sys.exit(main(sys.argv[2:]))
"""


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """In a process group of its own, as a shell would."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # These tests may run under nohup, their processes may not.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def children(process: subprocess.Popen[str]) -> list[Path]:
    return [
        Path("/proc", pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def workers(process: subprocess.Popen[str]) -> list[Path]:
    """Two at work, beside the process that looks after their semaphores."""
    found: list[Path] = []

    def at_work() -> bool:
        found[:] = [child for child in children(process) if b"spawn_main" in (child / "cmdline").read_bytes()]
        return len(found) == 2 and all(processor_seconds(worker) > 0.3 for worker in found)

    wait_until(at_work, "two workers", 60)
    return found


def interrupted(process: subprocess.Popen[str], out: str, errors: str, number: signal.Signals) -> None:
    """Check that one line tells how much is missing or cut short, and the exit status which signal came.

    The verdicts that were reached tell what they cover.
    """
    line = (
        rf"flushlab: interrupted by {number.name}: "
        r"(\d+) of (\d+) tests and policies not reached(?:, (\d+) cut short)?\n"
    )
    said = re.fullmatch(line, without_progress(errors))
    assert said is not None, errors
    assert process.returncode == 128 + number
    missing, planned, cut = (int(n or 0) for n in said.groups())
    assert missing or cut
    assert missing + cut <= planned
    if missing < planned:
        assert "interleavings" in out or "executions" in out
    if cut and "(not all, " in out:
        assert out.count("interrupted") == cut


def gone(processes: list[Path]) -> None:
    wait_until(lambda: not any(process.exists() for process in processes), "the end of all processes", 60)


@pytest.mark.parametrize(
    ("command", "number"),
    [
        *((command, number) for command in COMMANDS for number in (signal.SIGINT, signal.SIGTERM)),
        # It comes as SIGINT does: to the processes of a search, and to those of storms.
        ("one search", signal.SIGHUP),
        ("threads", signal.SIGHUP),
    ],
)
def test_a_signal_ends_all_of_them_and_verdicts_so_far_are_said(command: str, number: signal.Signals) -> None:
    limits = ["--seconds", "0"] if command in UNLIMITED else []
    with started("-c", AT_ONCE, *COMMANDS[command], *limits, "--jobs", "2") as process:
        all_of_them = workers(process)
        if number == signal.SIGTERM:
            process.send_signal(number)
        else:
            os.killpg(process.pid, number)  # as a terminal does
        out, errors = process.communicate(timeout=100)
        interrupted(process, out, errors, number)
        gone(all_of_them)


def test_a_sigterm_for_the_whole_group_is_the_parents_business() -> None:
    with started("-c", AT_ONCE, *COMMANDS["several searches"], "--jobs", "2") as process:
        all_of_them = workers(process)
        os.killpg(process.pid, signal.SIGTERM)
        out, errors = process.communicate(timeout=100)
        interrupted(process, out, errors, signal.SIGTERM)
        gone(all_of_them)


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("command", COMMANDS)
def test_interrupts_wait_until_all_have_started(command: str, after: int) -> None:
    with started("-c", INTERRUPTED, str(after), *COMMANDS[command], "--jobs", "2") as process:
        out, errors = process.communicate(timeout=100)
        interrupted(process, out, errors, signal.SIGINT)


@pytest.mark.parametrize("command", COMMANDS)
def test_they_end_with_a_parent_that_was_killed(command: str) -> None:
    with started("-c", AT_ONCE, *COMMANDS[command], "--jobs", "2") as process:
        all_of_them = workers(process)
        process.kill()
        gone(all_of_them)


@pytest.mark.parametrize("command", COMMANDS)
def test_one_that_dies_is_missed(command: str) -> None:
    with started("-c", AT_ONCE, *COMMANDS[command], "--jobs", "2") as process:
        one, other = workers(process)
        os.kill(int(one.name), signal.SIGKILL)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 3
        assert without_progress(errors) == (
            "flushlab: a process of --jobs was killed or crashed; this takes less memory with fewer --jobs\n"
        )
        gone([other])
