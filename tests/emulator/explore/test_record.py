"""Counterexamples: what is written down, and the same execution again from nothing but the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emulator.cli import main
from emulator.explore.record import replay
from emulator.explore.verdict import Plan, explore_verdict
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy
from native import VIOLATION_KINDS

TWICE = """
doc = "Two entries are stale at the end, each in its way."
source = "here"
init = ["v0: read 0x10", "v0: write 0x11", "k: log-arm"]
final = ["v0: read 0x10", "v0: write 0x11"]
[threads.v0]
vcpu = 0
ops = ["read 0x12"]
[threads.k]
ops = ["log-get", "host-unmap 0x10"]
"""
POLICY = "notifier_flush=none,write_protect=none"


def found_twice(tmp_path: Path) -> Path:
    path = tmp_path / "twice.toml"
    path.write_text(TWICE)
    assert main(["explore", str(path), "--policy", POLICY, "--jobs", "1", "--output", str(tmp_path)]) == 1
    path.unlink()
    (found,) = tmp_path.glob("*.json")
    return found


def test_a_use_in_final_is_told_with_its_story(tmp_path: Path) -> None:
    violation = json.loads(found_twice(tmp_path).read_text())["violation"]
    assert violation["kinds"] == ["use-after-free", "stale-after-revoke"]
    assert set(violation["kinds"]) <= set(VIOLATION_KINDS)
    assert violation["entry"]["page"] == 0x10
    assert violation["events"]


def test_two_uses_in_final_are_two_kinds(tmp_path: Path) -> None:
    path = tmp_path / "twice.toml"
    text, uses = TWICE.replace("\nfinal", "\n#"), 'final = ["v0: write 0x11", "v0: read 0x10"]\n'
    path.write_text(text.replace("[threads.v0]", uses + "[threads.v0]"))
    found = explore_verdict(load_test(str(path)), named_policy(POLICY), Plan(minimize=False))
    assert found.kinds == ("stale-after-revoke", "use-after-free")
    assert found.counterexample is not None
    assert found.counterexample.violation is not None
    assert found.counterexample.violation["kinds"] == ["stale-after-revoke"]


def test_what_final_did_is_drawn_after_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = found_twice(tmp_path)
    (entry,) = json.loads(path.read_text())["final"]
    assert entry["kind"] == "entry"
    capsys.readouterr()
    assert main(["explain", str(path)]) == 0
    rows = capsys.readouterr().out.split("\n\n")[1]
    assert rows.index("zap gfn 0x10") < rows.index("v0 reads gfn 0x10")
    assert rows.index("vcpu_enter_guest(v0)") < rows.index("zap gfn 0x10")


def test_a_test_of_ones_own_replays_without_its_file(tmp_path: Path) -> None:
    path = found_twice(tmp_path)
    assert replay(path).document() == json.loads(path.read_text())
