"""The manual page and the shell's completion are made from the commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from emulator.cli.main import main


@pytest.fixture
def page(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["man"]) == 0
    return capsys.readouterr().out


def test_the_page_has_all_commands_with_their_options(page: str) -> None:
    for title in ("compare", "explore", "list policies", "new litmus", "run", "trace convert"):
        assert f".SS flushlab {title}" in page.replace("\\-", "-"), title
    assert ".TP\n\\fB\\-\\-duration TIME\\fR\n" in page
    assert "0 clean, 1 violations found, 2 bad input, 3 internal failure." in page


def test_no_text_is_taken_for_a_request(page: str) -> None:
    requests = {line.split()[0] for line in page.splitlines() if line.startswith((".", "'"))}
    assert requests == {".TH", ".SH", ".SS", ".TP", ".PP", ".B", ".nf", ".fi"}


def test_groff_has_no_complaint(page: str) -> None:
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("groff is not installed")
    found = subprocess.run(
        [groff, "-man", "-Tutf8", "-ww", "-rCHECKSTYLE=3"],
        input=page,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0
    assert found.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("flushlab explore stale-unt", {"stale-until-flush"}),
        ("flushlab litmus --policy linux-7", {"linux-7.3"}),
        ("flushlab run --policy mutant:shadow-switch-without-s", {"mutant:shadow-switch-without-sync"}),
        ("flushlab compare pgd", {"pgd-churn"}),
        ("flushlab show mutant:shadow-switch-without-s", {"mutant:shadow-switch-without-sync"}),
        ("flushlab guide archi", {"architecture"}),
        ("flushlab li", {"list", "litmus"}),
        ("flushlab run ./my-own", set()),  # so that the shell offers files
    ],
)
def test_a_shell_is_offered_names(line: str, offered: set[str]) -> None:
    asked = {"_FLUSHLAB_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    found = subprocess.run(
        [sys.executable, "-m", "emulator"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.stderr == ""
    assert set(found.stdout.split()) == offered
