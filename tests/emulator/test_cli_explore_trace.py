"""`flushlab explore --trace` and `--replay --stop-at` as commands: options, words, files, exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.guide import page
from emulator.litmus.loader import shipped_texts
from emulator.litmus.policies import named_policy
from tests.emulator.small_race import RACE
from tests.support import processor_seconds, wait_until

RETRIED = f"""{RACE}[expect]
needs = "retries"
"""


def shown(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert main(["explore", *words]) == status
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 80 or "--json" in words
    return out


def written(tmp_path: Path, text: str = RETRIED) -> str:
    path = tmp_path / "race.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.slow
def test_the_first_execution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, written(tmp_path), "--trace")
    assert out.startswith(
        "execution 1 of the search\nrace under linux-7.3: no violation in this execution of "
    )
    assert "ended: all operations are done\n" in out
    assert "precondition (retries): not met here; --reach needs" in out
    steps = shown(capsys, written(tmp_path), "--trace", "--steps")
    assert "(memslots 0)" in steps
    assert "(memslots 0)" not in out


def test_the_execution_that_reaches_the_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, written(tmp_path), "--trace", "--reach", "needs")
    head = out.partition("\n")[0]
    assert head.startswith("execution ")
    assert head.endswith(" of the search, the first that reaches the precondition (retries)")
    assert "the fault is retried [2]" in out
    assert "[2] retries: " in out
    assert "precondition (retries): met at step " in out
    number = head.split()[1]
    assert int(number) > 1
    assert (
        shown(capsys, written(tmp_path), "--trace", "--number", number).partition("\n")[2]
        == (out.partition("\n")[2])
    )


@pytest.mark.slow
def test_what_is_not_reached_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [written(tmp_path), "--trace", "--reach", "slot-retries", "--executions", "50"]
    out = " ".join(shown(capsys, *options, status=1).split())
    assert out.startswith("race under linux-7.3: no execution reaches slot-retries with up to ")
    assert out.endswith(" interleavings altogether (not all, --executions were done)")
    found = json.loads(shown(capsys, *options, "--json", status=1))
    assert (found["reached"], found["goal"]) == (False, "slot-retries")
    options[0] = written(tmp_path, RETRIED.replace("wait mm 1", "wait mm 2"))
    out = " ".join(shown(capsys, *options, status=1).split())
    assert out.endswith(
        "no execution reaches slot-retries in the only interleaving, up to the order of independent steps"
    )


def test_a_violation_before_the_goal_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = RETRIED.replace('"read 0x10"]', '"read 0x10", "write 0x12"]').replace("wait mm 1", "wait mm 2")
    options = [written(tmp_path, text), "--trace", "--policy", "notifier_flush=none"]
    out = " ".join(shown(capsys, *options, "--reach", "v0: write 0x12", status=1).split())
    assert "the search ended with a violation, in execution 1: --trace --number 1 shows it" in out
    out = shown(capsys, *options, "--number", "1", status=1)
    assert "ended: at the first violation" in out
    assert "use-after-free" in out.partition("\n")[2].partition("\n")[0]
    assert "elided: flush for remote-notifier" in out or "read by vCPU 0" in out
    assert main(["explore", *options, "--number", "2"]) == 2
    said = "--number: found 2; expected 1 to 1, as many executions as this search has, the last one violates"
    assert capsys.readouterr().err == f"flushlab: {said}\n"


def test_a_deadlock_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
        doc = "d"
        source = "s"
        [threads.a]
        ops = ["notifier-start 0x10", "wait b 1", "notifier-end 0x10"]
        [threads.b]
        ops = ["slot-delete"]
    """
    out = " ".join(shown(capsys, written(tmp_path, text), "--trace", status=1).split())
    waits = "a waits for operation 1 of b; b in kvm_swap_active_memslots() waits for"
    assert out.count("waits for operation 1 of b") == 1
    assert f"ended: blocked for ever: {waits} mn_active_invalidate_count" in out


def test_one_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    two = ["--policy", "linux-7.3", "--policy", "linux-5.14"]
    for words, line in (
        (["return-zap", "--trace", *two], "--trace: found 2 policies; expected one policy at a time"),
        (["return-zap", "kick-cross", "--trace"], "--trace: found 2 tests; expected one test at a time"),
        (["--trace"], f"--trace: found {len(shipped_texts())} tests; expected one test at a time"),
    ):
        assert main(["explore", *words]) == 2
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"flushlab: {line}\n")


