"""Counterexamples: their files, and the same execution again from the file alone."""

from __future__ import annotations

import copy
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emulator.cli.main import main
from emulator.explore.machine.options import ExploreOptions
from emulator.explore.results.replay import replay
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy
from native import VIOLATION_KINDS
from tests.damaged import damage

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


# --- damaged files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    plan = Plan(options=ExploreOptions(speculate=1))
    found = explore_verdict(load_test("speculative-fill"), named_policy("migration=none"), plan)
    assert found.counterexample is not None
    document: dict[str, Any] = json.loads(json.dumps(found.counterexample.document()))
    return document


def replayed(path: Path, text: str) -> tuple[int, str]:
    """Status and standard error of a replay of this text."""
    path.write_text(text)
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        status = main(["explore", "--replay", str(path)])
    return status, said.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("schedule", 5, "schedule: found 5; expected a list"),
        ("source", 1, "source: found 1; expected a text"),
        ("policy", 1, "policy: found 1; expected a text"),
        ("violation", ..., "violation: found nothing"),
        ("format", 2, "format: found 2; expected one of 1"),
        ("source", "[", "not TOML"),
        ("policy", "linux-0.1", "linux-0.1"),
        ("memory", {}, "memory {}"),
        ("adversary", [1], "adversary [1]"),
    ],
)
def test_a_damaged_recording_is_named(
    key: str, value: Any, words: str, recording: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    damaged = {k: v for k, v in {**recording, key: value}.items() if v is not ...}
    status, said = replayed(path, json.dumps(damaged))
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith(f"flushlab: {path}: ")
    assert words in said


def test_a_step_without_a_key_is_named(recording: dict[str, Any], tmp_path: Path) -> None:
    damaged = copy.deepcopy(recording)
    del damaged["steps"][3]["mode"]
    status, said = replayed(tmp_path / "bad.json", json.dumps(damaged))
    assert (status, said.count("\n")) == (2, 1)
    assert "steps[3].mode: found nothing" in said


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 5000, '{"schedule": ' + "[" * 900 + "]" * 900 + "}"])
def test_what_json_cannot_hold(text: str, tmp_path: Path) -> None:
    status, said = replayed(tmp_path / "bad.json", text)
    assert (status, said.count("\n")) == (2, 1)


@pytest.mark.slow
@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_damage_ends_in_a_traceback(
    data: st.DataObject, recording: dict[str, Any], tmp_path: Path
) -> None:
    damaged = damage(recording, data)
    status, said = replayed(tmp_path / "bad.json", json.dumps(damaged))
    assert status in (0, 1, 2, 3)
    assert "Traceback" not in said
    assert said.count("\n") == (status in (2, 3)), said
