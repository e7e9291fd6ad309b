"""Judging mutants: each verdict once, hangs included, and results that are kept."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench.mutation import judge, run, suite
from bench.mutation.__main__ import main
from bench.mutation.counts import PRICES
from bench.mutation.generate import Mutant, mutants, sample, sources
from bench.mutation.judge import (
    BROKEN,
    CAUGHT,
    COST_ONLY,
    EQUIVALENT,
    SURVIVED,
    UNDECIDED,
    UNREACHED,
    Judgement,
)
from bench.mutation.pool import Lost, each
from bench.mutation.report import interval, kill_rate, table
from bench.mutation.results import Results
from bench.mutation.suite import Budget, Known, Pair, Shown, fingerprint, show

pytestmark = pytest.mark.slow

PAIRS = [Pair("zap-all-notifier"), Pair("notifier-second-zap"), Pair("zap-range-fault")]


def mutant(before: str, after: str, name: str = "made@test#1") -> Mutant:
    """Return a mutant of KVM's code with one text replaced."""
    ((module, (path, text)),) = [(m, found) for m, found in sources().items() if before in found[1]]
    line = text[: text.index(before)].count("\n") + 1
    lines = tuple(range(line, line + before.rstrip("\n").count("\n") + 1))
    changed = text.replace(before, after)
    return Mutant(name, "widen-made", "test", module, path, line, lines, f"{before}{after}", changed)


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("mutation") / "results.jsonl", fingerprint())


@pytest.fixture(scope="module")
def known(results: Results) -> list[Known]:
    run.prepare()
    return run.learn(results, PAIRS, 2, silent)


FLUSH = "            notifier_flush(cpu, kvm, ranges[0][1])\n"


