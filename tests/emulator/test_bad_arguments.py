"""Arguments that no option takes, and bytes that are no text: one line, whatever they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emulator.cli.main import main

HALF = os.fsdecode(b"\xff\xfe")
LONG = "a" * 70_000
# With {} for the wrong value.
COMMANDS = (
    "{}",
    "run {}",
    "run ./{}.toml",
    "run --{}",
    "run --metrics {}:1",
    "run --duration {}",
    "run --set migration={}",
    "run --policy {}",
    "run --policy mutant:{}",
    "serve --geometry {}",
    "litmus {}",
    "litmus ./{}.toml",
    "litmus --policy {}+migration=none",
    "explore return-zap --adversary {}",
    "explore --replay {}",
    "drift {}",
    "drift . --since {}",
    "drift . --function {}",
    "explain {}",
    "explain --format {} x",
    "trace info {}",
    "trace info {}.fltrace",
    "trace convert {} out.fltrace",
    "compare --policy {}",
    "list {}",
)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [HALF, LONG], ids=["bytes", "long"])
@pytest.mark.parametrize("command", COMMANDS)
def test_one_line(
    command: str,
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    status = main([word.format(wrong) for word in command.split()])
    out, errors = capsys.readouterr()
    assert (status, out, errors.count("\n")) == (2, "", 1), errors
    assert len(errors) < 3500
    assert "\\udcff" in errors or "aaa...aaa" in errors


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["x!", HALF, LONG, "9" * 5000], ids=["word", "bytes", "long", "digits"])
@pytest.mark.parametrize(
    "name", ["PCPUS", "SEED", "DURATION", "CHAOS", "GEOMETRY", "LOG_LEVEL", "METRICS", "SET"]
)
def test_the_environment_is_checked_as_options_are(
    name: str, wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"FLUSHLAB_{name}", wrong)
    status = main(["run"])
    out, errors = capsys.readouterr()
    assert (status, out, errors.count("\n")) == (2, "", 1), errors
    assert len(errors) < 3500
    assert f"--{name.lower().replace('_', '-')}" in errors


@pytest.mark.slow
def test_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    (tmp_path / f"{HALF}.toml").write_text("[[vm]]\nmemory = 8\n[scheduler]\nmode = 'pin'\n")
    done = subprocess.run(
        [sys.executable, "-m", "emulator", "run", f"./{HALF}.toml", "--duration", "500ms"],
        capture_output=True,
        check=False,
        timeout=90,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert b"\\udcff\\udcfe.toml under linux-7.3" in done.stdout
