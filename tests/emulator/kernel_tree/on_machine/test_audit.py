"""The audit of the search on a tree's code: it tells plain accesses that no step covers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emulator.cli.main import main
from emulator.kernel_tree.build import MMU
from tests.emulator.kernel_tree.bugs import PLAIN, apply

pytestmark = [pytest.mark.stress, pytest.mark.timeout(600)]


def audited(top: Path, *tests: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    status = main(["explore", *tests, "--kernel", str(top), "--audit", "--executions", "8", "--json"])
    return status, json.loads(capsys.readouterr().out)["audited"]


def test_steps_cover_the_accesses_of_a_tree(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tests = ("remote-two-vcpus", "fault-races-two", "zap-put-root", "huge-split")
    status, found = audited(tree, *tests, capsys=capsys)
    assert [(one["test"], one["plain"], one["shared"], one["failed"]) for one in found] == [
        (test, {}, {}, {}) for test in tests
    ]
    assert status == 0
    assert all(one["swaps"] for one in found)


def test_a_plain_access_is_told(tree: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(PLAIN, tree, copy)
    status, (found,) = audited(copy, "fault-races-two", capsys=capsys)
    assert status == 1
    sentences = list(found["plain"])
    assert sentences
    number = next(
        number
        for number, line in enumerate((copy / MMU / "tdp_mmu.c").read_text().splitlines(), 1)
        if "faults++" in line
    )
    assert all(f"plain write in kvm_tdp_mmu_map() {MMU}/tdp_mmu.c:{number}" in one for one in sentences)


def test_a_warning_fails_the_audit(tree: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(PLAIN, tree, copy)
    file = copy / MMU / "tdp_mmu.c"
    file.write_text(file.read_text().replace("faults++;", "WARN_ON_ONCE(faults++);", 1))
    _, (found,) = audited(copy, "fault-races-two", capsys=capsys)
    assert any(line.startswith(f"WARN at {MMU}/tdp_mmu.c:") for line in found["failed"])
