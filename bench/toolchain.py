"""Compiles the C programs with the system's compiler and runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import ValidationError

from bench.errors import BenchFailed
from bench.figures import Figure
from emulator.errors import BadInput

HERE = Path(__file__).resolve().parent
PROGRAMS = HERE / "native"
CORE = HERE.parent / "native"

# The flags of the extension (native/build.py), without those that the interpreter adds.
FLAGS = ("-std=c11", "-O2", "-DNDEBUG", "-Wall", "-Wextra", "-pthread", f"-I{CORE}", f"-I{PROGRAMS}")
_TIMEOUT_SECONDS = 600


class Toolchain:
    """Compiles programs into `directory` when they are first run, and the core once for all of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._compiler = find_compiler()
        self._core: list[Path] = []

    @property
    def version(self) -> str:
        """Return the first line of the compiler's --version."""
        try:
            shown = subprocess.run(
                [*self._compiler, "--version"], capture_output=True, text=True, check=False
            ).stdout.splitlines()
        except OSError as error:
            raise BadInput("C compiler", str(error), "one that runs") from None
        return shown[0] if shown else " ".join(self._compiler)

    def run(self, program: str, *arguments: str | int | Path) -> list[Figure]:
        """Run a program and return the figures that it prints.  If one of its invariants does not hold, raise
        BenchFailed with its message."""
        path = self._directory / program
        if not path.exists():
            self._link(program)
        command = [str(path), *(str(argument) for argument in arguments)]
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise BenchFailed(f"{program}: not done after {_TIMEOUT_SECONDS} s") from None
        if run.returncode:
            last = (run.stderr.strip().splitlines() or [f"ended with status {run.returncode}"])[-1]
            raise BenchFailed(f"{program}: {last}")
        try:
            return [Figure.model_validate_json(line) for line in run.stdout.splitlines()]
        except ValidationError as error:
            raise BenchFailed(f"{program}: unreadable figure: {error}") from None

    def _link(self, program: str) -> None:
        if not self._core:
            sources = sorted(CORE.glob("*/*.c"))
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                self._core = list(pool.map(self._compile, sources))
        # Rename last, so that a half-written program is never taken for a complete one.
        unfinished = self._directory / f"{program}.unfinished"
        self._call(*FLAGS, PROGRAMS / f"{program}.c", *self._core, "-o", unfinished)
        unfinished.rename(self._directory / program)

    def _compile(self, source: Path) -> Path:
        output = self._directory / f"{source.parent.name}-{source.stem}.o"
        self._call(*FLAGS, "-c", source, "-o", output)
        return output

    def _call(self, *arguments: str | Path) -> None:
        run = subprocess.run(
            [*self._compiler, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise BenchFailed(f"the compiler failed:\n{run.stderr.strip()}")


def find_compiler() -> list[str]:
    """Return the command of $CC, which may have options, or cc."""
    command = os.environ.get("CC", "").split() or ["cc"]
    path = shutil.which(command[0])
    if path is None:
        raise BadInput("C compiler", f"there is no {command[0]!r}", "cc in PATH, or one named by CC")
    return [path, *command[1:]]
