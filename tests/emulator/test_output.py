"""Results are whole or not there, and nothing but a regular file is ever replaced."""

from __future__ import annotations

import ast
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from emulator.errors import BadInput
from emulator.output import PARTIAL, Unwritable, check_file, make_directory, write_file

PACKAGES = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "emulator"]
SAMPLE = str(Path(__file__).parent / "traces" / "sample.lackey")
ROOT = os.geteuid() == 0

# --- one place that writes files ------------------------------------------------------------------------

_WRITING = {"write_text", "write_bytes", "savefig", "touch", "rename", "symlink_to", "hardlink_to", "mkdir"}
_OF_MODULES = {("os", name) for name in ("open", "fdopen", "replace", "rename", "link", "mkdir", "makedirs")}
_MODULES = ("tempfile", "shutil")
_READING = {"shutil.which"}
# Modules that write files otherwise, and why.
ALLOWED = {
    ("emulator/__main__.py", "os.open"): "/dev/null in place of closed standard descriptors",
    ("emulator/compare/plots.py", "savefig"): "into memory",
    ("emulator/hosttrace/source.py", "open"): "gzip.open() of a trace, to read it",
    ("emulator/kernel_tree/build.py", "mkdir"): "the user's cache",
    ("emulator/kernel_tree/build.py", "rename"): "a built tree, complete, into the cache",
    ("emulator/kernel_tree/build.py", "tempfile.TemporaryDirectory"): "in the cache, for one build",
    ("emulator/kernel_tree/build.py", "touch"): "headers that a tree names and the shim replaces",
    ("emulator/kernel_tree/build.py", "write_text"): "generated sources of one build",
    ("emulator/kernel_tree/execute.py", "tempfile.TemporaryFile"): "the words of a process that may crash",
    (
        "emulator/kernel_tree/on_machine/child.py",
        "os.fdopen",
    ): "the pipe from a process that may crash, to read it",
    ("emulator/kernel_tree/on_machine/child.py", "tempfile.TemporaryFile"): "the words of that process",
}


def _writes(tree: ast.AST) -> Iterator[str]:
    """Calls that make or replace files."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id == "open" and _mode(node, 1):
            yield "open"
        if not isinstance(called, ast.Attribute):
            continue
        module = called.value.id if isinstance(called.value, ast.Name) else ""
        if (module, called.attr) in _OF_MODULES or module in _MODULES:
            if f"{module}.{called.attr}" not in _READING:
                yield f"{module}.{called.attr}"
        elif called.attr == "touch" and (node.args or module == "execution"):
            continue  # a scheduler's, of footprints
        elif called.attr in _WRITING or (called.attr == "open" and _mode(node, 0)):
            yield called.attr


def _mode(call: ast.Call, position: int) -> bool:
    """Whether the mode of an open() says more than reading."""
    given = list(call.args[position : position + 1])
    given += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    return any(not isinstance(mode, ast.Constant) or set("wax+") & set(str(mode.value)) for mode in given)


@pytest.mark.slow
def test_only_one_module_writes_files() -> None:
    found = {
        (str(path.relative_to(PACKAGES)), call)
        for package in ("emulator", "metrics")
        for path in (PACKAGES / package).rglob("*.py")
        if path.name != "output.py" and "data" not in path.parts
        for call in _writes(ast.parse(path.read_text()))
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    "code",
    [
        "open(p, 'w')",
        "p.open('ab')",
        "open(p, mode='r+')",
        "p.write_text(t)",
        "os.replace(a, b)",
        "f.savefig(p)",
    ],
)
def test_the_scan_sees(code: str) -> None:
    assert list(_writes(ast.parse(code)))
    assert not list(
        _writes(ast.parse("open(p), p.open('rb'), execution.touch(0, mask), text.replace('a', 'b')"))
    )


# --- files ----------------------------------------------------------------------------------------------


def left_over(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(PARTIAL)]


def test_a_file_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    before = os.umask(0o027)
    try:
        write_file("--output", path, "new")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    write_file("--output", path, b"newer")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("newer", 0o604)
    assert not left_over(tmp_path)


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("place")
    for text in ("one", "two"):
        write_file("", tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "place").read_text() == text


def special(kind: str, directory: Path) -> Path:
    path = directory / "special"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    else:
        path.symlink_to("/dev/full")
    return path


KINDS = ("a FIFO", "a directory", "a socket", "a device")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = special(kind, tmp_path)
    before = path.stat()
    for refuse in (partial(write_file, "--output", path, "x"), partial(check_file, "--output", path)):
        with pytest.raises(Unwritable, match=f"^--output {path}: it is {kind}; expected a regular file"):
            refuse()
    assert path.stat() == before
    assert not left_over(tmp_path)


@pytest.mark.skipif(ROOT, reason="root may write everywhere")
def test_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("old")
    path.chmod(0o400)
    with pytest.raises(Unwritable, match="Permission denied"):
        write_file("", path, "new")
    tmp_path.chmod(0o500)
    with pytest.raises(Unwritable, match="Permission denied"):
        make_directory("--report-dir", tmp_path)
    tmp_path.chmod(0o700)
    assert path.read_text() == "old"


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(Unwritable, match="File too large"):
            write_file("", path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert not left_over(tmp_path)


def test_a_missing_directory_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file or directory"):
        check_file("--html", tmp_path / "nowhere" / "page.html")


# --- the commands ---------------------------------------------------------------------------------------


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`FLUSHLAB` in the line is the command."""
    whole = f'FLUSHLAB() {{ {" ".join(COMMAND)} "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", whole],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
        env=os.environ | {"PYTHONPATH": str(PACKAGES)},
    )


