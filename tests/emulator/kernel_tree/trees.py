"""Kernel source trees that the tests find: those that FLUSHLAB_LINUX_TREE names, or Debian's packages."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from emulator.kernel_tree.build import MMU
from tests.emulator.kernel_tree.bugs import PARTS


def unpacked(archive: Path, to: Path) -> Path:
    """Unpack the parts of an archive that are read."""
    with tarfile.open(archive) as source:
        for member in source:
            top, _, path = member.name.partition("/")
            if path == "Makefile" or path.startswith(tuple(f"{part}/" for part in PARTS)):
                source.extract(member, to, filter="data")
    return to / top


def found_trees(factory: pytest.TempPathFactory) -> list[Path]:
    """Return the trees; skip the test if there is none."""
    named = [Path(word) for word in os.environ.get("FLUSHLAB_LINUX_TREE", "").split(os.pathsep) if word]
    named = [path for path in named if (path / MMU / "tdp_mmu.c").is_file() and (path / "include").is_dir()]
    archives = [] if named else sorted(Path("/usr/src").glob("linux-source-*.tar.xz"))
    if not named and not archives:
        pytest.skip("no Linux source: apt-get install linux-source, or name trees in FLUSHLAB_LINUX_TREE")
    return [*named, *(unpacked(one, factory.mktemp("linux")) for one in archives)]
