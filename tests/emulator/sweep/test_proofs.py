"""`litmus --explore` with a store: proofs that a kill loses none of, in shards that merge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emulator.cli.main import main
from emulator.explore.results.suite import explore_all
from emulator.litmus.loader import load_tests
from emulator.litmus.verdict import Outcome
from emulator.sweep import proofs
from emulator.sweep.proofs import Proof, outcome_of
from emulator.sweep.store import as_line, read_store

Captured = pytest.CaptureFixture[str]
_LINE = [
    "litmus",
    "return-zap",
    "kick-waits",
    "--explore",
    "--jobs",
    "1",
    "--seconds",
    "0",
    "--iterations",
    "20",
]
_POLICIES = ["--policy", "linux-7.3", "--policy", "linux-6.1"]


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The searches that were made, each test under a policy."""
    found: list[tuple[str, str]] = []

    def counted(plan: Any, *rest: Any) -> Iterator[Outcome]:
        for outcome in explore_all(plan, *rest):
            found.append((outcome.test, outcome.policy))
            yield outcome

    monkeypatch.setattr(proofs, "explore_all", counted)
    return found


def document(capsys: Captured, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.slow
def test_a_proof_that_is_there_is_not_repeated(
    tmp_path: Path, searched: list[tuple[str, str]], capsys: Captured
) -> None:
    store = tmp_path / "proofs.jsonl"
    line = [*_LINE, *_POLICIES, "--store", str(store)]
    first = document(capsys, *line)
    assert len(searched) == 4
    assert document(capsys, *line) == first
    assert len(searched) == 4
    # A process that is killed while it writes leaves a line without its end.
    lines = store.read_text().splitlines(keepends=True)
    store.write_text("".join(lines[:2]) + lines[2][:40])
    assert document(capsys, *line) == first
    assert len(searched) == 6
    # The same as without a store.
    assert document(capsys, *_LINE, *_POLICIES)["outcomes"] == first["outcomes"]


@pytest.mark.slow
def test_three_shards_are_the_whole(tmp_path: Path, capsys: Captured) -> None:
    whole = document(capsys, *_LINE, *_POLICIES)
    stores = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for i, store in enumerate(stores, start=1):
        document(capsys, *_LINE, *_POLICIES, "--store", str(store), "--shard", f"{i}/3")
    assert [len(read_store(store)) for store in stores] == [2, 1, 1]
    merged = tmp_path / "all.jsonl"
    found = document(capsys, "merge", *map(str, reversed(stores)), "--output", str(merged))
    assert found["outcomes"] == whole["outcomes"]
    assert main(["merge", str(merged)]) == 0
    text = capsys.readouterr().out
    assert "return-zap" in text
    assert "kick-waits" in text


@pytest.mark.slow
def test_a_cluster_makes_the_same_proofs(tmp_path: Path, capsys: Captured) -> None:
    stores = tmp_path / "here.jsonl", tmp_path / "cluster.jsonl"
    here = document(capsys, *_LINE, *_POLICIES, "--store", str(stores[0]))
    there = document(capsys, *_LINE, *_POLICIES, "--store", str(stores[1]), "--cluster", "local")
    assert there == here
    # The stores' lines are the same, too, but for the time that each search took.
    lines = [
        sorted(as_line(record | {"wall_seconds": 0}) for record in read_store(store).values())
        for store in stores
    ]
    assert len(lines[0]) == 4
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_other_limits_are_other_units(
    tmp_path: Path, searched: list[tuple[str, str]], capsys: Captured
) -> None:
    line = ["litmus", "kick-waits", "--explore", "--jobs", "1", "--policy", "linux-7.3", "--store"]
    for store, more in (("a", "10"), ("a", "20"), ("b", "20")):
        document(capsys, *line, str(tmp_path / store), "--iterations", more)
    assert len(searched) == 3
    assert len(read_store(tmp_path / "a")) == 2
    assert main(["merge", str(tmp_path / "a")]) == 2
    assert "STORES: found proofs with other limits or seeds" in capsys.readouterr().err


def test_a_record_holds_the_outcome() -> None:
    (test,) = load_tests(["return-zap"])
    unit = Proof(test=test, policy="linux-7.3", executions=9, seconds=1.0, seed=3, number=4)
    outcome = Outcome(
        "return-zap", "linux-7.3", 9, 1, {"use-after-free": 1}, {"averted": 2}, 5, "why", "bounded", 2,
        ("a",), ("b",),
    )  # fmt: skip
    record = json.loads(json.dumps(unit.record(outcome, 0.5)))
    assert outcome_of(record) == outcome
    assert record["verdict"] == "failed"
    assert record["key"] == unit.key


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (["litmus", "--store", "x"], "--store"),
        (["litmus", "--shard", "1/2"], "--shard"),
        (["litmus", "--cluster", "local"], "--cluster"),
        (["litmus", "return-zap", "--explore", "--shard", "3/2"], "--shard: found '3/2'"),
    ],
)
def test_bad_input_is_one_line(line: list[str], found: str, capsys: Captured) -> None:
    assert main(line) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert found in said
