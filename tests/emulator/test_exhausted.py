"""Threads that cannot be started: one line, exit status 2, and nothing left running."""

from __future__ import annotations

import threading

import pytest

from emulator.cli.main import main
from tests.support import wait_until

COMMANDS = {
    "run": "run --duration 300ms",
    "compare": "compare partitioned --policy linux-7.3 --duration 300ms",
    "litmus": "litmus return-zap --policy linux-7.3 --jobs 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("nth", [1, 2, 4])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_thread_that_cannot_be_started(
    command: str, nth: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(threading.enumerate())
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def scarce(thread: threading.Thread) -> None:
        # The thread that watches over the others' work comes first.
        if thread.name != "job" and len(started) + 1 >= nth:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    status = main(COMMANDS[command].split())
    monkeypatch.undo()
    _, errors = capsys.readouterr()
    complaint = errors.splitlines()[-1]
    assert status == 2, errors
    assert complaint.startswith("flushlab: this machine: no thread can be started; expected more memory")
    assert "Traceback" not in errors
    wait_until(lambda: set(threading.enumerate()) <= before, "the end of all threads")
