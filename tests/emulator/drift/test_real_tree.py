"""A kernel's real source, where there is one: Debian's linux-source packages, or FLUSHLAB_LINUX_TREE."""

from __future__ import annotations

import json
import os
import tarfile
import time
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.drift.citations import cited
from emulator.drift.record import shipped_record
from emulator.drift.tree import PARTS, read_tree

pytestmark = [pytest.mark.stress, pytest.mark.timeout(600)]


def unpacked(archive: Path, to: Path) -> Path:
    """The parts of an archive that are read."""
    with tarfile.open(archive) as source:
        for member in source:
            top, _, path = member.name.partition("/")
            if path == "Makefile" or path.startswith(tuple(f"{directory}/" for directory, _, _ in PARTS)):
                source.extract(member, to, filter="data")
    return to / top


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    named = [Path(word) for word in os.environ.get("FLUSHLAB_LINUX_TREE", "").split(os.pathsep) if word]
    archives = sorted(Path("/usr/src").glob("linux-source-*.tar.xz"))[-1:] if not named else []
    if not named and not archives:
        pytest.skip("no Linux source: apt-get install linux-source, or name a tree in FLUSHLAB_LINUX_TREE")
    return [*named, *(unpacked(one, tmp_path_factory.mktemp("linux")) for one in archives)]


def test_a_real_tree(trees: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    record = shipped_record()
    for path in trees:
        began = time.process_time()
        tree = read_tree(path)
        assert time.process_time() - began < 30
        assert len(tree.functions) > 2000
        status = main(["drift", str(path), "--json"])
        document = json.loads(capsys.readouterr().out)
        assert status == int(document["counts"]["same"] < len(document["functions"]))
        assert len(document["functions"]) > 150
        if tree.version == record.modelled:
            assert not document["found_nowhere"]
        if tree.version in record.versions:
            recorded = {name for name in cited() if record.fingerprints(name, tree.version)}
            for name in recorded:
                assert tree.fingerprints(name) == record.fingerprints(name, tree.version), name
