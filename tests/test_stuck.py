"""A test that is stuck is told with the stacks of all threads, in processes of pytest-xdist as well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUCK = """
import time
import pytest

@pytest.mark.timeout(2)
def test_stuck():
    time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["-n0", "-n1"])
def test_the_stacks_are_printed(tmp_path: Path, processes: str) -> None:
    (tmp_path / "test_it.py").write_text(STUCK)
    options = ["-p", "tests.conftest", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    command = [sys.executable, "-m", "pytest", "-q", processes, *options, str(tmp_path / "test_it.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode
    assert " in test_stuck" in done.stdout + done.stderr, done.stdout + done.stderr
