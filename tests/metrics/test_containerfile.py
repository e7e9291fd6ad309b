"""The image of the service."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "metrics/service/Containerfile"


def test_a_linter_has_no_complaint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, FILE], capture_output=True, text=True, timeout=60)
    assert found.stdout + found.stderr == ""
    assert found.returncode == 0


def test_it_copies_all_that_the_build_reads() -> None:
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.+) /\S+$", FILE.read_text(), re.M)
        for name in line.split()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {
        pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]
    }
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    # `flushlab` lies in a folder of the emulator.
    assert copied == needed | packages - {"flushlab"}
    assert all((ROOT / name).exists() for name in copied)
