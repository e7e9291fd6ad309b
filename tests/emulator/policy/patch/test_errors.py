"""A patch that cannot be used ends the command with one line that names the place, and exit status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.policy.patch.code import SHIPPED
from tests.emulator.policy.patch.edits import (
    BREAKS_ALL,
    MIGRATION,
    NO_FLUSH,
    diff_of,
    edited,
    file_with,
    new_file,
    written,
)

FILE = f"emulator/kvm/{file_with(MIGRATION)}"
HEADER, BODY = NO_FLUSH.split("\n@@", 1)
OTHER = MIGRATION.replace("answer", "anser")
REVERSED = diff_of(
    file_with(MIGRATION),
    SHIPPED.sources[file_with(MIGRATION)].replace(MIGRATION, '    answer = "none"\n'),
    SHIPPED.sources[file_with(MIGRATION)],
)
MODULE = "emulator.kvm." + file_with(MIGRATION).removesuffix(".py").replace("/", ".")


def moved(patch: str, path: str) -> str:
    """The patch, as of another file."""
    return patch.replace(FILE, path)


def last_line_of(patch: str) -> int:
    return patch.count("\n")


ERRORS: dict[str, tuple[str, str]] = {
    "empty": ("", "{path}: empty; expected a unified diff, as from git diff or git format-patch"),
    "no diff": ("Subject: an idea\n", "{path}: no diff in it; expected a unified diff"),
    "context": (
        NO_FLUSH.replace(f"-{MIGRATION}", f"-{OTHER}"),
        f"{{path}}: hunk 1 of {FILE}: line {{line}} is '{MIGRATION.strip()}'; expected 'anser = kvm.policy",
    ),
    "white space": (
        NO_FLUSH.replace(f"-{MIGRATION}", f"-\t{MIGRATION.lstrip()}"),
        f"{{path}}: hunk 1 of {FILE}: line {{line}} is '{MIGRATION.strip()}', with other white space",
    ),
    "reversed": (REVERSED, f"{{path}}: hunk 1 of {FILE}: has been applied already, or is reversed; expected"),
    "twice": (NO_FLUSH + NO_FLUSH, f"{{path}}: hunk 1 of {FILE}: has been applied already, or is reversed"),
    "no context": (
        edited((MIGRATION, MIGRATION + "    answer = 1\n"), context=0),
        f"{{path}}: hunk 1 of {FILE}: has neither context nor removed lines; expected a diff with",
    ),
    "short": (NO_FLUSH[:-80], "{path}:{last}: Hunk is shorter than expected; expected a unified diff"),
    "long": (NO_FLUSH + " more\n", "{path}:{after}: ' more' after the end of a hunk; expected"),
    "damaged header": (
        f"{HEADER}\n@@{BODY}".replace("@@ -", "@@ ="),
        "{path}: changes nothing; expected",
    ),
    "damaged second header": (NO_FLUSH + "@@ -1 +1 @\n", "{path}:{after}: '@@ -1 +1 @' begins no hunk"),
    "CRLF": (NO_FLUSH.replace("\n", "\r\n"), "{path}:1: the line ends with CRLF; expected LF"),
    "native": (
        moved(NO_FLUSH, "native/tlb/tlb.c"),
        "{path}:1: touches native/tlb/tlb.c: the core would have to be built anew; expected changes of .py",
    ),
    "elsewhere": (moved(NO_FLUSH, "emulator/litmus/world.py"), "{path}:1: touches emulator/litmus/world.py;"),
    "tests": (moved(NO_FLUSH, "tests/emulator/kvm/x.py"), "{path}:1: touches tests/emulator/kvm/x.py;"),
    "no Python": (moved(NO_FLUSH, "emulator/kvm/README"), "{path}:1: touches emulator/kvm/README;"),
    "no module": (
        moved(NO_FLUSH, "emulator/kvm/a-b.py"),
        "{path}:1: touches emulator/kvm/a-b.py, which is no",
    ),
    "escape": (moved(NO_FLUSH, "emulator/kvm/../x.py"), "{path}:1: leads out of the tree with"),
    "absolute": (NO_FLUSH.replace("a/emulator", "/emulator"), "{path}:1: leads out of the tree with"),
    "missing": (moved(NO_FLUSH, "emulator/kvm/nowhere.py"), "{path}: emulator/kvm/nowhere.py: no such file;"),
    "exists": (
        new_file(file_with(MIGRATION), "x = 1\n"),
        f"{{path}}: {FILE}: exists already; expected a new file",
    ),
    "rename": (
        f"diff --git a/{FILE} b/emulator/kvm/o.py\nrename from {FILE}\nrename to emulator/kvm/o.py\n",
        "{path}:1: renames or copies emulator/kvm/",
    ),
    "binary": (
        f"diff --git a/{FILE} b/{FILE}\nindex 1..2 100644\nBinary files a/{FILE} and b/{FILE} differ\n",
        f"{{path}}:1: a binary change of {FILE}; expected",
    ),
    "link": (
        new_file("link.py", "x\n").replace("100644", "120000"),
        "{path}:1: emulator/kvm/link.py is no regular file; expected",
    ),
    "mode": (f"diff --git a/{FILE} b/{FILE}\nold mode 100644\nnew mode 100755\n", "{path}: changes nothing;"),
    "syntax": (
        NO_FLUSH.replace('answer = "none"', 'answer = "none'),
        f"{{name}}: {FILE}:{{line}}: SyntaxError: unterminated string literal",
    ),
    "import": (
        new_file("new.py", "import nowhere\n"),
        "{name}: emulator/kvm/new.py:1: ModuleNotFoundError: No module named 'nowhere'; expected code that",
    ),
    "raises": (new_file("new.py", "x = 1\nx / 0\n"), "{name}: emulator/kvm/new.py:2: ZeroDivisionError: div"),
    "exits": (new_file("new.py", "raise SystemExit(0)\n"), "{name}: emulator/kvm/new.py:1: SystemExit: 0;"),
    "ends": (
        new_file("new.py", "import os\nos._exit(0)\n"),
        "{name}: emulator/kvm/new.py:2: Forbidden: a",
    ),
    "starts": (
        new_file("new.py", "import os\nos.system('true')\n"),
        "{name}: emulator/kvm/new.py:2: Forbidden",
    ),
    "changes": (
        new_file("new.py", "import emulator.errors as errors\nerrors.shown = None\n"),
        "{name}: changes emulator.errors.shown; expected changes of emulator.kvm only",
    ),
    "takes away": (
        edited(("def kvm_inject_smi(", "def inject_smi(")),
        "{name}: emulator/kvm/smm.py: takes kvm_inject_smi away, which ",
    ),
    "base": (
        f"Flushlab-Base: linux-9.9\n---\n{NO_FLUSH}",
        "{name}: Flushlab-Base: unknown policy 'linux-9.9'; ex",
    ),
    "bases": (
        f"Flushlab-Base: linux-5.18\nFlushlab-Base: linux-5.14\n---\n{NO_FLUSH}",
        "{path}: Flushlab-Base: 'linux-5.18' and 'linux-5.14'; expected one policy",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_one_line(error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch, wanted = ERRORS[error]
    path = written(tmp_path, patch)
    source = SHIPPED.sources[file_with(MIGRATION)]
    line = source[: source.index(MIGRATION)].count("\n") + 1
    after = patch.count("\n")
    wanted = wanted.format(path=path, name="idea.patch", line=line, last=after + 1, after=after)
    assert main(["explore", "return-zap", "--policy", path]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"flushlab: {wanted}"), err


BELOW = """ below a patch: a file's class and a patch are not combined; expected a preset or a mutant, or \
one of the two alone
"""


@pytest.mark.parametrize(
    ("spelling", "wanted"),
    [
        ("{dir}/nowhere.patch", "{dir}/nowhere.patch: no file; expected a patch"),
        ("linux-9.9+{dir}/idea.patch", "--policy: unknown policy 'linux-9.9'; expected one of linux-7.3"),
        ("{dir}/idea.patch+migration=never", "--policy: migration: unknown alternative 'never'; expected"),
        ("{dir}/idea.patch+", "--policy {dir}/idea.patch+: found ''; expected a patch, or point=alternative"),
        ("{dir}/idea.patch+nothing", "--policy {dir}/idea.patch+nothing: found 'nothing'; expected a patch"),
        ("{dir}/", "{dir}: no patch in it; expected files *.patch or *.diff"),
        ("{dir}/none/", "{dir}/none: No such file or directory; expected a directory of patches"),
        (
            "{dir}/mine.py+{dir}/idea.patch",
            "--policy: found {dir}/mine.py" + BELOW,
        ),
        (
            "{dir}/based.patch",
            "based.patch: Flushlab-Base: found {dir}/mine.py" + BELOW,
        ),
    ],
)
def test_spellings(spelling: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "idea" in spelling:
        written(tmp_path, BREAKS_ALL)
    if "based" in spelling:
        written(tmp_path, f"Flushlab-Base: {tmp_path}/mine.py\n\n{BREAKS_ALL}", "based.patch")
    text = "from emulator.policy import Policy\nclass Mine(Policy):\n    def zap(self, cpu, kvm): ...\n"
    (tmp_path / "mine.py").write_text(text)
    assert main(["litmus", "return-zap", "--policy", spelling.format(dir=tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"flushlab: {wanted.format(dir=tmp_path)}"), err


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["explore", "return-zap"],
        ["explore", "return-zap", "--audit"],
        ["litmus", "return-zap", "--iterations", "3"],
        ["run", "migration-storm", "--duration", "1s", "--seed", "1"],
        ["compare", "migration-storm", "--duration", "1s", "--seed", "1"],
    ],
    ids=" ".join,
)
def test_an_error_at_run_time(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, edited((MIGRATION, MIGRATION.replace("kvm.policy", "kvm.polcy"))))
    source = SHIPPED.sources[file_with(MIGRATION)]
    line = source[: source.index(MIGRATION)].count("\n") + 1
    assert main([*command, "--policy", path]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err == (
        f"flushlab: idea.patch: {FILE}:{line}, in migration_ept(): AttributeError: "
        "'Kvm' object has no attribute 'polcy'; expected code that runs"
    )


@pytest.mark.slow
def test_an_import_that_does_not_end(tmp_path: Path) -> None:
    path = written(tmp_path, new_file("new.py", "import time\ntime.sleep(1e6)\n"))
    command = [sys.executable, "-m", "emulator", "explore", "return-zap", "--policy", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "flushlab: idea.patch:1: sleeps and does not return; expected code that ends\n"
