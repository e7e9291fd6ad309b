"""Shards of the job that judges mutants, and the files that they keep."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.mutation.__main__ import main
from bench.mutation.generate import mutants
from bench.mutation.judge import CAUGHT, Judgement
from bench.mutation.results import Results

pytestmark = pytest.mark.slow

_LIST = ["--list", "--rule", "off-by-one"]


def names(capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    assert main([*_LIST, *more]) == 0
    return [line.split()[0] for line in capsys.readouterr().out.splitlines()]


def test_shards_are_a_partition(capsys: pytest.CaptureFixture[str]) -> None:
    whole = names(capsys)
    parts = [names(capsys, "--shard", f"{i}/3") for i in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == sorted(whole)
    assert all(parts)
    assert main([*_LIST, "--shard", "4/3"]) == 2
    assert "--shard: found '4/3'" in capsys.readouterr().err
    assert main(["--also", "/no/such", "--sample", "1"]) == 2
    assert "--also: no file /no/such" in capsys.readouterr().err


def test_what_other_shards_kept_is_known(tmp_path: Path) -> None:
    first, second = list(mutants())[:2]
    files = [tmp_path / "1", tmp_path / "2"]
    for file, one in zip(files, (first, second), strict=True):
        pair = "return-zap linux-7.3"
        Results(file, "sources").add(one, Judgement(one.name, CAUGHT, pair=pair))
    joined = Results(files[0], "sources", files[1:])
    assert joined.judged.keys() == {first.digest, second.digest}
    assert Results(files[0], "sources").judged.keys() == {first.digest}