VIOLATING = "explore return-zap --policy migration=none --jobs 1"
SAFE = "explore return-zap --jobs 1"
FULL = "flushlab: standard output: No space left on device\n"
CLOSED = "flushlab: standard output: it is closed\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "status", "errors"),
    [
        (f"FLUSHLAB {VIOLATING} --json | head -c 1", 1, ""),
        (f"FLUSHLAB {VIOLATING} > /dev/full", 1, FULL),
        (f"FLUSHLAB {VIOLATING} >&-", 1, CLOSED),
        (f"FLUSHLAB {SAFE} --json | head -c 1", 0, ""),
        (f"FLUSHLAB {SAFE} > /dev/full", 2, FULL),
        (f"FLUSHLAB {SAFE} >&-", 2, CLOSED),
        ("FLUSHLAB list mutants | head -1", 0, ""),
        ("FLUSHLAB list mutants > /dev/full", 2, FULL),
        ("FLUSHLAB --help > /dev/full", 2, FULL),
    ],
)
def test_standard_output_that_takes_nothing(line: str, status: int, errors: str, tmp_path: Path) -> None:
    ended = shell(line, tmp_path)
    assert (ended.returncode, ended.stderr) == (status, errors)


@pytest.mark.slow
def test_closed_standard_error_does_not_turn_up_in_the_document(tmp_path: Path) -> None:
    ended = shell("FLUSHLAB run --duration 0.2s --json 2>&-", tmp_path)
    assert json.loads(ended.stdout)["flushlab"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a FIFO", "a device"])
@pytest.mark.parametrize(
    ("command", "status"),
    [
        (f"trace convert {SAMPLE} special", 2),
        (f"{VIOLATING} --output special", 2),
        ("compare --policy linux-5.18 --html special", 2),
    ],
)
def test_commands_refuse_special_files_before_they_work(
    command: str, status: int, kind: str, tmp_path: Path
) -> None:
    path = special(kind, tmp_path)
    before = path.stat()
    ended = shell(f"FLUSHLAB {command}", tmp_path)
    assert (ended.returncode, ended.stdout) == (status, "")
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert "special: " in ended.stderr
    assert path.stat() == before


@pytest.mark.slow
def test_a_verdict_stands_where_its_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out" / "return-zap-migration-none.json").mkdir(parents=True)
    ended = shell(f"FLUSHLAB {VIOLATING} --output out", tmp_path)
    assert ended.returncode == 1
    assert "use-after-free" in ended.stdout
    assert ended.stderr.count("\n") == 1
    assert "it is a directory" in ended.stderr
