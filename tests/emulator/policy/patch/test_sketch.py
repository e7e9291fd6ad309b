"""The sketch of August 2025 as the patch in the guide, and as the preset: two spellings of one idea."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.guide import page
from tests.emulator.policy.patch.edits import written

PRESET = "lkml-2025-cpu-flushed-mask"
BLOCK = r"^```diff sketch\.patch(?: \(continued\))?\n(.*?)^```$"
SKETCH = "".join(re.findall(BLOCK, page("porting"), re.MULTILINE | re.DOTALL))
# Those that refute it, and some that it passes.
REFUTE = ("return-zap", "bounce-zap", "guest-invlpg-away", "return-protect")
TESTS = (*REFUTE, "remote-levels", "entry-races-request")


@pytest.mark.slow
def test_verdicts_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, SKETCH, "sketch.patch")
    assert main(["explore", *TESTS, "--policy", path, "--policy", PRESET, "--json"]) == 1
    found: dict[str, dict[str, tuple[str, list[str], bool]]] = {path: {}, PRESET: {}}
    for one in json.loads(capsys.readouterr().out)["explored"]:
        assert "unordered" not in one
        assert "unwatched" not in one
        found[one["policy"]][one["test"]] = (one["verdict"], one["violations"], one["complete"])
    assert found[path] == found[PRESET]
    assert {test for test in TESTS if found[path][test][0] == "violations"} == set(REFUTE)
