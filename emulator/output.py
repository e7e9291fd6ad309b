"""Writes results: to standard output, and to files that are whole or absent.

A file is written beside its place and renamed, so that a reader finds the old one or the new one, also after
a run that was killed.  A path that names anything but a regular file (a device, a directory, a FIFO) is
refused, because renaming would replace it.

A write to standard output that fails raises `LostOutput`, a type that rich and typer do not handle
themselves; the command line turns it into at most one line and an exit status.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TextIO, cast

from emulator import interrupts
from emulator.errors import BadInput

_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}
# Prefix of a result's name while it is being written.
PARTIAL: Final = ".flushlab-"


class Unwritable(BadInput):
    """A result that could not be written to its file: one line, and exit status 2 unless there is a
    verdict."""


class LostOutput(Exception):
    """A write to standard output failed.  `status` is the exit status of the verdict that was being
    printed."""

    def __init__(self, error: OSError, status: int = 0) -> None:
        super().__init__(f"standard output: {error.strerror or error}")
        # The reader closed the pipe because it had read enough, which is no failure.
        self.unwanted = error.errno == errno.EPIPE
        self.status = status


# --- files ----------------------------------------------------------------------------------------------


def write_file(where: str, path: Path, data: str | bytes) -> None:
    """Put a file into its place in one step; raise Unwritable if that fails.

    `where` is the option in front of the path, or an empty string.
    """
    place = _place(where, path)
    try:
        # Hold signals: one must leave neither half a file nor a temporary file beside it.
        with interrupts.held():
            _replace(place, data.encode() if isinstance(data, str) else data)
    except OSError as error:
        raise _unwritable(where, path, error) from error


def write_new_file(where: str, path: Path, data: str) -> None:
    """Put a file into its place as write_file() does; raise Unwritable if there is anything already."""
    try:
        with interrupts.held():
            _link(path, data.encode())
    except FileExistsError as error:
        raise Unwritable(f"{where} {path}".strip(), "it exists already", "a name of no file") from error
    except OSError as error:
        raise _unwritable(where, path, error) from error


class Appending:
    """A file to which one process at a time adds lines.

    Each line is one write at the end of the file.  So a process that is killed leaves at most one line
    without its end, the last, and `mend` drops it.
    """

    def __init__(self, where: str, path: Path) -> None:
        self._where, self._path = where, path
        self._descriptor = -1

    def open(self) -> None:
        """Open or make the file; raise Unwritable if that fails, or if another process has it open."""
        place = _place(self._where, self._path)
        with interrupts.held():
            try:
                self._descriptor = os.open(place, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.close()
                found = "another process is writing it"
                raise Unwritable(f"{self._where} {self._path}".strip(), found, "a file of its own") from error
            except OSError as error:
                self.close()
                raise _unwritable(self._where, self._path, error) from error

    def mend(self, begins: str) -> None:
        """Drop a last line without its end if it begins with `begins`; if it does not, raise Unwritable."""
        text = self._path.read_bytes()
        whole = text.rfind(b"\n") + 1
        size = min(len(begins), len(text) - whole)
        if text[whole:][:size] != begins.encode()[:size]:
            found = "its last line has no end, and flushlab has not written it"
            raise Unwritable(f"{self._where} {self._path}".strip(), found, "a new file, or one of flushlab's")
        os.ftruncate(self._descriptor, whole)

    def line(self, text: str) -> None:
        """Add a line; raise Unwritable if that fails, in which case the file ends as before."""
        data = text.encode() + b"\n"
        with interrupts.held():
            before = os.fstat(self._descriptor).st_size
            try:
                if os.write(self._descriptor, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                os.ftruncate(self._descriptor, before)
                raise _unwritable(self._where, self._path, error) from error

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class LogFile:
    """A log of whole lines that may be rotated while this process writes it.

    The name is looked up for each line.  If its file was renamed or removed, the line begins a new file of
    that name, so logrotate(8) needs no signal.  Lines are appended: after `copytruncate` they go on from the
    start.
    """

    def __init__(self, where: str, path: Path) -> None:
        """Open or make the file; raise Unwritable if that fails."""
        _place(where, path)
        self._path = path.absolute()  # not resolved: the link of a rotated log may be changed
        try:
            self._descriptor = self._open()
        except OSError as error:
            raise _unwritable(where, path, error) from error

    def write(self, text: str) -> None:
        """Add whole lines; raise OSError if that fails, or ValueError after `close`."""
        if self._descriptor < 0:
            raise ValueError("the log is closed")
        if not self._is_current():
            # If there can be no new file, such as in a directory that has gone, the old one is kept.
            with contextlib.suppress(OSError):
                new = self._open()
                os.close(self._descriptor)
                self._descriptor = new
        data = text.encode(errors="backslashreplace")
        while data:
            data = data[os.write(self._descriptor, data) :]

    def flush(self) -> None:
        """Do nothing: lines are not buffered."""

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def _open(self) -> int:
        return os.open(
            self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666
        )

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._descriptor))
        except OSError:
            return False


def check_file(where: str, path: Path) -> None:
    """Raise Unwritable if `write_file` would fail.  Called before hours of work, not after."""
    place = _place(where, path)
    try:
        with interrupts.held():
            _try(place.parent)
    except OSError as error:
        raise _unwritable(where, path, error) from error


def make_directory(where: str, path: Path) -> None:
    """Make a directory for results; raise Unwritable if that fails, or if no file can be made in it."""
    try:
        with interrupts.held():
            path.mkdir(parents=True, exist_ok=True)
            _try(path)
    except OSError as error:
        found = error.strerror or str(error)
        raise Unwritable(f"{where} {path}".strip(), found, "a directory that can be written") from error


def _place(where: str, path: Path) -> Path:
    """Return the path behind symbolic links, which are kept; refuse a path that is no regular file."""
    try:
        place = path.resolve()
        mode = place.stat().st_mode
    except FileNotFoundError:
        return place
    except (OSError, RuntimeError, ValueError) as error:
        raise _unwritable(where, path, error) from error
    if not stat.S_ISREG(mode):
        found = f"it is {_KINDS.get(stat.S_IFMT(mode), 'no regular file')}"
        raise Unwritable(f"{where} {path}".strip(), found, "a regular file or a new one")
    if not os.access(place, os.W_OK):
        raise _unwritable(where, path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return place


def _unwritable(where: str, path: Path, error: Exception) -> Unwritable:
    found = getattr(error, "strerror", None) or str(error)
    return Unwritable(f"{where} {path}".strip(), found, "a file that can be written")


def _replace(place: Path, data: bytes) -> None:
    partial = _beside(place.parent)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(descriptor, stat.S_IMODE(place.stat().st_mode))
            file.write(data)
        partial.replace(place)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _link(place: Path, data: bytes) -> None:
    """Write a file and give it its name, which unlike renaming replaces nothing."""
    partial = _beside(place.parent)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        place.hardlink_to(partial)
    finally:
        partial.unlink()


def _try(directory: Path) -> None:
    partial = _beside(directory)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    partial.unlink()


def _beside(directory: Path) -> Path:
    """Return a unique temporary path.  It is not derived from the file's name, which might become too
    long."""
    return directory / f"{PARTIAL}{os.getpid()}-{secrets.token_hex(4)}"


# --- standard output ------------------------------------------------------------------------------------


class _Closed(io.TextIOBase):
    """Stands for a stream that was closed when the command began."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "it is closed")


