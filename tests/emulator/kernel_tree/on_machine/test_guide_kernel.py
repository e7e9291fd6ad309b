"""The commands of the guide's page about kernel patches, executed in a copy of a real tree."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from emulator.guide import page
from emulator.kernel_tree.build import MMU
from tests.emulator.kernel_tree.bugs import copied
from tests.emulator.kernel_tree.trees import found_trees

pytestmark = [pytest.mark.stress, pytest.mark.timeout(600)]

# In place of all tests and of five minutes.
SHORTER = (
    ("litmus --kernel", "litmus stale-until-flush --iterations 4 --kernel"),
    ("--duration 5m", "--duration 2s"),
    ("compare --kernel", "compare --duration 2s --kernel"),
    ("--run", "--run --operations 300"),
    ("--audit", "--audit --executions 2"),
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(found_trees(tmp_path_factory)[0], tmp_path_factory.mktemp("guide") / "linux")


def commands() -> list[str]:
    """Return the lines of the page that begin with the program's name, or with it behind a prompt."""
    return re.findall(r"^    (?:\$ )?(flushlab .*?) *(?:#.*)?$", page("kernel"), re.MULTILINE)


def executed(command: str, top: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "emulator", *shlex.split(command)[1:]],
        cwd=top,
        env={
            "XDG_CACHE_HOME": str(cache),
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(Path(__file__).parents[4]),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_commands_do_what_the_page_says(copy: Path, tmp_path: Path) -> None:
    found = commands()
    assert len(found) == 8
    for command in found:
        if "litmus remote-two-vcpus" in command:
            continue
        for long, short in SHORTER:
            command = command.replace(long, short)
        ended = executed(command, copy, tmp_path)
        assert ended.returncode == 0, (command, ended.stdout[-500:], ended.stderr[-1000:])


def test_the_first_bug_is_reported_as_the_page_shows(copy: Path, tmp_path: Path) -> None:
    (command,) = (one for one in commands() if "litmus remote-two-vcpus" in one)
    removed = re.findall(r"^    -( .*)$", page("kernel"), re.MULTILINE)
    file = copy / MMU / "tdp_mmu.c"
    whole = file.read_text()
    lines = [line.split() for line in removed]
    text, at = whole.splitlines(keepends=True), -1
    for number in range(len(text)):
        if [line.split() for line in text[number : number + len(lines)]] == lines:
            at = number
    assert at >= 0, "the page's lines are in no place of the tree"
    try:
        file.write_text("".join(text[:at] + text[at + len(lines) :]))
        ended = executed(command, copy, tmp_path)
    finally:
        file.write_text(whole)
    assert ended.returncode == 1, ended.stderr[-1000:]
    (outcome,) = json.loads(ended.stdout)["outcomes"]
    assert outcome["verdict"] == "violations"
    for function in ("tdp_mmu_zap_leafs()", "kvm_tdp_mmu_unmap_gfn_range()"):
        assert function in ended.stdout
        assert function in page("kernel")