@pytest.mark.parametrize(
    ("before", "after", "verdict", "kind"),
    [
        (FLUSH, "            pass\n", CAUGHT, "use-after-free"),
        (FLUSH, "            while True:\n                pass\n", CAUGHT, "hang"),
        (FLUSH, "            notifier_flesh(cpu)\n", BROKEN, "crash"),
        (FLUSH, FLUSH + FLUSH, COST_ONLY, ""),
        (FLUSH, FLUSH + "            del flush\n", SURVIVED, ""),
        (
            "    kvm_mmu_unload(cpu, vcpu)\n    kvm_init_mmu(vcpu)\n\n\n",
            "    kvm_init_mmu(vcpu)\n\n\n",
            UNREACHED,
            "",
        ),
    ],
)
def test_verdicts(
    before: str,
    after: str,
    verdict: str,
    kind: str,
    known: list[Known],
    results: Results,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "hang":
        monkeypatch.setattr("bench.mutation.pool.BURNED", 2.0)
    one = mutant(before, after)
    ((_, found),) = run.judge_all(results, [one], known, 1, silent)
    assert (found.verdict, found.kind) == (verdict, kind)
    assert (found.pair != "") == (verdict in (CAUGHT, BROKEN))


def test_results_are_kept_for_these_sources_only(known: list[Known], results: Results) -> None:
    one = mutant(FLUSH, "            pass\n")
    assert results.path is not None
    # Already done, unless another process has the tests above.
    run.judge_all(results, [one], known, 1, silent)
    again = Results(results.path, results.fingerprint)
    assert again.known.keys() == set(PAIRS)
    assert {found.pair: found.lines for found in known} == {
        pair: found.lines for pair, found in again.known.items()
    }

    def fail(*_: object) -> Judgement:
        raise AssertionError("judged again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "judge", fail)
        ((_, found),) = run.judge_all(again, [one], known, 1, silent)
    assert found.verdict == CAUGHT
    other = Results(results.path, "other sources")
    assert not other.known
    assert not other.judged


@pytest.mark.parametrize(
    ("rule", "risen", "excused"),
    [
        ("twice-flush", {"flushes": 1}, True),
        ("widen-start", {"exits": 1, "faults": 1}, True),
        ("widen-start", {"faults": 1}, False),  # the guest happened to fault once more
        ("widen-start", {"exits": 1, "kicks": -1}, False),
        ("swap", {"flushes": 3}, False),
        ("first-barrier", {"exits": 2}, False),
        ("drop-request", {"flushes": 1}, False),
        ("narrow-end", {"flushes": 1}, False),
    ],
)
def test_a_price_excuses_what_adds_work(
    rule: str, risen: dict[str, int], excused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict.fromkeys(PRICES, 5)
    after = {name: n + risen.get(name, 0) for name, n in before.items()}
    monkeypatch.setattr(judge, "counts", lambda pair: after)
    one = replace(mutant(FLUSH, FLUSH + FLUSH), rule=rule)
    shown = Shown("safe", (), 1)
    assert bool(judge._cost(one, [Known(PAIRS[0], shown, before)])) == excused


@pytest.mark.parametrize(
    ("executions", "complete", "most", "differs"),
    [
        (200, False, 200, "inconclusive"),
        (3, True, 200, "inconclusive"),
        (150, False, 200, ""),
        (40, False, 40, ""),
    ],
    ids=["whole", "few in all", "cut short by the clock", "a first look"],
)
def test_only_a_whole_look_is_vacuous(executions: int, complete: bool, most: int, differs: str) -> None:
    one = Known(PAIRS[0], Shown("safe", (), 200))
    shown = Shown("inconclusive", (), executions, complete=complete)
    assert judge.differs(one, shown, most) == differs


@pytest.mark.parametrize(
    ("complete", "executions", "first"), [(True, 33, 40), (True, 3, 8), (True, 60, 8), (False, 33, 8)]
)
def test_a_small_proof_is_repeated_whole(complete: bool, executions: int, first: int) -> None:
    """A precondition that is no longer met shows in a whole look only."""
    one = Known(PAIRS[0], Shown("safe", (), executions, complete=complete))
    found = list(judge.looks([one], replace(judge.QUICK, at_once=0)))
    assert found[0].executions == first


@pytest.mark.parametrize(("depth", "kind"), [(100, "endless"), (2500, "")], ids=["short", "long anyway"])
def test_executions_that_do_not_end_are_noticed(depth: int, kind: str) -> None:
    one = Known(PAIRS[0], Shown("safe", (), 200, depth=depth))
    assert judge.differs(one, Shown("safe", (), 200, endless=1), 200) == kind


def test_a_look_that_is_cut_short_decides_nothing(
    known: list[Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "PATIENCE", 0.0)
    one = mutant(FLUSH, FLUSH + "            del flush\n")
    ((_, found),) = run.judge_all(Results(None, ""), [one], known, 1, silent)
    assert found.verdict == UNDECIDED
    assert found.why.startswith("cut short: ")
    assert not found.looked, "the look must be repeated another time"


def test_a_budget_is_used_up_by_runs_or_by_cpu_time() -> None:
    runs, seconds = Budget(2, 60.0), Budget(2, -1.0)
    assert [runs.ended(), runs.ended(), runs.ended()] == [False, False, True]
    assert not runs.cut_short
    assert seconds.ended()
    assert seconds.cut_short


def burn() -> None:
    while True:
        pass


def test_a_look_is_the_same_beside_busy_processes(
    known: list[Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five processes that never rest share one CPU with the look: it takes far longer, by the clock."""
    pair, executions = PAIRS[1], suite.FIRST
    alone = show(pair, executions)
    patience = 2.5 * alone.seconds
    monkeypatch.setattr(suite, "PATIENCE", patience)
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=burn, daemon=True) for _ in range(5)]
    try:
        for other in others:
            other.start()
        begun = time.monotonic()
        beside = show(pair, executions)
        took = time.monotonic() - begun
    finally:
        os.sched_setaffinity(0, cpus)
        for other in others:
            other.kill()
            other.join()
    assert took > patience, "the other processes must have been in the way"
    assert not beside.cut_short
    assert replace(beside, seconds=0.0) == replace(alone, seconds=0.0)


def test_a_child_that_is_not_let_run_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """One child sleeps for ever, which is a hang.  The other is stopped for longer, and goes on."""
    monkeypatch.setattr("bench.mutation.pool.ASLEEP", 0.5)

    def do(number: int, say: Callable[[str], None]) -> int:
        say("before")
        if number:
            threading.Event().wait()
        waker = f"import os, signal, time; time.sleep(4); os.kill({os.getpid()}, signal.SIGCONT)"
        subprocess.Popen([sys.executable, "-c", waker])
        os.kill(os.getpid(), signal.SIGSTOP)
        return 7

    found = dict(each([0, 1], do, 2, lambda: False))
    assert found == {0: 7, 1: Lost("before", "hang")}


def test_arguments_can_be_doubted(known: list[Known], capsys: pytest.CaptureFixture[str]) -> None:
    """A listed mutant is judged like any other: the list may have become wrong since it was argued."""
    assert main(["--doubt", "--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(names) == sorted(run.equivalent())
    one = mutant(FLUSH, "            pass\n", names[0])
    ((_, found),) = run.judge_all(Results(None, ""), [one], known, 1, silent, argued={})
    assert found.verdict == CAUGHT


def test_an_argued_mutant_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    one = mutant(FLUSH, "            pass\n")
    monkeypatch.setattr(run, "equivalent", lambda: {one.name: "because"})
    ((_, found),) = run.judge_all(Results(None, ""), [one], [], 1, silent)
    assert (found.verdict, found.why) == (EQUIVALENT, "because")


def test_lists_name_mutants_that_exist() -> None:
    assert all(text.strip() for text in {**run.equivalent(), **run.survivors()}.values())
    assert not run.equivalent().keys() & run.survivors().keys()
    run.check_listed("list", {"drop@f#1": "1234 because"}, {"drop@f#1": "1234"})
    for marks in ({}, {"drop@f#1": "5678"}):
        with pytest.raises(ValueError, match="list: no such mutant: drop@f#1"):
            run.check_listed("list", {"drop@f#1": "1234 because"}, marks)


def test_the_rate_leaves_out_the_harmless() -> None:
    verdicts = [CAUGHT, CAUGHT, CAUGHT, SURVIVED, UNREACHED, BROKEN, EQUIVALENT, COST_ONLY, UNDECIDED]
    some = sample(mutants(), len(verdicts), 1)
    judged = [(one, Judgement(one.name, verdict)) for one, verdict in zip(some, verdicts, strict=True)]
    assert kill_rate(judged) == (3, 5)
    text = table(judged, 9, 1000)
    assert "kill rate 60.0 % (95 % interval 23.1 to 88.2 %): 3 caught of 5" in text
    assert "; 1 undecided are left out" in text
    assert "kill rate 60.0 %: 3 caught of 5" in table(judged, 9, 9)
    assert f"survived:\n  {some[3].name}" in text


def test_the_interval_narrows_with_the_sample() -> None:
    assert interval(5, 5)[1] == 1.0
    assert interval(0, 5)[0] == 0.0
    (low, high), (lower, higher) = interval(90, 100), interval(9, 10)
    assert lower < low < 0.9 < high < higher


def test_a_child_that_dies_is_noticed() -> None:
    def die(number: int, say: Callable[[str], None]) -> int:
        say("before")
        if number:
            raise SystemExit(3)
        time.sleep(0.01)
        return 7

    found = dict(each([0, 1], die, 2, lambda: False))
    assert found[0] == 7
    assert found[1] == Lost("before", "exit status 3")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.mutation.__main__ import main

    assert main(["--list", "--rule", "no-yield"]) == 0
    listed = capsys.readouterr().out
    assert "no-yield@" in listed
    assert main(["--show", listed.split()[0]]) == 0
    assert "+++ b/emulator/kvm/" in capsys.readouterr().out
    assert main(["--show", "no-such@mutant#1"]) == 2
    assert "no mutant 'no-such@mutant#1'" in capsys.readouterr().err
