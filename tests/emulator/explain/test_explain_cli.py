"""`flushlab explain`: the files that it reads, and its errors for other files."""

from __future__ import annotations

import io
import json
import re
import threading
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emulator.cli.main import main
from emulator.explain.document import load_cases
from emulator.job.job import Job
from emulator.policy import resolve_policy
from emulator.report.summary import document
from emulator.scenario.config import load_scenario
from tests.damaged import damage
from tests.emulator.explain.race import NAMES, Race, flushed_mask


def counterexample(race: Race) -> dict[str, Any]:
    """As explore writes it: no times anywhere."""
    report = race.report()
    for name in ("time_ns", "promise_time_ns", "events", "actors"):
        del report[name]
    steps = [
        {
            "n": n,
            "thread": NAMES[str(event.cpu)],
            "cpu": event.cpu,
            "kind": "spte",
            "events": [event.as_dict()],
        }
        for n, event in enumerate(race.events)
    ]
    return {
        "format": 1,
        "test": "migrate-after-zap",
        "policy": "lkml-2025-cpu-flushed-mask",
        "seed": 0,
        "schedule": [step["thread"] for step in steps],
        "steps": steps,
        "violation": report,
    }


def written(directory: Path, value: Any) -> str:
    path = directory / "violation.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["explain", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("form", ["run", "report", "litmus"])
def test_reports_wherever_they_are(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    race = flushed_mask()
    value: Any = {
        "run": race.document("p"),
        "report": race.report(),
        "litmus": {"results": [{"test": "t", "policy": "p", "reports": [race.report()]}]},
    }[form]
    out = printed(capsys, written(tmp_path, value))
    where = {"run": " under p (main)", "report": "", "litmus": " under p (t)"}[form]
    assert out.startswith(f"use-after-free{where}, VM 0\n")
    assert "ELIDED [3]" in out


def test_a_counterexample_has_no_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, counterexample(flushed_mask()))
    out = printed(capsys, path, "--times")
    title, columns = out.split("\n\n")[0].replace("\n", " "), out.split("\n\n")[1]
    assert title == "use-after-free under lkml-2025-cpu-flushed-mask (migrate-after-zap), VM 0"
    assert columns.startswith("CPU0  ")
    assert "CPU1" in out
    assert "host0" in out
    assert "us later" not in out
    assert "[3] the flush that was elided" in out


def test_what_happened_before_the_first_step_is_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    race = flushed_mask()
    value = counterexample(race)
    value["violation"]["events"] = [event.as_dict() for event in race.events]
    whole = printed(capsys, written(tmp_path, value))
    # The first moves were made by init, which is no step.
    value["steps"] = value["steps"][5:]
    assert printed(capsys, written(tmp_path, value)) == whole


def test_a_counterexample_without_events_shows_its_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = counterexample(flushed_mask())
    value["violation"] = {"kind": "deadlock", "text": "pcpu0 waits for host0, host0 for pcpu0"}
    for step in value["steps"]:
        del step["events"]
        step["text"] = f"step {step['n']}"
    out = printed(capsys, written(tmp_path, value))
    assert "deadlock under" in out
    assert f"step {len(value['steps']) - 1}" in out


def test_the_one_that_shows_most_comes_first_and_any_can_be_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poor, rich = Race().enter(0, 100), flushed_mask()
    path = written(tmp_path, {"reports": [poor.report(), rich.report(pcpu=0)]})
    assert main(["explain", path]) == 0
    out, err = capsys.readouterr()
    assert "ELIDED" in out
    assert err == f"{path}: 2 violations with events; --report N chooses\n"
    assert "ELIDED" not in printed(capsys, path, "--report", "1")


@pytest.mark.parametrize("form", ["text", "svg", "json", "perfetto"])
def test_output_goes_to_a_file(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, flushed_mask().document())
    whole = printed(capsys, path, "--format", form)
    assert printed(capsys, path, "--format", form, "-o", str(tmp_path / "out")) == ""
    assert (tmp_path / "out").read_text() == whole
    assert whole.endswith("\n")


def test_several_files_are_drawn_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, flushed_mask().document())
    once = printed(capsys, path)
    assert printed(capsys, path, path) == f"{once}\n{once}"


def damaged_entry(**entry: Any) -> dict[str, Any]:
    return flushed_mask().document(entry=entry)


CLEAN = {"flushlab": 1, "verdict": "clean", "reports": []}
AUDITED = {"flushlab": 1, "reports": [{"kind": "inconsistent", "kinds": ["inconsistent"], "text": "x"}]}
DAMAGED = {"kind": "use-after-free", "events": [{"kind": "zap", "cpu": "x", "time_ns": 1}]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["not JSON"]),
        ("", ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
        ("3", ["no violation with events"]),
        (json.dumps(CLEAN), ["no violation with events"]),
        (json.dumps(AUDITED), ["inconsistent, which an audit found", "a litmus test that ends so"]),
        (json.dumps(DAMAGED), ["a damaged report", "events[0].cpu: found 'x'; expected a whole number"]),
        (json.dumps({"kind": "x", "events": [3]}), ["a damaged report"]),
        (json.dumps({"kind": "x", "events": [{"kind": "zap"}]}), ["a damaged report", "time_ns"]),
        (json.dumps({"steps": [3], "violation": {}}), ["a damaged report"]),
        (json.dumps(damaged_entry(filled_by_vcpu=0, page="0x10")), ["entry.page: found '0x10'"]),
        (json.dumps({"kind": "x", "events": [{"kind": "zap", "time_ns": float("inf")}]}), ["time_ns"]),
        (json.dumps({"kind": "x", "events": [{"kind": "zap", "time_ns": 1 << 70}]}), ["time_ns"]),
        ("9" * 5000, ["too many digits"]),
        ("[" * 980 + "]" * 980, ["expected JSON"]),
        ("\udcff", ["not UTF-8"]),
    ],
)
def test_bad_files_are_one_line(
    content: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert main(["explain", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"flushlab: {path}: ")
    assert all(word in err for word in words), err


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "svg", "json", "perfetto"])
@pytest.mark.parametrize("explored", [False, True])
@settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_damage_ends_in_a_traceback(
    data: st.DataObject, explored: bool, form: str, tmp_path: Path
) -> None:
    whole = counterexample(flushed_mask()) if explored else flushed_mask().document()
    path = written(tmp_path, damage(whole, data))
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        status = main(["explain", path, "--times", "--format", form])
    assert status in (0, 2)
    assert said.getvalue().count("\n") == (status == 2), said.getvalue()


