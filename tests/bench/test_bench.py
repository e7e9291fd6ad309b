"""`python -m bench` works and its invariants hold; nothing is said about how quick anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import BENCHMARKS, main, run
from bench.benchmark import Benchmark
from bench.errors import BenchFailed
from bench.figures import Figure, conditions
from bench.job import check_counters
from bench.machine import cpu_model, usable_cores
from bench.toolchain import Toolchain

ROOT = Path(__file__).resolve().parents[2]


def figure(**changes: Any) -> Figure:
    fields: dict[str, Any] = {
        "name": "f",
        "what": "",
        "unit": "ns",
        "values": (20.0, 10.0, 40.0),
        "reference_name": "r",
        "references": (10.0, 10.0, 10.0),
        "ratio_of": "value/reference",
    }
    return Figure(**{**fields, **changes})


@pytest.fixture(scope="module")
def toolchain(tmp_path_factory: pytest.TempPathFactory) -> Toolchain:
    return Toolchain(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """Of the command as users type it: the table on standard error, the document on standard output."""
    command = [sys.executable, "-m", "bench", "--quick", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert "wanted" in done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


class TestQuickRun:
    def test_every_benchmark_gives_figures_or_is_skipped_for_want_of_cores(
        self, document: dict[str, Any]
    ) -> None:
        measured = {entry["benchmark"] for entry in document["figures"]}
        skipped = {entry["benchmark"] for entry in document["skipped"]}
        assert measured | skipped == {benchmark.name for benchmark in BENCHMARKS}
        assert skipped == {benchmark.name for benchmark in BENCHMARKS if benchmark.cores > usable_cores()}
        assert document["failures"] == []

    def test_figures_have_all_fields(self, document: dict[str, Any]) -> None:
        for entry in document["figures"]:
            assert entry["value"] > 0
            assert entry["reference"] > 0
            assert 0 < entry["ratio_low"] <= entry["ratio"] <= entry["ratio_high"]
            assert len(entry["values"]) == len(entry["references"]) > 0
            for key in ("name", "what", "unit", "reference_name", "ratio_of"):
                assert entry[key]
            conditions(entry["wanted"] or "")

    def test_figures_can_be_told_apart(self, document: dict[str, Any]) -> None:
        names = [(entry["name"], entry["reference_name"]) for entry in document["figures"]]
        assert len(names) == len(set(names))

    def test_tiny_sizes_are_held_against_nothing(self, document: dict[str, Any]) -> None:
        assert document["quick"]
        assert {entry["met"] for entry in document["figures"]} == {None}
        assert any(entry["wanted"] for entry in document["figures"])

    def test_says_on_what_it_ran(self, document: dict[str, Any]) -> None:
        machine = document["machine"]
        assert machine["cpu"]
        assert machine["kernel"]
        assert machine["compiler"]
        assert machine["usable_cores"] >= 1
        assert machine["load_at_start"] >= 0
        assert machine["load_at_end"] >= 0


class TestFigure:
    def test_ratio_is_of_each_repeat(self) -> None:
        # Slower half-way, figure and reference alike: the medians' ratio would be 1.
        drifting = figure(values=(2.0, 20.0, 10.0), references=(1.0, 10.0, 20.0))
        assert drifting.value / drifting.reference == 1
        assert drifting.ratio == 2

    def test_times_quicker(self) -> None:
        assert figure(ratio_of="reference/value", values=(2.0,), references=(10.0,)).ratio == 5

    @pytest.mark.parametrize(
        ("wanted", "met"),
        [
            ("", None),
            ("ratio <= 2", True),
            ("ratio >= 2", True),
            ("ratio >= 2.5", False),
            ("value <= 20 and ratio >= 2", True),
            ("value <= 19 and ratio >= 2", False),
        ],
    )
    def test_met(self, wanted: str, met: bool | None) -> None:
        assert figure(wanted=wanted).met is met

    @pytest.mark.parametrize(
        "wrong",
        [
            {"wanted": "ratio is good"},
            {"values": (1.0,)},
            {"values": (0.0, 1.0, 1.0)},
            {"values": (float("nan"), 1.0, 1.0)},
            {"ratio_of": "both"},
        ],
    )
    def test_nonsense_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"validation error"):
            figure(**wrong)


class TestPrograms:
    @pytest.mark.parametrize(
        "path", sorted((ROOT / "bench" / "native").glob("*.c")), ids=lambda path: path.stem
    )
    def test_wrong_arguments_end_it_with_a_sentence(self, toolchain: Toolchain, path: Path) -> None:
        with pytest.raises(BenchFailed, match=rf"{path.stem}: .*{path.name}:\d+: not so: argc == "):
            toolchain.run(path.stem)

    def test_a_trace_that_touches_unknown_pages_is_noticed(
        self, toolchain: Toolchain, tmp_path: Path
    ) -> None:
        records, pages = tmp_path / "records", tmp_path / "pages"
        records.write_bytes(b"".join((page << 12).to_bytes(8, "little") for page in (1, 2, 3)))
        pages.write_bytes(b"".join(page.to_bytes(8, "little") for page in (1, 2)))
        with pytest.raises(BenchFailed, match=r"guest_loop: .*not so"):
            toolchain.run("guest_loop", "odd", records, pages, 1)

    def test_compiler_that_fails(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("CC", "false")
        with pytest.raises(BenchFailed, match="compiler failed"):
            Toolchain(tmp_path).run("walk", 1)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--only", "walk", "nothing"], "--only: found 'nothing'; expected names among guest, walk, "),
            (["--json", "/nowhere/bench.json"], "--json: /nowhere/bench.json: No such file or directory"),
            (["--fast"], "unrecognized arguments: --fast"),
            (["--only"], "--only"),
        ],
    )
    def test_bad_usage_is_one_line_and_status_2(
        self, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert sentence in error

    def test_no_compiler_is_one_line_and_status_2(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.delenv("CC", raising=False)
        assert main(["--quick", "--only", "walk"]) == 2
        error = capsys.readouterr().err
        assert error == "C compiler: there is no 'cc'; expected cc in PATH, or one named by CC\n"

    def test_document_in_a_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "bench.json"
        assert main(["--quick", "--only", "rcu", "--json", str(path)]) == 0
        document = json.loads(path.read_text())
        assert {entry["benchmark"] for entry in document["figures"]} == {"rcu"}
        assert "RCU read section" in capsys.readouterr().out


def test_one_that_fails_is_reported_and_the_others_run(tmp_path: Path) -> None:
    def fails(context: object) -> Any:
        yield figure()
        raise BenchFailed("polls differ")

    works = Benchmark("works", "", lambda context: iter([figure()]))
    report = run([Benchmark("fails", "", fails), works], tmp_path, quick=True)
    assert report.failures == [("fails", "polls differ")]
    assert [name for name, _ in report.figures] == ["fails", "works"]
    assert report.document()["failures"] == [{"benchmark": "fails", "text": "polls differ"}]


def test_one_that_needs_more_cores_is_skipped(tmp_path: Path) -> None:
    def never(context: object) -> Any:
        raise AssertionError

    report = run([Benchmark("wide", "", never, cores=100_000)], tmp_path, quick=True)
    assert report.skipped == [("wide", "needs 100000 cores")]


class TestJobCounters:
    GOOD = {  # noqa: RUF012
        "accesses": 100,
        "polls": 105,
        "lookups": 103,
        "checks": 103,
        "vm_entries": 5,
        "exit_ept_violation": 2,
        "guest_faults": 1,
    }

    def test_good(self) -> None:
        check_counters(self.GOOD)

    @pytest.mark.parametrize(
        "wrong", [{"checks": 102}, {"polls": 102}, {"polls": 109}, {"accesses": 104}, {"accesses": 99}]
    )
    def test_bad(self, wrong: dict[str, int]) -> None:
        with pytest.raises(BenchFailed):
            check_counters({**self.GOOD, **wrong})


def test_cpu_model(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU @ 3: GHz\n")
    assert cpu_model(cpuinfo) == "Some CPU @ 3: GHz"
    assert cpu_model(tmp_path / "none") == "unknown"
