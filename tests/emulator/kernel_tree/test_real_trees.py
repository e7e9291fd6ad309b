"""The TDP MMU of real kernels beside the model: no difference, and every one-line bug is found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.kernel_tree.build import build
from emulator.kernel_tree.execute import execute, policy_for
from emulator.kernel_tree.report import as_text
from tests.emulator.kernel_tree.bugs import BUGS, apply, copied
from tests.emulator.kernel_tree.trees import found_trees

pytestmark = [pytest.mark.stress, pytest.mark.timeout(900)]

# A minute of processor time in all; FLUSHLAB_TREE_OPERATIONS asks for more.
OPERATIONS = int(os.environ.get("FLUSHLAB_TREE_OPERATIONS", "6000"))
BUG_OPERATIONS = 7200
# Bugs that are tried without FLUSHLAB_TREE_OPERATIONS.
FEW = 3


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return found_trees(tmp_path_factory)


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def test_the_model_does_as_the_trees_do(trees: list[Path]) -> None:
    for top in trees:
        tree = build(top)
        assert build(top).cached
        policy = policy_for(tree.version)
        result = execute(tree, policy, OPERATIONS, 0)
        # Another CPU clears dirty flags in the other address space meanwhile.
        result.differences += execute(tree, policy, 60, 1792).differences
        texts = [as_text(at, one, policy, tree.version, top) for at, one in enumerate(result.differences, 1)]
        assert result.clean, "\n".join([result.died, result.said, *texts])
        assert result.counts["operations"] >= OPERATIONS
        assert (
            min(result.counts[key] for key in ("flushes", "yields", "inside", "tables")) > OPERATIONS // 100
        )


def test_one_line_bugs_are_found(trees: list[Path], tmp_path: Path) -> None:
    original = trees[-1]
    tree = copied(original, tmp_path / "tree")
    tried = 0
    for bug in BUGS:
        if not apply(bug, original, tree):
            continue
        result = execute(build(tree), policy_for(build(tree).version), BUG_OPERATIONS, 0)
        assert not result.clean, bug.name
        tried += 1
        if tried == FEW and "FLUSHLAB_TREE_OPERATIONS" not in os.environ:
            break
    assert tried >= FEW


def test_the_command(trees: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drift", str(trees[-1]), "--run", "--operations", "120"]) == 0
    assert "no difference" in capsys.readouterr().out
