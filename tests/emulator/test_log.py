"""Logging: formats, levels, the standard library's loggers, and that no thread waits for a reader."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from loguru import logger

from emulator.log import Logging
from emulator.output import LogFile, Unwritable


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
    # Each line would have to wait for a thirtieth of a second: no busy machine, but a wait, takes so long.
    assert logged < 60
    assert time.monotonic() - started < logged + 60
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


# --- rotation ------------------------------------------------------------------------------------------


def logged(path: Path, rotate: Callable[[Path], object]) -> None:
    """Log two lines, rotate the file when they have come, and log two more."""
    with closing(LogFile("--log-file", path)) as file, Logging(to=file):
        for numbers in ((1, 2), (3, 4)):
            for number in numbers:
                logger.info(f"line {number}")
            limit = time.monotonic() + 20
            while not (path.exists() and f"line {numbers[-1]}" in path.read_text()):
                assert time.monotonic() < limit, "the line has not come"
                time.sleep(0.001)
            if numbers == (1, 2):
                rotate(path)


def messages(path: Path) -> list[str]:
    return [line.split("INFO")[1].strip() for line in path.read_text().splitlines()]


def test_a_log_that_was_renamed_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, old = tmp_path / "log", tmp_path / "log.1"
    log.write_text("before INFO line 0\n")
    logged(log, lambda path: path.rename(old))
    assert messages(old) == ["line 0", "line 1", "line 2"]
    assert messages(log) == ["line 3", "line 4"]
    assert capsys.readouterr().err == ""


def test_a_log_that_was_copied_and_truncated_goes_on_from_the_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    logged(log, lambda path: os.truncate(path, 0))
    assert log.read_bytes().count(b"\0") == 0
    assert messages(log) == ["line 3", "line 4"]


def test_a_log_behind_a_link_follows_it(tmp_path: Path) -> None:
    log = tmp_path / "current"
    log.symlink_to("first")

    def switch(link: Path) -> None:
        link.unlink()
        link.symlink_to("second")

    logged(log, switch)
    assert messages(tmp_path / "first") == ["line 1", "line 2"]
    assert messages(tmp_path / "second") == ["line 3", "line 4"]


def test_a_log_of_a_directory_that_has_gone_keeps_its_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with closing(LogFile("--log-file", tmp_path / "a" / "log")) as file:
        file.write("line 1\n")
        (tmp_path / "a").rename(tmp_path / "b")
        file.write("line 2\n")
    assert (tmp_path / "b" / "log").read_text() == "line 1\nline 2\n"


def test_a_log_is_rotated_any_number_of_times_without_more_descriptors(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with closing(LogFile("--log-file", log)) as file:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for number in range(100):
            file.write(f"{number}\n")
            log.rename(tmp_path / f"log.{number}")
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert [(tmp_path / f"log.{number}").read_text() for number in range(100)] == [
        f"{n}\n" for n in range(100)
    ]


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null", "/tmp"])
def test_a_log_that_cannot_be(place: str) -> None:
    with pytest.raises(Unwritable, match=f"--log-file {place}: .*expected"):
        LogFile("--log-file", Path(place))


def test_nothing_is_written_to_a_closed_log(tmp_path: Path) -> None:
    file = LogFile("--log-file", tmp_path / "log")
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.write("late\n")
    assert (tmp_path / "log").read_text() == ""
