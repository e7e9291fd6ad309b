"""Runs the C compiler and reads its diagnostics."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from emulator.errors import BadInput

# The kernel's own options, as far as they decide the code's meaning.
_OPTIONS: Final = (
    "-std=gnu11",
    "-O2",
    "-g",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fno-strict-overflow",
    "-fno-common",
    "-fno-delete-null-pointer-checks",
    # Every caller stays on the stack: reports name the functions on it, after a crash and for a step.
    "-fno-optimize-sibling-calls",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Wno-pointer-sign",
    "-Wno-unused",
    "-Wno-address-of-packed-member",
    "-Wno-missing-braces",
    "-Werror=implicit-function-declaration",
    "-Werror=implicit-int",
    "-Werror=incompatible-pointer-types",
    "-Werror=int-conversion",
)
# The longest compilation takes two seconds on a slow machine.
_SECONDS: Final = 120
_OLDEST: Final = 10


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """An error of the compiler, with the place in the file that it names."""

    message: str
    file: str
    line: int
    error: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {'error' if self.error else 'warning'}: {self.message}"


@dataclass(frozen=True, slots=True)
class Compiler:
    """A gcc, with the first line of its --version, which is part of a build's key."""

    path: str
    version: str

    def compile(self, source: Path, output: Path | None, options: list[str]) -> list[Diagnostic]:
        """Compile to an object file, or only check with no `output`; return gcc's messages."""
        end = ["-c", "-o", str(output)] if output else ["-fsyntax-only"]
        command = [self.path, *_OPTIONS, "-fdiagnostics-format=json", "-fmax-errors=0", *options, *end]
        done = self._run([*command, str(source)])
        try:
            found = json.loads(done.stderr.strip().splitlines()[0]) if done.stderr.strip() else []
        except ValueError:
            raise BadInput(
                self.path, first_line(done.stderr), "gcc's messages as JSON (gcc 10 or later)"
            ) from None
        said = [_diagnostic(one) for one in found if one.get("kind") in ("error", "fatal error", "warning")]
        if done.returncode and not any(one.error for one in said):
            raise BadInput(self.path, f"exit status {done.returncode} without an error", "gcc 10 or later")
        return said

    def link(self, objects: list[Path], output: Path, options: list[str]) -> str:
        """Link a shared object; return the linker's words, empty if it succeeded."""
        done = self._run([self.path, "-shared", "-o", str(output), *map(str, objects), *options])
        return done.stderr if done.returncode else ""

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                env={**os.environ, "LC_ALL": "C"},
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BadInput(self.path, f"no end after {_SECONDS} seconds", "a compiler that ends") from None


def find_compiler() -> Compiler:
    """Return the compiler that $CC names, or gcc."""
    name = os.environ.get("CC") or "gcc"
    path = shutil.which(name)
    if path is None:
        raise BadInput("CC" if os.environ.get("CC") else "PATH", f"no {name}", "gcc 10 or later")
    macros = _said([path, "-dM", "-E", "-x", "c", "/dev/null"])
    major = re.search(r"^#define __GNUC__ (\d+)$", macros, re.MULTILINE)
    version = first_line(_said([path, "--version"]))
    if major is None or int(major[1]) < _OLDEST or "__clang__" in macros:
        raise BadInput(path, version or "no version", "gcc 10 or later, with messages in JSON")
    return Compiler(path, version)


def _said(command: list[str]) -> str:
    """Return the output of a command; empty if it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout


def first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else ""


def _diagnostic(found: dict[str, Any]) -> Diagnostic:
    places = found.get("locations") or [{}]
    caret = places[0].get("caret", {})
    return Diagnostic(
        str(found.get("message", "")),
        str(caret.get("file", "")),
        int(caret.get("line", 0)),
        found.get("kind") != "warning",
    )
