"""`flushlab compare --vary` and `flushlab merge`, from the command line."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.sweep.stats import Estimate
from emulator.sweep.table import Cell
from tests.emulator.sweep.canned_runs import canned, record_of

BASE = ["compare", "migration-storm", "--policy", "linux-7.3", "--policy", "root-tlb-gen"]
GRID = [*BASE, "--vary", "vm.count=1,2,4", "--vary", "host.unmap=10,20", "--repeat", "9"]  # 108 runs
SMALL = """
duration = "1s"
pace = 100
[machine]
pcpus = 2
[[vm]]
count = 1
memory = 8
traces = ["cc1"]
[scheduler]
migrations = 500
[phases]
quiet = "0s"
"""


@pytest.fixture
def canned_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emulator.sweep.work.in_processes", canned)


@pytest.mark.slow
@pytest.mark.usefixtures("canned_runs")
def test_three_shards_are_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = [str(tmp_path / f"{i}.jsonl") for i in (1, 2, 3)]
    for i, store in enumerate(stores, start=1):
        assert main([*GRID, "--store", store, "--shard", f"{i}/3"]) == 0
    both = [["--table", str(tmp_path / name)] for name in ("merged.csv", "whole.csv")]
    capsys.readouterr()
    assert main(["merge", *stores, "--output", str(tmp_path / "all"), *both[0]]) == 0
    table = capsys.readouterr().out
    assert main([*GRID, "--store", str(tmp_path / "whole"), *both[1]]) == 0
    assert capsys.readouterr().out == table
    assert (tmp_path / "all").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (tmp_path / "merged.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    # All of it is there.
    assert main([*GRID, "--store", str(tmp_path / "all")]) == 0
    captured = capsys.readouterr()
    assert captured.out == table
    assert captured.err == "108 of 108 runs are in the store\n"


@pytest.mark.slow
@pytest.mark.usefixtures("canned_runs")
def test_tables_for_people_and_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    csv_file = tmp_path / "table.csv"
    assert main([*GRID, "--table", str(csv_file), "--figure", "interruptions/M", "--figure", "none"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("interruptions, per million guest accesses")
    assert "no run has the figure none; there are: flush cycles/M, interruptions/M" in out
    assert all(len(line) <= 120 for line in out.splitlines())
    with csv_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 108
    assert {(row["vm.count"], row["host.unmap"]) for row in rows} == {
        (a, b) for a in "124" for b in ("10", "20")
    }
    assert main([*GRID, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    cells = document["figures"]["flush cycles/M"]
    assert len(cells) == 12
    assert all(cell["low"] <= cell["median"] <= cell["high"] for cell in cells)
    assert all((cell["p"] is None) == (cell["policy"] == "linux-7.3") for cell in cells)
    assert len(document["units"]) == 108


@pytest.mark.slow
@pytest.mark.usefixtures("canned_runs")
def test_parquet_has_the_rows_of_csv(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    files = [tmp_path / f"table{suffix}" for suffix in (".csv", ".parquet")]
    for file in files:
        assert main([*GRID, "--table", str(file)]) == 0
    frames = pandas.read_csv(files[0]), pandas.read_parquet(files[1])
    assert list(frames[0].columns) == list(frames[1].columns)
    assert frames[0]["flush cycles/M"].tolist() == frames[1]["flush cycles/M"].tolist()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--vary", "vm.count=1", "--vary", "vm.count=2"], "--vary: found vm.count twice"),
        (["--jobs", "2"], "--jobs: found without a sweep"),
        (["--table", "x.txt"], "--table: found x.txt; expected a file that ends in .csv or .parquet"),
        (["--vary", "vm.count=1", "--shard", "2/1"], "--shard: found '2/1'"),
        (["--store", "/"], "--store /: it is a directory"),
    ],
)
def test_bad_input_is_one_line(options: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE, *options]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith(f"flushlab: {error}")
    assert captured.count("\n") == 1


@pytest.mark.usefixtures("canned_runs")
def test_stores_of_two_scenarios_are_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = [str(tmp_path / name) for name in ("tables", "reclaim")]
    for store in stores:
        line = [
            "compare",
            Path(store).name,
            "--policy",
            "linux-7.3",
            "--policy",
            "linux-6.12",
            "--store",
            store,
        ]
        assert main(line) == 0
    assert main(["merge", *stores]) == 2
    assert "found runs of reclaim and tables; expected stores of one sweep" in capsys.readouterr().err


def lines(store: Path) -> list[str]:
    return [json.loads(line)["key"] for line in store.read_text().splitlines()] if store.exists() else []


def sweep(tmp_path: Path, *options: str) -> list[str]:
    (tmp_path / "small.toml").write_text(SMALL)
    command = [sys.executable, "-m", "emulator", *BASE, "--vary", "vm.vcpus=1,2", "--duration", "20ms"]
    command[4] = "small.toml"
    return [*command, "--store", "store", *options]


@pytest.mark.stress
@pytest.mark.timeout(200)
def test_a_sweep_that_was_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    command, store = sweep(tmp_path, "--jobs", "2"), tmp_path / "store"
    with subprocess.Popen(
        command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL
    ) as process:
        while not lines(store):
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    before = store.read_text()
    kept = before.count("\n")
    assert 1 <= kept < 4
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"{kept} of 4 runs are in the store\n")
    assert store.read_text().startswith(before[: before.rfind("\n") + 1])
    found = lines(store)
    assert len(found) == len(set(found)) == 4


@pytest.mark.stress
@pytest.mark.timeout(200)
def test_a_signal_keeps_the_runs_that_are_done(tmp_path: Path) -> None:
    command, store = sweep(tmp_path, "--repeat", "50"), tmp_path / "store"
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not lines(store):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 1 <= len(lines(store)) < 100
    assert out.startswith("flush cycles, per million guest accesses")
    assert err.splitlines()[-1].endswith(" of 200 runs not reached")


@pytest.mark.slow
@pytest.mark.usefixtures("canned_runs")
def test_a_page_has_a_picture_of_each_figure_over_each_parameter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, page, merged = tmp_path / "store", tmp_path / "page.html", tmp_path / "merged.html"
    assert main([*GRID, "--figure", "flush cycles/M", "--store", str(store), "--html", str(page)]) == 0
    text = page.read_text()
    titles = re.findall("<h3>(.*?)</h3>", text)
    assert titles == [
        "Over vm.count, at host.unmap = 10", "Over vm.count, at host.unmap = 20",
        "Over host.unmap, at vm.count = 1", "Over host.unmap, at vm.count = 2",
        "Over host.unmap, at vm.count = 4",
    ]  # fmt: skip
    assert text.count("<svg") == 5
    assert text.count("<td>root-tlb-gen</td>") == 6
    links = re.findall(r'(?:src|href)="([^"#]+)"', text)
    assert all(link.startswith("data:") for link in links)
    (data,) = re.findall(r"base64,([^\"]+)", text)
    assert len(json.loads(base64.b64decode(data))["units"]) == 108
    assert main(["merge", str(store), "--figure", "flush cycles/M", "--html", str(merged)]) == 0
    assert re.findall("<h3>(.*?)</h3>", merged.read_text()) == titles


@pytest.mark.slow
def test_a_refuted_policy_has_a_broken_line() -> None:
    from emulator.sweep.page import _picture  # matplotlib takes a second

    def cell(value: int, policy: str, verdict: str) -> Cell:
        return Cell((("vm.count", value),), policy, verdict, Estimate(1, 5.0 * value))

    clean = [cell(value, "linux-7.3", "clean") for value in (1, 2)]
    svg = _picture([*clean, *(cell(n, "other", "violations") for n in (1, 2))], "vm.count", "unit")
    assert "other (violations)" in svg
    assert "stroke-dasharray" in svg
    assert "stroke-dasharray" not in _picture(clean, "vm.count", "unit")


@pytest.mark.stress
@pytest.mark.timeout(200)
def test_108_units_on_a_cluster_and_in_three_shards_are_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("emulator.sweep.work.run_unit", record_of)
    tables = [["--table", str(tmp_path / name)] for name in ("plain.csv", "whole.csv", "merged.csv")]
    monkeypatch.setattr("emulator.sweep.work.in_processes", canned)
    assert main([*GRID, *tables[0]]) == 0
    plain = capsys.readouterr().out
    assert main([*GRID, "--cluster", "local", "--jobs", "2", *tables[1]]) == 0
    assert capsys.readouterr().out == plain
    stores = [str(tmp_path / f"{i}.jsonl") for i in (1, 2, 3)]
    for i, store in enumerate(stores, start=1):
        assert main([*GRID, "--store", store, "--shard", f"{i}/3"]) == 0
    capsys.readouterr()
    assert main(["merge", *stores, *tables[2]]) == 0
    assert capsys.readouterr().out == plain
    first, second, third = (Path(table[1]).read_bytes() for table in tables)
    assert first == second == third
    assert first.count(b"\n") == 1 + 108


@pytest.mark.stress
@pytest.mark.timeout(200)
def test_a_cluster_on_loopback_runs_the_same_units(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    command = sweep(tmp_path, "--cluster", "local", "--jobs", "1")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert len(set(lines(tmp_path / "store"))) == 4
    # In processes of this machine the grid has the same units, and shows the same table of them.
    here = [word for word in command if word not in ("--cluster", "local")]
    again = subprocess.run(here, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert again.stderr == "4 of 4 runs are in the store\n"
    assert again.stdout == done.stdout
