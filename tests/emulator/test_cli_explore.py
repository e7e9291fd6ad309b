"""`flushlab explore` as a command: its options, its output, its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.litmus.loader import shipped_texts

HOLE = ["return-zap", "--policy", "lkml-2025-cpu-flushed-mask"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--strategy", "pct", "--bound", "2"], "--bound: found with --strategy pct"),
        (["--strategy", "random", "--depth", "2"], "--depth: found with --strategy random"),
        (["--depth", "2"], "--depth: found with --strategy exhaustive; expected --strategy pct"),
        (["--adversary-budget", "2"], "--adversary-budget: found without --adversary"),
        (["--audit", "--bound", "2"], "--bound: found with --audit"),
        (["--audit", "--output", "here"], "--output: found with --audit"),
        (["--replay", "x.json", "--policy", "linux-7.3"], "--policy: found with --replay"),
        (["--audit", "--state", "here"], "--state: found with --audit"),
        (["--trace", "--state", "here"], "--state: found with --trace"),
        (["--kernel", "here", "--state", "here"], "--state: found with --kernel"),
        (["return-zap", "--replay", "x.json"], "FILES: found with --replay"),
        (["--replay", "x.json", "--audit"], "--audit: found with --replay"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explore", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"flushlab: {line}")
    assert err.count("\n") == 1


def test_seeds_of_the_environment_are_no_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLUSHLAB_SEED", "3")
    assert main(["explore", "--replay", "x.json"]) == 2
    assert "x.json: No such file" in capsys.readouterr().err


def test_where_counterexamples_go_is_known_before_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    # Nothing would be found here.
    assert main(["explore", "return-zap", "--jobs", "1", "--output", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"--output {file}: File exists; expected a directory" in err


def test_names_are_not_cut_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    policies = ["root-tlb-gen+migration_vpid=none", "root-tlb-gen+migration_vpid=none+migration=none"]
    options = [word for policy in policies for word in ("--policy", policy)]
    assert main(["explore", "return-zap", *options, "--jobs", "1"]) == 1
    safe, unsafe = capsys.readouterr().out.splitlines()[:2]
    assert safe.startswith(f"return-zap  {policies[0]}  ")
    assert unsafe.startswith(f"return-zap  {policies[1]}  use-after-free")
    assert "no violation in the only interleaving" in safe
    assert safe.endswith("sequentially consistent")


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_a_terminal_shows_the_whole_verdict(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["explore", *HOLE, "--jobs", "1"]) == 1
    shown = capsys.readouterr().out.partition(" execution in ")[0].rpartition("\n")[0]
    assert max(map(len, shown.splitlines())) <= columns
    verdict = "use-after-free, stale-after-revoke after 1 interleaving, sequentially consistent"
    words = ["return-zap", "lkml-2025-cpu-flushed-mask", *verdict.split()]
    assert shown.split() == words


@pytest.mark.parametrize("name", ["own", "return-zap"])
def test_a_test_of_ones_own_is_replayed_from_the_counterexample_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test, found = tmp_path / f"{name}.toml", tmp_path / "found"
    test.write_text(shipped_texts()["return-zap"].replace("[threads", "# Of one's own.\n[threads", 1))
    assert main(["explore", str(test), *HOLE[1:], "--jobs", "1", "--output", str(found)]) == 1
    (recording,) = found.iterdir()
    test.unlink()
    capsys.readouterr()
    assert main(["explore", "--replay", str(recording), "--json"]) == 1
    again = json.loads(capsys.readouterr().out)
    assert again == json.loads(recording.read_text())
    assert "# Of one's own." in again["source"]
