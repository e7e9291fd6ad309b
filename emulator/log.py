"""Logging: loguru on standard error or in a file, as text or JSON lines.

The standard library's loggers are routed in.

Logged are events that concern an operator (boot, stop, violations, stalls, deaths), never an access or a
flush. A thread that logs puts the formatted line into a queue, and one thread writes the lines.  So a stuck
terminal or a full pipe never stops an actor.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self

from loguru import logger

if TYPE_CHECKING:
    from loguru import Message, Record

LogFormat = Literal["text", "json"]
LEVELS = ("TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL")

_LAST_WORDS_SECONDS = 1.0
_TEXT = "{time:HH:mm:ss.SSS} {level: <8} {message}{extra[_fields]}"


class Stream(Protocol):
    """Takes formatted lines.  Both methods may raise OSError or ValueError; the lines are lost then."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...


class Logging:
    """Logs while the context lasts.  At its end, the lines in the queue are written.

    Without `to`, lines go to standard error.
    """

    def __init__(
        self, level: str = "INFO", log_format: LogFormat = "text", *, to: Stream | None = None
    ) -> None:
        self._level = level
        self._format = log_format
        self._to = to
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="log", daemon=True)
        self._abandoned = False
        self._previous: tuple[list[logging.Handler], int] = ([], logging.WARNING)

    def __enter__(self) -> Self:
        self._writer.start()
        logger.remove()
        logger.add(
            self._put,
            level=self._level,
            format=_TEXT if self._format == "text" else _as_json,
            colorize=False,
            backtrace=False,
            diagnose=False,
            catch=True,
        )
        logger.configure(extra={"_fields": ""}, patcher=_describe_fields)
        root = logging.getLogger()
        self._previous = (root.handlers[:], root.level)
        root.handlers = [_Intercept()]
        # pykka logs each actor's birth at DEBUG; loguru drops records below its threshold.
        root.setLevel(logging.DEBUG if self._level in ("TRACE", "DEBUG") else logging.INFO)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        root = logging.getLogger()
        root.handlers, level = self._previous
        root.setLevel(level)
        logger.remove()
        self._lines.put(None)
        # A reader that does not read must not keep the program from ending.
        self._writer.join(timeout=_LAST_WORDS_SECONDS)
        self._abandoned = True

    def _put(self, message: Message) -> None:
        self._lines.put(str(message))

    def _write(self) -> None:
        while (line := self._lines.get()) is not None and not self._abandoned:
            # Look up the stream for each line: a live display replaces it while it is shown.
            stream = self._to or sys.stderr
            try:
                stream.write(line)
                stream.flush()
            except (OSError, ValueError):
                # The reader is gone; keep emptying the queue.
                continue


class _Intercept(logging.Handler):
    """Hands records of the standard library's loggers to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        level: str | int = record.levelname if record.levelname in LEVELS else record.levelno
        logger.opt(exception=record.exc_info).bind(logger=record.name).log(level, record.getMessage())


def _describe_fields(record: Record) -> None:
    fields = {key: value for key, value in record["extra"].items() if key != "_fields"}
    short = [f" {key}={value}" for key, value in fields.items() if "\n" not in str(value)]
    # A text of several lines stands by itself below.
    long = [f"\n{value}" for value in fields.values() if "\n" in str(value)]
    record["extra"]["_fields"] = "".join(short + long)


def _as_json(record: Record) -> str:
    """Return a record as a line with one JSON object, in which bound fields stand beside the standard
    ones."""
    line: dict[str, object] = {
        "time": record["time"].isoformat(timespec="milliseconds"),
        "level": record["level"].name,
        "message": record["message"],
        "thread": record["thread"].name,
    }
    line |= {key: value for key, value in record["extra"].items() if not key.startswith("_")}
    exception = record["exception"]
    if exception is not None:
        line["exception"] = f"{getattr(exception.type, '__name__', exception.type)}: {exception.value}"
    record["extra"]["_json"] = json.dumps(line, default=str)
    return "{extra[_json]}\n"