def test_half_a_character_is_no_reason_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "under ? (main)" in printed(capsys, written(tmp_path, flushed_mask().document("\ud800")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.json"], ["nowhere.json: No such file"]),
        (["{path}", "{path}", "--format", "svg"], ["--format svg", "2 files", "one"]),
        (["{path}", "--report", "2"], ["--report", "1 to 1"]),
        (["{path}", "--report", "0"], ["--report", "0"]),
        (["{path}", "--format", "pdf"], ["--format", "pdf", "svg"]),
        (["{path}", "--width", "3"], ["--width", "3"]),
        (["{path}", "-o", "/proc/nowhere/x"], ["--output /proc/nowhere/x"]),
        ([], ["FILE"]),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, flushed_mask().document())
    assert main(["explain", *(argument.format(path=path) for argument in arguments)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


# --- a real run --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_flushed_mask_is_caught_told_and_drawn(tmp_path: Path) -> None:
    """In six seconds, with both pCPUs, the zap, and the elided flush by name."""
    scenario = load_scenario("migration-storm")
    policy = resolve_policy("lkml-2025-cpu-flushed-mask")
    result = Job(scenario, policy, seed=1, duration=6.0).run(lambda snapshot: None, threading.Event())
    assert result.verdict == "violations"
    reports = [
        r
        for r in result.reports
        if r.kind in ("use-after-free", "stale-after-revoke") and r.details["events"]
    ]
    assert reports
    text = max((report.text for report in reports), key=lambda text: text.count("pcpu"))
    assert "zap gfn" in text
    assert "elided: flush for migration on pcpu" in text
    assert "migration=cpu-flushed-mask" in text
    pcpus = {word for word in text.replace(",", " ").split() if word.startswith("pcpu")}
    assert len(pcpus) >= 2
    path = written(tmp_path, document(result))
    cases = [case for case in load_cases(Path(path)) if case.facts.kind == "use-after-free"]
    best = max(cases, key=lambda case: case.quality())
    assert best.analysis.culprit is not None
    assert best.analysis.culprit.cpu == best.facts.pcpu
    assert best.analysis.moment("revoke") is not None
    assert any(name.startswith("host") for name in (best.label(cpu) for cpu in best.columns))


@pytest.mark.slow
def test_a_litmus_test_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["litmus", "bounce-zap", "--policy", "lkml-2025-cpu-flushed-mask", "--json"]
    main([*arguments, "--iterations", "100", "--jobs", "1", "--seed", "1"])
    path = written(tmp_path, capsys.readouterr().out)
    (case,) = [case for case in load_cases(Path(path)) if case.facts.kind == "use-after-free"]
    assert (case.where, case.policy) == ("bounce-zap", "lkml-2025-cpu-flushed-mask")
    out = printed(capsys, path)
    assert max(map(len, out.splitlines())) <= 72
    columns = out.split("\n\n")[1].split("\n")[0].split()
    assert columns[-1] == "mm"
    assert "ELIDED [3]" in out
    assert "(migration=cpu-flushed-mask)" in out


FOUND = """\
use-after-free, stale-after-revoke under lkml-2025-cpu-flushed-mask
(return-zap), VM 0

CPU0                    CPU1                    mm
----                    ----                    --
vcpu_enter_guest(v0)
v0 uses gfn 0x10
  TLB entry is filled [1]
                        vmx_vcpu_load_vmcs(v0)
                                                zap gfn 0x10 [2]
                                                KVM_REQ_TLB_FLUSH to v0
                                                kick: IPI to CPU1
                        INVEPT global
                                                invalidate_range_start()
                                                  returns
                                                frame 0x10a is freed
vmx_vcpu_load_vmcs(v0)
flush for migration
  ELIDED [3]
vcpu_enter_guest(v0)
v0 reads gfn 0x10
  by the stale entry [4]

[1] the entry that goes stale: 4K guest-physical, page 0x10 to frame
    0x10a, EP4TA 0x1
[2] the translation goes; v0 is on CPU1
[3] the flush that was elided (migration=cpu-flushed-mask)
[4] the access that uses the stale entry: use-after-free,
    stale-after-revoke
"""


def test_what_explore_finds_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The hole of the flushed mask, found by the scheduler: the same picture every time."""
    arguments = ["explore", "return-zap", "--policy", "lkml-2025-cpu-flushed-mask"]
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    capsys.readouterr()
    (path,) = tmp_path.glob("*.json")
    out = printed(capsys, str(path))
    assert max(map(len, out.splitlines())) <= 72
    # Whichever frame it is.
    assert re.sub(r"0x10[0-9a-f]\b", "0x10a", out) == FOUND
    trace = json.loads(printed(capsys, str(path), "--format", "perfetto"))["traceEvents"]
    assert {event["ph"] for event in trace} >= {"M", "X", "i", "s", "f"}
