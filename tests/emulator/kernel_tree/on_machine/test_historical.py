"""Historical bugs, as patches to a tree's own code: explore finds each, and names the kernel's function."""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.drift.tree import tree_version
from emulator.kernel_tree.build import MMU
from tests.emulator.kernel_tree.bugs import changed, copied
from tests.emulator.kernel_tree.historical import HISTORICAL, VERSION, Historical
from tests.emulator.kernel_tree.trees import found_trees

pytestmark = [pytest.mark.stress, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    trees = [top for top in found_trees(tmp_path_factory) if tree_version(top).startswith(VERSION)]
    if not trees:
        pytest.skip(f"the patches are for Linux {VERSION}: name a tree of it in FLUSHLAB_LINUX_TREE")
    return trees[0]


def patch_of(one: Historical, tree: Path) -> str:
    """Return the bug as a unified diff."""
    path = f"{MMU}/{one.bug.file}"
    before = (tree / path).read_text()
    after = changed(one.bug, before)
    assert after is not None
    assert after != before
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    return "".join(difflib.unified_diff(old, new, f"a/{path}", f"b/{path}"))


@pytest.mark.parametrize("one", HISTORICAL, ids=lambda one: one.bug.name)
def test_a_patch_is_refuted(
    one: Historical, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = copied(tree, tmp_path / "linux")
    applied = ["patch", "-p1", "--silent", "--directory", str(top)]
    subprocess.run(applied, input=patch_of(one, tree), text=True, check=True, timeout=60)
    # Large tests are sampled, and a seed can have bad luck.
    bound = ["--executions", str(one.executions), "--seed", "1"]
    assert main(["explore", one.test, "--kernel", str(top), "--jobs", "1", "--json", *bound]) == 1
    (found,) = json.loads(capsys.readouterr().out)["explored"]
    if one.kinds:
        assert one.kinds & set(found["violations"])
        story = "\n".join(found["counterexample"]["violation"].get("tree", ()))
    else:
        story = found["failure"]
    if one.function:
        named = rf"{one.function}\(\) {MMU}/tdp_mmu.c:\d+|{MMU}/tdp_mmu.c:\d+ in {one.function}\(\)"
        assert re.search(named, story), story


def test_twelve_bugs_of_the_past_are_told_by_commit_function_and_line() -> None:
    told = [one for one in HISTORICAL if re.search(r"\([0-9a-f]{12}\)$", one.bug.name) and one.function]
    assert len(told) >= 12
