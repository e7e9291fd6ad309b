"""`flushlab compare`: its runs, its output, and its refusals."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from emulator.cli.compare import load_policies
from emulator.cli.main import main
from emulator.compare import runner
from emulator.compare.runner import Comparer, Comparison, Plan
from emulator.errors import BadInput
from emulator.policy import preset
from emulator.report.result import Result
from emulator.scenario.config import load_scenario
from tests.emulator.canned import snapshot
from tests.emulator.compare.figures import run_of


class Canned:
    """In the place of a job: its run is over at once."""

    made: ClassVar[list[Canned]] = []
    violated: ClassVar[str] = ""
    stop_after: ClassVar[int] = 1000
    failure: ClassVar[str] = ""
    worked: ClassVar[float] = 1e9

    def __init__(self, scenario: Any, policy: Any, **options: Any) -> None:
        self.policy, self.scenario, self.options = policy, scenario, options
        Canned.made.append(self)

    def run(self, progress: Any, stop: threading.Event) -> Result:
        progress(snapshot())
        if len(Canned.made) > Canned.stop_after:
            stop.set()
        violations = {"use-after-free": 1} if self.policy.name == Canned.violated else {}
        now = snapshot(violations=violations)
        return replace(
            run_of(self.policy.name, now=now),
            seed=self.options["seed"],
            failure=Canned.failure,
            worked=Canned.worked,
        )


@pytest.fixture(autouse=True)
def _no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Job", Canned)
    for name, value in (
        ("made", []),
        ("violated", ""),
        ("stop_after", 1000),
        ("failure", ""),
        ("worked", 1e9),
    ):
        monkeypatch.setattr(Canned, name, value)


def compare(*words: str) -> int:
    return main(["compare", *words])


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert compare(*words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert Canned.made == [], "bad input started a run"
    return err


def test_a_run_ends_after_so_many_units(capsys: pytest.CaptureFixture[str]) -> None:
    """A canned run makes fewer than 10,000 roots, so it is cut short although it works for hours."""
    words = ("nested-churn", "--policy", "linux-7.3", "--policy", "root-tlb-gen", "--json")
    for units, cut_short in ((3, 0), (10_000, 2)):
        compare(*words, "--duration", "1h", "--units", str(units))
        document = json.loads(capsys.readouterr().out)
        assert (document["units"], len(document["cut_short"])) == (units, cut_short)
    until = Canned.made[0].options["until"]
    assert not until(snapshot(vms=({"nested_roots": 2},)))
    assert until(snapshot(vms=({"nested_roots": 3},)))
    assert Canned.made[0].options["duration"] == 3600


def test_without_units_the_duration_ends_a_run() -> None:
    compare("nested-churn", "--policy", "linux-7.3", "--policy", "root-tlb-gen")
    assert [job.options["until"] for job in Canned.made] == [None, None]


def test_units_need_a_scenario_that_has_one(capsys: pytest.CaptureFixture[str]) -> None:
    found = complaint(capsys, "main", "--policy", "linux-7.3", "--units", "3")
    assert "--units: found 3; expected a scenario with a unit" in found


def test_repetitions_go_round_the_policies_with_the_same_seeds() -> None:
    assert (
        compare("mixed", "--policy", "linux-7.3", "--policy", "root-tlb-gen", "--repeat", "3", "--seed", "5")
        == 0
    )
    assert [(job.policy.name, job.options["seed"]) for job in Canned.made] == [
        (name, seed) for seed in (5, 6, 7) for name in ("linux-7.3", "root-tlb-gen")
    ]
    assert {job.scenario.name for job in Canned.made} == {"mixed"}
    assert {job.options["pace"] for job in Canned.made} == {1e8}


def test_options_reach_the_runs() -> None:
    words = ["--duration", "500ms", "--pcpus", "32", "--geometry", "unbounded", "--chaos", "9"]
    assert compare("partitioned", "--policy", "linux-7.3", *words) == 0
    (job,) = Canned.made
    assert (job.options["duration"], job.options["unbounded"], job.options["chaos"]) == (0.5, True, 9)
    assert job.scenario.machine.pcpus == 32
    assert job.options["pace"] == 0, "partitioned is measured by the wall's clock"


def test_one_policy_is_compared_with_the_default() -> None:
    assert compare("--policy", "root-tlb-gen") == 0
    assert [job.policy.name for job in Canned.made] == ["linux-7.3", "root-tlb-gen"]
    assert Canned.made[0].scenario.name == "migration-storm"


def test_single_answers_can_be_changed() -> None:
    (policy,) = load_policies(["linux-7.3+migration=none+migration_vpid=invvpid"])[1:]
    assert policy.answers()["migration"] == "none"
    assert policy.answers()["migration_vpid"] == "invvpid"


def test_json_is_one_document_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--policy", "linux-7.3", "--json", "--seed", "1") == 0
    out, err = capsys.readouterr()
    assert [policy["name"] for policy in json.loads(out)["policies"]] == ["linux-7.3"]
    assert err.startswith("run 1 of 1: linux-7.3: clean")


def test_a_violation_under_any_policy_is_the_exit_status() -> None:
    Canned.violated = "root-tlb-gen"
    assert compare("--policy", "root-tlb-gen") == 1


def test_a_failed_run_is_an_internal_failure(capsys: pytest.CaptureFixture[str]) -> None:
    Canned.failure = "pcpu0 died"
    assert compare("--policy", "linux-7.3") == 3
    assert "linux-7.3 failed: pcpu0 died" in capsys.readouterr().out


def test_stopped_in_the_middle_it_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    Canned.stop_after = 2
    assert compare("--policy", "root-tlb-gen", "--repeat", "4") == 0
    assert len(Canned.made) == 3
    assert "interrupted" in capsys.readouterr().out


def test_a_run_that_did_not_finish_its_work_is_named() -> None:
    Canned.worked = 0.1
    plan = Plan(
        scenario=load_scenario("balloon"), policies=(preset("linux-7.3"),), repeat=1, duration=1.0, seed=1
    )
    comparison = Comparer(plan).run(lambda now: None, threading.Event())
    assert isinstance(comparison, Comparison)
    assert comparison.cut_short == ("linux-7.3, repetition 1",)


@pytest.mark.slow
def test_html_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "page.html"
    assert compare("--policy", "root-tlb-gen", "--html", str(path)) == 0
    text = path.read_text("utf-8")
    assert text.startswith("<!doctype html>")
    assert "flushlab compare migration-storm --policy root-tlb-gen --pcpus 4" in text, "as it was typed"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--policy: found none; expected the policies to compare"),
        (
            ["--policy", "linux-7.3", "--policy", "linux-7.3"],
            "found linux-7.3 twice; expected each policy once",
        ),
        (["--policy", "linux-9"], "--policy"),
        (["--policy", "linux-7.3+migration=nonsense"], "unknown alternative 'nonsense'"),
        (["--policy", "linux-7.3+nonsense"], "--policy linux-7.3+nonsense: found 'nonsense'"),
        (["nowhere", "--policy", "linux-7.3"], "no such scenario"),
        (["--policy", "linux-7.3", "--repeat", "0"], "--repeat"),
        (["--policy", "linux-7.3", "--duration", "0s"], "--duration: found '0s'"),
        (["--policy", "linux-7.3", "--pcpus", "0"], "--pcpus"),
        (["--policy", "linux-7.3", "--pcpus", "5000"], "--pcpus"),
        (["partitioned", "--policy", "linux-7.3", "--pcpus", "2"], "--pcpus: found 2; expected at least 3"),
        (
            ["--policy", "linux-7.3", "--html", "/nowhere/page.html"],
            "--html /nowhere/page.html: No such file",
        ),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    assert expected in complaint(capsys, *words)


def test_html_without_its_library_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = complaint(capsys, "--policy", "linux-7.3", "--html", str(tmp_path / "p.html"))
    assert "pip install 'flushlab[report]'" in line


def test_policies_named_must_exist_before_anything_runs() -> None:
    with pytest.raises(BadInput):
        load_policies(["linux-7.3", "nonsense"])
