"""Handlers only note; commands decide on a signal where that costs nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from emulator import interrupts
from tests.support import wait_until

HERE = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(HERE)}


@pytest.fixture(autouse=True)
def with_hangups() -> Iterator[None]:
    """These tests may run under nohup, and their processes inherit what is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", interrupts.ENDING)
def test_a_signal_raises_once_and_is_noted(number: signal.Signals) -> None:
    with interrupts.installed():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        for other in interrupts.ENDING:
            signal.raise_signal(other)  # cleaning up is not disturbed
        assert interrupts.came() is number
    assert interrupts.came() is None
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("number", interrupts.ENDING)
def test_one_that_comes_inside_of_exec_does_not_kill_the_process_later(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Dataclasses run strings by exec() while modules are imported."""
    (tmp_path / "interrupted.py").write_text(
        "import sys, emulator.__main__, emulator.cli.main as cli\n"
        f"cli.main = lambda: exec('import signal; signal.raise_signal({number.value})')\n"
        "sys.exit(emulator.__main__.main())\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    ended = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + number, "", "")


def test_from_only_note_on_nothing_is_raised() -> None:
    with interrupts.installed():
        interrupts.only_note()
        for _ in range(100):
            for number in interrupts.ENDING:
                signal.raise_signal(number)
        assert interrupts.came() is signal.SIGINT
        assert signal.getitimer(signal.ITIMER_REAL)[0] > interrupts.GIVE_UP_SECONDS - 5


def test_a_held_signal_waits_for_the_end_of_the_outermost_block() -> None:
    reached = []

    def work() -> None:
        with interrupts.held():
            with interrupts.held():
                signal.raise_signal(signal.SIGTERM)
                reached.append("inner")
            reached.append("outer")
        reached.append("after")

    with interrupts.installed(), pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["inner", "outer"]


def test_one_that_was_swallowed_is_not_forgotten() -> None:
    with interrupts.installed(), interrupts.held():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupts.only_note()


def test_a_handler_names_nothing_that_takes_a_lock() -> None:
    """It may run while the main thread holds any lock, also one that the handler would want."""
    harmless = {"_State", "number", "since", "patience", "noting", "held", "raised", "INSIST_SECONDS"}
    harmless |= {"time", "monotonic", "os", "_exit", "SIGNALLED", "Interrupted"}
    harmless |= {"signal", "setitimer", "ITIMER_REAL"}
    assert set(interrupts._note.__code__.co_names) <= harmless


def test_there_are_no_other_handlers() -> None:
    sources = [path for package in ("emulator", "metrics") for path in (HERE / package).rglob("*.py")]
    handling = {path.name for path in sources if "signal.signal(" in path.read_text()}
    assert handling == {"interrupts.py"}


# The handler is entered again and again while it runs, and while the main thread holds the logger's lock.
BURSTS = """
import os, signal, threading
from loguru import logger
from emulator import interrupts
interrupts.install()
interrupts.only_note()
logger.remove(); logger.add(lambda line: None)
def send():
    for i in range(20000):
        os.kill(os.getpid(), interrupts.ENDING[i % 3])
sender = threading.Thread(target=send)
sender.start()
while sender.is_alive():
    logger.info("x")
print("one of them" if interrupts.came() in interrupts.ENDING else "none")
interrupts.ignore()
"""


@pytest.mark.slow
def test_bursts_lock_nothing_up() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", BURSTS],
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "one of them\n", "")


INSISTING = """
import os, signal, time
from emulator import interrupts
interrupts.INSIST_SECONDS = 0.2
interrupts.install()
interrupts.only_note()
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)
print("still here", flush=True)
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_user_who_insists_later_waits_no_longer() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", INSISTING],
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (130, "still here\n")


def _handled(pid: int, number: int, field: str = "SigCgt") -> bool:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


@pytest.mark.slow
def test_stacks_are_printed_before_anything_is_imported() -> None:
    command = [sys.executable, "-m", "emulator", "list", "policies"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    while not _handled(process.pid, signal.SIGUSR1):
        time.sleep(0.0001)
        assert process.poll() is None, "it ended before it had a handler"
    process.send_signal(signal.SIGUSR1)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "linux-7.3" in out
    assert "most recent call first" in errors


@pytest.mark.slow
def test_hangups_stay_ignored_under_nohup(tmp_path: Path) -> None:
    command = ["nohup", sys.executable, "-m", "emulator", "serve", "--metrics", "0"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        wait_until(lambda: "booted" in (tmp_path / "log").read_text(), "boot", 60)
        assert _handled(process.pid, signal.SIGHUP, "SigIgn")
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert "signal=SIGTERM" in (tmp_path / "log").read_text()
