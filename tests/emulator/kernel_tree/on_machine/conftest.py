"""A real kernel's tree, and a copy of it for patches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emulator.kernel_tree.on_machine import child
from tests.emulator.kernel_tree.bugs import copied
from tests.emulator.kernel_tree.trees import found_trees


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    return found_trees(tmp_path_factory)[0]


@pytest.fixture(scope="module")
def copy(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tree, tmp_path_factory.mktemp("copy") / "linux")


@pytest.fixture
def _soon_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation counts as endless sooner than for users, so that tests of such ones are short."""
    monkeypatch.setattr(child, "ENDLESS_SECONDS", 3.0)
