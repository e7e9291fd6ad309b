"""Mutants are files: complete headers, patches of exactly the shipped code, and no trace in KVM's code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import emulator
from emulator.cli.main import main
from emulator.errors import BadInput
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy
from emulator.policy import MUTANTS, POINTS, PRESETS, load_user_policy, preset
from emulator.policy.mutants.catalogue import read_mutant
from emulator.policy.patch import PatchError
from emulator.policy.patch.code import SHIPPED, load_shipped
from emulator.policy.patch.diff import lines_of, parse_diff

PATCHED = [name for name, mutant in MUTANTS.items() if mutant.patch is not None]
TOP = Path(next(iter(emulator.__path__))).parent


@pytest.mark.parametrize("name", PATCHED)
def test_each_hunk_has_one_place(name: str) -> None:
    """Its old lines are in the shipped file once, so no change above them moves it to another place."""
    for diff in parse_diff(name, MUTANTS[name].file.encode()).files:
        lines = lines_of(SHIPPED.sources[diff.path])
        assert diff.changes
        for change in diff.changes:
            n = len(change.old)
            places = [i for i in range(len(lines)) if tuple(lines[i : i + n]) == change.old]
            assert n
            assert len(places) == 1, (diff.path, change.number, places)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATCHED)
def test_git_applies_it(name: str) -> None:
    file = TOP / "emulator/policy/mutants" / f"{name}.patch"
    arguments = ["git", "apply", "--check", "--unsafe-paths", f"--directory={TOP}", str(file)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd="/", timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", PATCHED)
def test_its_code_can_be_imported_and_is_gone_afterwards(name: str) -> None:
    shipped = dict(load_shipped())
    patch = MUTANTS[name].patch
    assert patch is not None
    with preset(f"mutant:{name}").confined():
        patched = dict(load_shipped())
        assert not any(patched[module] is shipped.get(module) for module in patched)
    assert load_shipped() == shipped
    assert patch.sources


def test_kvms_code_has_no_mutants() -> None:
    assert len(SHIPPED.sources) > 30
    assert [
        path for path, text in SHIPPED.sources.items() if re.search(r"\bbugs\b|\b[Mm]utants?\b", text)
    ] == []


def test_the_catalogue_has_all_files() -> None:
    files = {file.stem for file in (TOP / "emulator/policy/mutants").glob("*.patch")}
    assert files == set(MUTANTS)
    assert len(files) >= 49
    points = {point.name: point for point in POINTS}
    for mutant in MUTANTS.values():
        assert mutant.base in PRESETS
        assert all(answer in points[point].names() for point, answer in mutant.settings.items())


# --- files that are wrong -----------------------------------------------------------------------------------

HEADER = "Alias: X1\nSource: nowhere\nFlushlab-Base: linux-7.3\nExpected: none\n"
BODY = "\nIt flushes twice.\n\n"
DIFF = """diff --git a/emulator/kvm/smm.py b/emulator/kvm/smm.py
--- a/emulator/kvm/smm.py
+++ b/emulator/kvm/smm.py
@@ -1,1 +1,2 @@
 not a line of that file
