"""`python -m bench` works and its invariants hold; nothing is said about how quick anything is."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

import bench.__main__
from bench.__main__ import BENCHMARKS, main, run
from bench.benchmark import Benchmark
from bench.errors import BenchFailed
from bench.figures import COUNTS, Figure, conditions
from bench.history import Kept, changes, keep, last_of
from bench.job import check_counters
from bench.machine import cpu_family, cpu_model, usable_cores
from bench.report import Report
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


# Far beyond the half minute that a quiet machine takes: only a hang is to be caught.
QUICK_RUN_SECONDS = 280


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """Run the command as users type it: the table on standard error, the document on standard output."""
    command = [sys.executable, "-m", "bench", "--quick", "--json", "-"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=QUICK_RUN_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "wanted" in done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.timeout(QUICK_RUN_SECONDS + 20)
@pytest.mark.slow
class TestQuickRun:
    def test_every_benchmark_gives_figures_or_is_skipped_for_want_of_cores(
        self, document: dict[str, Any]
    ) -> None:
        measured = {entry["benchmark"] for entry in document["figures"]}
        skipped = {entry["benchmark"] for entry in document["skipped"]}
        assert measured | skipped == {one.name for one in BENCHMARKS if not one.on_request}
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

    def test_times_of_tiny_sizes_are_held_against_nothing(self, document: dict[str, Any]) -> None:
        assert document["quick"]
        times = [entry for entry in document["figures"] if entry["unit"] not in COUNTS]
        assert {entry["met"] for entry in times} == {None}
        assert any(entry["wanted"] for entry in times)

    def test_counts_are_as_wanted_whatever_the_sizes(self, document: dict[str, Any]) -> None:
        counts = [entry for entry in document["figures"] if entry["unit"] in COUNTS and entry["wanted"]]
        assert len(counts) >= 20
        assert [entry["name"] for entry in counts if entry["met"] is not True] == []
        assert document["unmet"] == []

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
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "path", sorted((ROOT / "bench" / "native").glob("*.c")), ids=lambda path: path.stem
    )
    def test_wrong_arguments_end_it_with_a_sentence(self, toolchain: Toolchain, path: Path) -> None:
        with pytest.raises(BenchFailed, match=rf"{path.stem}: .*{path.name}:\d+: not so: argc == "):
            toolchain.run(path.stem)

    @pytest.mark.slow
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


class TestUnmet:
    MACHINE: ClassVar[dict[str, Any]] = {
        "cpu": "Some CPU",
        "cpu_family": "family 1 model 2",
        "usable_cores": 2,
        "cores": 2,
        "kernel": "6.18",
        "load_at_start": 0.1,
    }

    def printed(self, report: Report, before: Kept | None = None) -> str:
        console = Console(width=100, file=io.StringIO())
        report.print(console, before)
        return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]

    def test_the_last_lines_name_each_figure_that_is_not_as_wanted(self) -> None:
        met, unmet = figure(name="good", wanted="ratio >= 1"), figure(name="bad", wanted="ratio <= 1")
        report = Report(False, self.MACHINE, [("a", met), ("b", unmet), ("c", figure())])
        *_, count, line = self.printed(report).splitlines()
        assert count == "Not as wanted, 1 of 2:"
        assert line == "  b: bad: 20 ns, 2x r; wanted: ratio <= 1"
        assert report.document()["unmet"] == [{"benchmark": "b", "name": "bad"}]

    def test_nothing_unmet_is_said_too(self) -> None:
        report = Report(False, self.MACHINE, [("a", figure(wanted="ratio >= 1"))])
        assert self.printed(report).endswith("All 1 figures of which something is wanted are as wanted.\n")

    def test_with_tiny_sizes_only_counts_are_judged(self) -> None:
        time, count = figure(wanted="ratio <= 1"), figure(unit="flushes", wanted="ratio <= 1")
        report = Report(True, self.MACHINE, [("a", time), ("a", count)])
        assert report.unmet == [("a", count)]

    @pytest.mark.parametrize(("arguments", "status"), [([], 0), (["--check"], 1)])
    def test_check_makes_it_an_exit_status(
        self, arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        unmet = Benchmark("unmet", "", lambda context: iter([figure(wanted="ratio <= 1")]))
        monkeypatch.setattr(bench.__main__, "BENCHMARKS", (unmet,))
        assert main(arguments) == status


class TestHistory:
    MACHINE = TestUnmet.MACHINE

    def test_what_is_kept_comes_back_by_processor(self, tmp_path: Path) -> None:
        path = tmp_path / "kept.jsonl"
        keep(path, self.MACHINE, [("a", figure())])
        keep(path, {**self.MACHINE, "cpu_family": "family 1 model 3"}, [("a", figure(name="other"))])
        found = last_of(path, self.MACHINE)
        assert found is not None
        assert [(one.benchmark, one.name, one.ratio) for one in found.figures] == [("a", "f", 2.0)]
        assert last_of(path, {**self.MACHINE, "cpu": "None"}) is None

    def test_only_what_leaves_the_ranges_of_both_runs_has_changed(self, tmp_path: Path) -> None:
        path = tmp_path / "kept.jsonl"
        steady, noisy = (10.0, 10.0, 10.0), (10.0, 20.0, 40.0)
        keep(path, self.MACHINE, [("a", figure(values=steady)), ("a", figure(name="g", values=noisy))])
        before = last_of(path, self.MACHINE)
        assert before is not None
        now = [("a", figure(values=(30.0, 31.0, 29.0))), ("a", figure(name="g", values=(30.0, 30.0, 30.0)))]
        first, line = changes(before, now)
        assert first.endswith("Some CPU (family 1 model 2): 1 of 2 ratios have changed.")
        assert line == "  a: f to r: ratio 1 then, 3 now"

    @pytest.mark.parametrize("line", ["{}", "nonsense", '{"date": 1}'])
    def test_a_line_that_is_no_run_is_bad_input(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "kept.jsonl"
        path.write_text(line + "\n")
        assert main(["--quick", "--only", "rcu", "--against", str(path)]) == 2

    def test_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        one = Benchmark("one", "", lambda context: iter([figure()]))
        monkeypatch.setattr(bench.__main__, "BENCHMARKS", (one,))
        path = tmp_path / "kept.jsonl"
        assert main(["--keep", str(path)]) == 0
        assert main(["--against", str(path)]) == 0
        assert len(path.read_text().splitlines()) == 1


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--only", "walk", "nothing"], "--only: found 'nothing'; expected names among guest, walk, "),
            (["--json", "/nowhere/bench.json"], "--json: /nowhere/bench.json: No such file or directory"),
            (["--fast"], "unrecognized arguments: --fast"),
            (["--only"], "--only"),
            (["--keep", "/nowhere/kept"], "--keep: /nowhere/kept: No such file or directory"),
            (["--keep", "kept", "--quick"], "--keep: --quick; expected figures that mean something"),
            (["--against", "/nowhere/kept"], "--against: /nowhere/kept: "),
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

    @pytest.mark.slow
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
    first = "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: Some CPU @ 3: GHz\n"
    cpuinfo.write_text(f"processor\t: 0\n{first}\nprocessor\t: 1\nmodel\t\t: 3\n")
    assert cpu_model(cpuinfo) == "Some CPU @ 3: GHz"
    assert cpu_family(cpuinfo) == "family 26 model 2"
    assert cpu_model(tmp_path / "none") == "unknown"