class _Watched:
    """Standard output with failures that raise LostOutput.

    All other attributes are the stream's: rich and typer query the terminal, the encoding and more.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise self._lost(error) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise self._lost(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lost(self, error: OSError) -> LostOutput:
        self._discard()
        return LostOutput(error)

    def _discard(self) -> None:
        """Redirect the stream to /dev/null, so that its buffer does not fail again when the interpreter
        ends."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class _Patient:
    """Standard error with failures that are ignored: no message there is worth ending a run for."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def watched() -> Iterator[None]:
    """Watch standard output and standard error while the block lasts."""
    before = sys.stdout, sys.stderr
    out, err = (_buffered(stream) if stream else cast(TextIO, _Closed()) for stream in before)
    sys.stdout, sys.stderr = cast(TextIO, _Watched(out)), cast(TextIO, _Patient(err))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _buffered(stream: TextIO) -> TextIO:
    """Return the stream with a buffer below it.

    PYTHONUNBUFFERED leaves it out.  The text layer expects the layer below it to write everything, which only
    a buffer does, so a write that a signal interrupts would lose its rest.
    """
    if not isinstance(getattr(stream, "buffer", None), io.RawIOBase):
        return stream
    file = os.fdopen(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=True)


@contextmanager
def saying(status: int) -> Iterator[None]:
    """Print a verdict in this block.  The exit status is `status` even if standard output fails."""
    try:
        yield
        sys.stdout.flush()
    except LostOutput as lost:
        lost.status = status
        raise
