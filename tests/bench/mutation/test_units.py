"""Mutants as units: the same records in processes, after a stop, and on a cluster, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.mutation.__main__ import main
from bench.mutation.generate import mutants
from bench.mutation.judge import CAUGHT
from bench.mutation.run import prepare
from bench.mutation.suite import Known, Pair, Shown, fingerprint
from bench.mutation.units import Unit, judged, judgement_of
from emulator.policy import DEFAULT
from emulator.sweep.store import Store, as_line, merged, write_store

pytestmark = pytest.mark.stress

_MUTANTS = 2


def units() -> list[Unit]:
    chosen = [one for one in mutants() if one.function == "kvm_tdp_mmu_unmap_gfn_range"][:_MUTANTS]
    assert len(chosen) == _MUTANTS
    sources = fingerprint()
    return [
        Unit(mutant=one, depth="brief", sources=sources, number=number) for number, one in enumerate(chosen)
    ]


def lines(path: Path) -> list[str]:
    return [as_line(record) for record in merged([path])]


def test_processes_and_a_cluster_make_the_same_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare()
    work = units()
    # One pair that reaches all statements of the mutants, as if the suite had been learned.
    pair = Pair("return-zap", DEFAULT)
    reached = frozenset((unit.mutant.module, n) for unit in work for n in unit.mutant.statements)
    known = [Known(pair, Shown("safe", (), 10), {}, reached)]
    # The first run ends after one unit, as if it had been killed; the second goes on from its store.
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    with Store(alone) as store:
        first = list(judged(work[:1], store, known, 1))
    with Store(alone) as store:
        again = list(judged(work, store, known, 2))
    assert again[0] == first[0]
    with Store(shared) as store:
        assert len(list(judged(work[:1], store, known, 1, cluster="local"))) == 1
    assert lines(shared) == lines(alone)[:1]
    assert len(lines(alone)) == _MUTANTS
    # Shards that were joined are the whole.
    for number, record in enumerate(again):
        write_store("", tmp_path / str(number), [record])
    joined = tmp_path / "joined"
    assert main(["--merge", str(tmp_path / "1"), str(tmp_path / "0"), "--store", str(joined)]) == 0
    assert joined.read_text() == "".join(f"{line}\n" for line in lines(alone))
    assert "all rules" in capsys.readouterr().out
    assert CAUGHT in {judgement_of(record).verdict for record in again}
