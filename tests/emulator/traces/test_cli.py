"""`flushlab trace`: its commands, and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from emulator import traces
from emulator.cli.trace import app

SAMPLE = Path(__file__).with_name("sample.lackey")


def run(*words: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)


def refused(result: Result) -> str:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_convert_and_info(tmp_path: Path) -> None:
    output = tmp_path / "sample.fltrace"
    result = run("convert", SAMPLE, output, "--skip", "10", "--limit", "100", "--name", "mine")
    assert result.exit_code == 0, result.output
    assert "100 records" in result.stdout
    trace = traces.load(output)
    assert trace.name == "mine"
    assert trace.records.size == 100
    result = run("info", output)
    assert result.exit_code == 0
    assert "sort --version (valgrind 3.19.0; at most 100 records after the first 10)" in result.stdout
    assert "working set" in result.stdout


def test_convert_from_standard_input(tmp_path: Path) -> None:
    output = tmp_path / "piped.fltrace"
    result = run("convert", "-", output, "--no-instructions", stdin=SAMPLE.read_text())
    assert result.exit_code == 0, result.output
    trace = traces.load(output)
    assert trace.metadata.executes == 0
    assert trace.metadata.reads > 0
    assert trace.name == "piped"
    assert "whole recording, data accesses only" in run("info", output).stdout


def test_list_names_each_embedded_trace() -> None:
    result = run("list")
    assert result.exit_code == 0
    for info in traces.embedded():
        assert f"\n{info.name} " in result.stdout
        assert info.metadata.description in result.stdout


def test_help_shows_how_to_record() -> None:
    result = run("convert", "--help")
    assert result.exit_code == 0
    assert "valgrind --tool=lackey --trace-mem=yes --log-fd=9 PROGRAM ARGS" in result.stdout


@pytest.mark.parametrize(
    "name", ["", "a/b", "-x", "x" * 65, "ä", "a\n", "a\nb", "a\x1b", "\udcff", "x" * 70_000]
)
def test_bad_name(name: str, tmp_path: Path) -> None:
    result = run("convert", SAMPLE, tmp_path / "a.fltrace", f"--name={name}")
    assert "--name: found" in refused(result)


@pytest.mark.parametrize("name", ["a b", "-x", "x" * 65, ".x"])
def test_bad_name_of_output(name: str, tmp_path: Path) -> None:
    output = tmp_path / f"{name}.fltrace"
    assert "no name for a trace: '" in refused(run("convert", SAMPLE, output))
    assert not output.exists()
    assert run("convert", SAMPLE, output, "--name", "good").exit_code == 0


@pytest.mark.parametrize(
    ("description", "found"),
    [
        ("x" * 1025, "found 1025 characters"),
        ("x" * 70_000, "found 70000"),
        ("a\nb", "'a\\nb'"),
        ("\udcff", "udcff"),
    ],
)
def test_bad_description(description: str, found: str, tmp_path: Path) -> None:
    # Said before the input, which is wrong as well, is read.
    complaint = refused(run("convert", "-", tmp_path / "a.fltrace", "--description", description, stdin="x"))
    assert "--description: " in complaint
    assert found in complaint


def test_the_longest_description(tmp_path: Path) -> None:
    output = tmp_path / "a.fltrace"
    assert run("convert", SAMPLE, output, "--description", "x" * 1024).exit_code == 0
    assert traces.load(output).metadata.description == "x" * 1024


def test_endless_and_unnameable_traces(tmp_path: Path) -> None:
    assert "File name too long" in refused(run("info", tmp_path / f"{'x' * 300}.fltrace"))
    assert "no such trace" in refused(run("info", "x" * 300))
    assert "did you mean sort?" in refused(run("info", "sotr"))


def test_bad_input(tmp_path: Path) -> None:
    output = tmp_path / "out.fltrace"
    assert "no such file" in refused(run("convert", tmp_path / "absent", output))
    assert "cannot be read" in refused(run("convert", tmp_path, output))
    assert "<stdin>, line 1: found 'garbage'" in refused(run("convert", "-", output, stdin="garbage\n"))
    assert "<stdin>: nothing; expected a recording" in refused(run("convert", "-", output, stdin=""))
    assert "cannot be written" in refused(run("convert", SAMPLE, tmp_path / "no" / "out.fltrace"))
    assert "all skipped" in refused(run("convert", SAMPLE, output, "--skip", "100000"))
    assert "not a trace" in refused(run("info", SAMPLE))
    assert "no such trace; expected a file, or one of the embedded" in refused(run("info", "absent"))
    assert list(tmp_path.iterdir()) == [], "a failed conversion left a file"


@pytest.mark.parametrize("words", [["--limit", "0"], ["--skip", "-1"], ["--limit", "x"]])
def test_bad_options(words: list[str], tmp_path: Path) -> None:
    assert run("convert", SAMPLE, tmp_path / "out.fltrace", *words).exit_code == 2
