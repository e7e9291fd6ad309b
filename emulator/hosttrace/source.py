"""Opens a trace: text, text under gzip, standard input, or a recording that a tool of the host must print."""

from __future__ import annotations

import gzip
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from emulator.errors import BadInput

_GZIP: Final = b"\x1f\x8b"
# The first bytes of a recording, the tool that prints it, and its arguments in front of the file's name.
_TRACE_CMD: Final = (b"\x17\x08\x44tracing", "trace-cmd", ("report", "-i"))
# perf script tells processes, which tell VMs apart, when it is asked for them.
_PERF: Final = (b"PERFILE2", "perf", ("script", "--ns", "-F", "+pid", "-i"))
_EXPECTED: Final = "text of ftrace, trace-cmd report or perf script, perhaps under gzip"


@contextmanager
def opened(name: str) -> Iterator[IO[str]]:
    """Open a trace as text; raise BadInput if it cannot be read, or if a tool that it needs is missing."""
    if name == "-":
        yield io.TextIOWrapper(sys.stdin.buffer, errors="replace")
        return
    path = Path(name)
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise BadInput(name, error.strerror or str(error), _EXPECTED) from error
    for magic, tool, arguments in (_TRACE_CMD, _PERF):
        if head.startswith(magic):
            with _printed(name, tool, arguments) as text:
                yield text
            return
    with (
        gzip.open(path, "rt", errors="replace")
        if head.startswith(_GZIP)
        else path.open(errors="replace") as text
    ):
        yield text


@contextmanager
def _printed(name: str, tool: str, arguments: tuple[str, ...]) -> Iterator[IO[str]]:
    """Let the tool print the recording; end the tool when the reader has had enough."""
    command = [tool, *arguments, name]
    if shutil.which(tool) is None:
        shown = " ".join(command)
        raise BadInput(name, f"a recording of {tool}, which is not installed here", f"the text of: {shown}")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield process.stdout
            complaint = process.stderr.read()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise BadInput(name, f"{tool} failed: {complaint or process.returncode}", f"a recording of {tool}")