+and another
"""


def test_a_file_is_read() -> None:
    mutant = read_mutant("two-flushes", HEADER + "Answers: migration=none, zap=rcu-proxy\n" + BODY)
    assert (mutant.id, mutant.doc, mutant.cost_only) == ("X1", "It flushes twice.", True)
    assert mutant.settings == {"migration": "none", "zap": "rcu-proxy"}
    assert mutant.patch is None
    assert not mutant.store_buffers
    mutant = read_mutant("two-flushes", HEADER + "Store-Buffers: yes\n" + BODY + DIFF)
    assert mutant.patch is not None
    assert mutant.store_buffers


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (HEADER.replace("Alias: X1\n", "") + BODY + DIFF, "mutant:m: has no Alias; expected Alias, Source, "),
        (HEADER.replace("Source: nowhere\n", "") + BODY + DIFF, "mutant:m: has no Source; expected"),
        (HEADER.replace("Expected: none\n", "") + BODY + DIFF, "mutant:m: has no Expected; expected"),
        (HEADER.replace("Flushlab-Base: linux-7.3\n", "") + BODY + DIFF, "mutant:m: has no Flushlab-Base; "),
        (HEADER.replace("X1", "x-1") + BODY + DIFF, "mutant:m: Alias: found 'x-1'; expected a short name"),
        (HEADER + "Aliases: X2\n" + BODY, "mutant:m: line 5: found 'Aliases'; expected one of Alias, "),
        (HEADER + "Alias: X2\n" + BODY, "mutant:m: line 5: Alias is given twice; expected one value"),
        (HEADER + "Answers:\n" + BODY, "mutant:m: line 5: Answers is empty; expected one value"),
        (HEADER + "Answers: migration\n" + BODY, "mutant:m: Answers: found 'migration'; expected point="),
        (HEADER + "Store-Buffers: no\n" + BODY + DIFF, "mutant:m: Store-Buffers: found 'no'; expected yes"),
        (HEADER + "\n\n" + DIFF, "mutant:m: has no description; expected one below the keys"),
        (HEADER + BODY, "mutant:m: changes nothing; expected a diff, or Answers"),
    ],
)
def test_a_file_that_is_incomplete_is_refused(text: str, error: str) -> None:
    with pytest.raises(BadInput) as refused:
        read_mutant("m", text)
    assert str(refused.value).startswith(error)


def test_a_patch_that_has_gone_stale_fails_with_the_name_of_the_mutant() -> None:
    mutant = read_mutant("two-flushes", HEADER + BODY + DIFF)
    with pytest.raises(PatchError) as stale, mutant.policy(PRESETS[mutant.base]).confined():
        pass
    assert str(stale.value).startswith("mutant:two-flushes: hunk 1 of emulator/kvm/smm.py: line 1 is ")


# --- as a base ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_users_policy_may_have_one_as_its_base(tmp_path: Path) -> None:
    """Its file is executed once more when the mutant's code is live, so what it imports is that code."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from emulator.kvm.structs import Kvm\nfrom emulator.policy import Policy\n\nclass Mine(Policy):\n"
        '    base = "mutant:iterator-skips-spte"\n\n    def remote_kick(self, cpu, kvm):\n'
        "        assert isinstance(kvm, Kvm)\n        return super().remote_kick(cpu, kvm)\n"
    )
    policy = load_user_policy(path)
    assert policy.mutants() == ("iterator-skips-spte",)
    found = explore_verdict(load_test("zap-yield-restart"), policy, Plan(executions=300))
    alone = explore_verdict(
        load_test("zap-yield-restart"), named_policy("mutant:iterator-skips-spte"), Plan(executions=300)
    )
    assert found.verdict == alone.verdict == "violations"
    assert (
        explore_verdict(
            load_test("zap-yield-restart"), named_policy("linux-7.3"), Plan(executions=300)
        ).verdict
        != "violations"
    )


# --- flushlab show ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_show(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    mutant = MUTANTS[name]
    assert main(["show", f"mutant:{mutant.id}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"mutant:{name} ({mutant.id})\n")
    assert max(map(len, out.splitlines())) <= 80
    changed = [line for line in out.splitlines() if line.startswith(("+", "-"))]
    assert bool(changed) == (mutant.patch is not None)
    for answer in mutant.settings.values():
        assert f"={answer}" in out


def test_show_names_the_kernels_function(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "mutant:iterator-skips-spte"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "emulator/kvm/mmu/tdp_iter.py: tdp_mmu_iter_cond_resched() of arch/x86/kvm/mmu/tdp_mmu.c" in words
    assert "+ it.chunk.next_gfn += 1" in words


def test_show_refuses_what_is_no_mutant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "linux-7.3"]) == 2
    assert capsys.readouterr().err.startswith(
        "flushlab: MUTANT: unknown mutant 'linux-7.3'; expected one of "
    )
