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

# As the extension is built (native/build.py), without what the interpreter adds.
FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-pthread", f"-I{CORE}", f"-I{PROGRAMS}")
_TIMEOUT_SECONDS = 600


class Toolchain:
    """Programs are compiled into `directory` when they are first run; the core once for all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._compiler = find_compiler()
        self._core: list[Path] = []

    @property
    def version(self) -> str:
        """The compiler's own first line."""
        try:
            shown = subprocess.run(
                [*self._compiler, "--version"], capture_output=True, text=True, check=False
            ).stdout.splitlines()
        except OSError as error:
            raise BadInput("C compiler", str(error), "one that runs") from None
        return shown[0] if shown else " ".join(self._compiler)

    def run(self, program: str, *arguments: str | int | Path) -> list[Figure]:
        """The figures that a program prints; BenchFailed with its own words if an invariant does not hold."""
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
            sources = [source for source in sorted(CORE.glob("*.c")) if not source.name.startswith("_")]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                self._core = list(pool.map(self._compile, sources))
        # The name last: a half-written program is never taken for one.
        unfinished = self._directory / f"{program}.unfinished"
        self._call(*FLAGS, PROGRAMS / f"{program}.c", *self._core, "-o", unfinished)
        unfinished.rename(self._directory / program)

    def _compile(self, source: Path) -> Path:
        output = self._directory / f"{source.stem}.o"
        self._call(*FLAGS, "-c", source, "-o", output)
        return output

    def _call(self, *arguments: str | Path) -> None:
        run = subprocess.run(
            [*self._compiler, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise BenchFailed(f"the compiler failed:\n{run.stderr.strip()}")


def find_compiler() -> list[str]:
    """$CC (which may have options), or cc."""
    command = os.environ.get("CC", "").split() or ["cc"]
    path = shutil.which(command[0])
    if path is None:
        raise BadInput("C compiler", f"there is no {command[0]!r}", "cc in PATH, or one named by CC")
    return [path, *command[1:]]