@pytest.mark.parametrize("policy", ["mutant:P15", "root-tlb-gen", "linux-5.14+zap=flush-per-table"])
def test_any_policy_is_traced(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", "return-zap", "--trace", "--policy", policy]) in (0, 1)
    out = " ".join(capsys.readouterr().out.split())
    assert f"return-zap under {named_policy(policy).spelled()}: " in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["return-zap", "--number", "2"], "--number: found without --trace; expected both"),
        (["return-zap", "--reach", "needs"], "--reach: found without --trace; expected both"),
        (["return-zap", "--steps"], "--steps: found without --trace; expected both"),
        (["return-zap", "--stop-at", "3"], "--stop-at: found without --replay; expected both"),
        (["return-zap", "--trace", "--stop-at", "3"], "--stop-at: found without --replay; expected both"),
        (["return-zap", "--trace", "--audit"], "--trace: found with --audit"),
        (["return-zap", "--trace", "--jobs", "2"], "--jobs: found with --trace"),
        (["return-zap", "--trace", "--number", "2", "--reach", "needs"], "--number: found with --reach"),
        (["return-zap", "--trace", "--number", "3000"], "--number: found 3000; expected 1 to 2000"),
        (["return-zap", "--trace", "--number", "0"], "--number"),
        (["return-zap", "--trace", "--reach", "nedds"], "--reach: 'nedds'; expected one of needs"),
        (["return-zap", "--trace", "--policy", "linux-0"], "policy"),
        (["--replay", "x.json", "--trace", "--number", "2"], "--number: found with --replay"),
        (["--replay", "x.json", "--trace", "--stop-at", "2"], "--trace: found with --stop-at"),
    ],
)
def test_bad_input_is_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert line in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_trace_is_kept_replayed_drawn_and_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test, kept = written(tmp_path), tmp_path / "kept"
    drawn = shown(capsys, test, "--trace", "--reach", "needs", "--output", str(kept))
    (path,) = kept.iterdir()
    assert path.name == "race-linux-7.3-needs.json"
    document = json.loads(path.read_text())
    assert (document["verdict"], document["violation"]) == ("safe", None)
    assert shown(capsys, "--replay", str(path)).endswith("the same as recorded; no violation\n")
    again = shown(capsys, "--replay", str(path), "--trace").partition("\n")[2]
    assert again == drawn.partition("\n")[2]
    assert json.loads(shown(capsys, "--replay", str(path), "--json")) == document
    assert main(["explain", str(path)]) == 0
    assert capsys.readouterr().out == again
    stop = document["steps"][-1]["n"]
    out = shown(capsys, "--replay", str(path), "--stop-at", str(stop))
    assert f"before step {stop} of {stop + 1}: " in out
    assert main(["explore", "--replay", str(path), "--stop-at", str(stop + 1)]) == 2
    assert f"expected 0 to {stop}, the steps of" in capsys.readouterr().err


def test_a_counterexample_is_traced_and_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["return-zap", "--policy", "migration=none", "--jobs", "1", "--output", str(tmp_path)]
    assert main(["explore", *words]) == 1
    (path,) = tmp_path.iterdir()
    capsys.readouterr()
    out = shown(capsys, "--replay", str(path), "--trace", status=1)
    assert "the same as recorded" in out
    assert "ELIDED" in out
    assert "ended: at the first violation" in out
    state = json.loads(shown(capsys, "--replay", str(path), "--stop-at", "5", "--json"))
    assert (state["step"], len(state["tasks"])) == (5, 2)


def long_test(tmp_path: Path) -> str:
    """Return a test whose window lies between many reads."""
    before, after = (
        ", ".join(f'"read {page:#x}"' for page in range(first, first + 60)) for first in (0x20, 0x80)
    )
    ops = f'ops = ["read 0x10", {before}, "wait mm 2", "read 0x10", {after}]'
    text = RETRIED.replace('ops = ["read 0x10", "read 0x10", "wait mm 1", "read 0x10"]', ops)
    return written(tmp_path, text.replace("wait v0 2", "wait v0 61").replace('"retries"', '"averted"'))


@pytest.mark.slow
def test_a_long_trace_is_cut_with_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = long_test(tmp_path)
    cut, whole = (shown(capsys, test, "--trace", *more) for more in ([], ["--steps"]))
    assert "left out" not in whole
    steps = len(json.loads(shown(capsys, test, "--trace", "--json"))["steps"])
    assert len(whole.splitlines()) > steps > 1000
    gaps = [line.split() for line in cut.splitlines() if "left out; --steps shows all" in line]
    assert len(gaps) == 2
    assert all(int(gap[1].replace(",", "")) > 50 for gap in gaps)
    assert len(cut.splitlines()) < 400
    # The beginning, the end, and the danger in the middle.
    assert "v0: read 0x20\n" in cut
    assert "v0: read 0xbb\n" in cut
    middle = cut.partition("left out")[2].rpartition("left out")[0]
    assert "TLB miss, EPT violation [2]" in middle
    assert "[2] averted: " in cut


def test_the_guide_shows_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = page("litmus")
    monkeypatch.chdir(tmp_path)
    for name in ("come-back.toml", "too-early.toml"):
        Path(name).write_text(guide.partition(f"```toml {name}\n")[2].partition("```")[0])
    shown_there = guide.partition("--trace\n```\n")[2].partition("```text\n")[2].partition("```")[0]
    out = shown(capsys, "come-back.toml", "--trace")
    pieces = shown_there.split("...\n")
    assert len(pieces) == 4
    assert all(piece in out for piece in pieces)
    early = shown(capsys, "too-early.toml", "--trace")
    assert early.index("v0: migrate 0") < early.index("invalidate_range_start()")
    assert "not met here" in early
    assert out.index("v0: migrate 0") > out.index("invalidate_range_start()")


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_signal_in_the_search_ends_it(tmp_path: Path) -> None:
    command = ["explore", "fault-races-two", "--trace", "--reach", "root-gone", "--executions", "10000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "emulator", *command, "--output", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # By processor time, because a busy machine may take long to come to the search.
    wait_until(lambda: processor_seconds(Path(f"/proc/{process.pid}")) > 4, "the search", 40.0)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 130
    assert out == ""
    assert err == "flushlab: interrupted by SIGINT: 1 of 1 tests and policies not reached\n"
    assert not list(tmp_path.iterdir())
