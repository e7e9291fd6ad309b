"""The list of pairs that caught mutants before: it names what exists, and these pairs are tried first."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from bench.mutation import judge, patched, results
from bench.mutation.__main__ import main
from bench.mutation.catching import FILE, Catch, catching, recorded
from bench.mutation.generate import mutants
from bench.mutation.judge import CAUGHT, COUNTS, QUICK, SURVIVED, THIS_ONE, Judgement
from bench.mutation.results import Results
from bench.mutation.suite import OTHER, Known, Pair, Shown, pairs

pytestmark = pytest.mark.slow

UNMAP, LOG = Pair("away-zap"), Pair("log-get", "linux-5.14")


def test_the_list_names_mutants_and_pairs_that_exist() -> None:
    """--record drops what is gone."""
    listed = catching()
    assert len(listed) > 200
    assert not listed.keys() - {one.name for one in mutants()}, "no such mutants"
    assert not {catch.pair for catch in listed.values()} - set(map(str, pairs())), "no such pairs"


def test_recording_changes_what_was_judged_only() -> None:
    a, b, c, d = mutants()[:4]
    before = {a.name: Catch("leak", "t1"), b.name: Catch("leak", "t2"), "drop@gone#1": Catch("leak", "t3")}
    judged = [
        (b, Judgement(b.name, SURVIVED)),
        (c, Judgement(c.name, CAUGHT, "explore", str(LOG), "lost-dirty")),
        (d, Judgement(d.name, CAUGHT, "stress", "t4 on real threads", "deadlock")),
    ]
    text = recorded(before, judged, [one.name for one in mutants()])
    wanted = [(a.name, "leak t1"), (c.name, "lost-dirty log-get under linux-5.14")]
    assert text.splitlines()[4:] == [f'"{name}" = "{catch}"' for name, catch in sorted(wanted)]


def test_the_list_is_as_it_is_written() -> None:
    assert recorded(catching(), [], [one.name for one in mutants()]) == FILE.read_text()


def test_the_listed_pair_comes_first_whatever_its_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    one = mutants()[0]
    lines = frozenset((one.module, line) for line in one.statements)
    shown = Shown("safe", (), 500)
    known = [Known(pair, shown, {}, lines) for pair in (UNMAP, LOG)]
    monkeypatch.setattr(results, "catching", lambda: {one.name: Catch("lost-dirty", str(LOG))})
    telling = Results(None, "").telling(one)
    assert telling[str(LOG)] >= THIS_ONE
    found = judge.reaches(one, known, telling)
    assert [entry.pair for entry in found] == [LOG, UNMAP]
    first = next(judge.looks(found, QUICK, found[:1]))
    assert (first.known.pair, first.executions) == (LOG, OTHER)


@pytest.mark.parametrize("kind", [COUNTS, "leak"])
def test_counts_tell_at_once_if_they_did_before(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = replace(mutants()[0], rule="drop-flush")
    lines = frozenset((one.module, line) for line in one.statements)
    known = [Known(pair, Shown("safe", (), 500), {"flushes": 1}, lines) for pair in (UNMAP, LOG)]
    monkeypatch.setattr(results, "catching", lambda: {one.name: Catch(kind, str(UNMAP))})
    found = Results(None, "")
    asked: Counter[str] = Counter()

    def counts(pair: Pair) -> dict[str, int]:
        asked[str(pair)] += 1
        return {"flushes": 0}

    def explored(*_: Any) -> tuple[Shown, None]:
        return Shown("safe", (), 1), None

    monkeypatch.setattr(judge, "counts", counts)
    monkeypatch.setattr(judge, "_explored", explored)
    monkeypatch.setattr(patched, "apply", lambda *_: None)
    looks: list[str] = []
    verdict = judge.judge(
        one, known, looks.append, QUICK, None, found.telling(one), counts_tell=found.counts_tell(one)
    )
    assert (verdict.kind, verdict.pair, asked) == (COUNTS, str(UNMAP), {str(UNMAP): 1})
    assert (len(looks) == 1) == (kind == COUNTS)


def test_listed_mutants_alone_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--listed", "--list"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == catching().keys()
