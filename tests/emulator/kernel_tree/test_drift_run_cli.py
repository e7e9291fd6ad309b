"""`flushlab drift TREE --run`: options that do not go together, and trees that do not compile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from emulator.cli.main import main


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a made-up tree whose TDP MMU calls a function that no header declares."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    top = tmp_path / "linux"
    mmu = top / "arch/x86/kvm/mmu"
    mmu.mkdir(parents=True)
    (top / "Makefile").write_text("VERSION = 6\nPATCHLEVEL = 12\nSUBLEVEL = 1\n")
    for name in ("tdp_iter.c", "spte.c", "mmu_internal.h", "spte.h", "tdp_iter.h", "tdp_mmu.h", "mmutrace.h"):
        (mmu / name).write_text("")
    (mmu / "tdp_mmu.c").write_text("int zap(void)\n{\n\treturn frobnicate_all(7);\n}\n")
    return top


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--operations", "60"], "--operations"),
        (["--seed", "1"], "--seed"),
        (["--policy", "linux-7.3"], "--policy"),
        (["--run", "--since", "6.12"], "--since"),
        (["--run", "--record", "own.json"], "--record"),
        (["--run", "--diff"], "--diff"),
    ],
)
def test_options_that_do_not_go_together(
    tree: Path, arguments: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["drift", str(tree), *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert option in line
    assert "--run" in line


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_a_tree_that_does_not_compile(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drift", str(tree), "--run"]) == 2
    *details, last = capsys.readouterr().err.strip().splitlines()
    assert any("tdp_mmu.c:3: error:" in line for line in details)
    assert "frobnicate_all" in last
    assert "Traceback" not in last


def test_without_a_compiler(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert main(["drift", str(tree), "--run"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no-such-compiler" in line
    assert "expected gcc 10 or later" in line


def test_another_compiler(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A compiler whose messages are no JSON of gcc's is refused before it compiles anything."""
    monkeypatch.setenv("CC", "true")
    assert main(["drift", str(tree), "--run"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "with messages in JSON" in line
