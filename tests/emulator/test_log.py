"""Logging: formats, levels, the standard library's loggers, and that no thread waits for a reader."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time

import pytest
from loguru import logger

from emulator.log import Logging


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    with Logging():
        logger.info("machine booted", pcpus=4)
        logger.bind(vm=1).warning("stalled {x}")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("INFO     machine booted pcpus=4")
    assert second.endswith("WARNING  stalled {x} vm=1")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    with Logging(log_format="json"):
        logger.bind(pcpus=4).info('a "quoted"\nline {x}')
        try:
            raise ValueError("no")
        except ValueError:
            logger.exception("failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first["message"] == 'a "quoted"\nline {x}'
    assert (first["level"], first["pcpus"], first["thread"]) == ("INFO", 4, "MainThread")
    assert second["exception"] == "ValueError: no"


def test_level(capsys: pytest.CaptureFixture[str]) -> None:
    with Logging("WARNING"):
        logger.info("unseen")
        logger.warning("seen")
    err = capsys.readouterr().err
    assert "unseen" not in err
    assert "seen" in err


def test_standard_loggers_are_routed_and_restored(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    with Logging("DEBUG", "json"):
        logging.getLogger("pykka").debug("Starting %s", "PCpu")
        logging.getLogger("pykka").error("died", exc_info=ValueError("no"))
    assert (root.handlers, root.level) == before
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["message"], first["logger"], first["level"]) == ("Starting PCpu", "pykka", "DEBUG")
    assert second["exception"] == "ValueError: no"


def test_pykka_is_quiet_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    with Logging():
        logging.getLogger("pykka").debug("Registered")
    assert capsys.readouterr().err == ""


def test_lines_of_many_threads_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    def work(number: int) -> None:
        for i in range(200):
            logger.info("line", thread_number=number, i=i)

    with Logging(log_format="json"):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == 1600


@pytest.mark.slow
def test_nobody_waits_for_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error is a pipe that no reader empties: logging goes on, and ends in time."""
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stderr", stream)
    started = time.monotonic()
    with Logging():
        for _ in range(2000):
            logger.info("x" * 100)
        logged = time.monotonic() - started
    assert logged < 5
    assert time.monotonic() - started < logged + 4
    os.close(reader)


def test_a_stream_that_fails_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Logging():
        monkeypatch.setattr(sys, "stderr", Broken())
        logger.info("nobody reads this")
        monkeypatch.undo()
        logger.info("but this")
    assert "but this" in capsys.readouterr().err
