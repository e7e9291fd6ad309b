"""A run: the suite with KVM's code as it is, then with each mutant, in processes."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from bench.mutation import patched
from bench.mutation.generate import Mutant, mutants
from bench.mutation.judge import (
    BROKEN,
    CAUGHT,
    EQUIVALENT,
    ON_REAL_THREADS,
    THOROUGH,
    Depth,
    Judgement,
    judge,
)
from bench.mutation.pool import Lost, each
from bench.mutation.results import Results
from bench.mutation.suite import Cover, Known, Pair, known, pairs
from emulator.litmus.verdict import FAILED, VIOLATIONS

Say = Callable[[str], None]
Stop = Callable[[], bool]
# Pairs of one child that records coverage.
_BATCH = 8


def never() -> bool:
    return False


def equivalent() -> dict[str, str]:
    """Return the arguments of equivalent.toml by the mutants' names."""
    return _listed("equivalent.toml")


def survivors() -> dict[str, str]:
    """Return the reasons of survivors.toml by the mutants' names."""
    return _listed("survivors.toml")


@cache
def _listed(file: str) -> dict[str, str]:
    """Return a list's texts by name.  Each begins with the mutant's mark; an entry for a mutant that is
    gone, or has changed, is an error."""
    found: dict[str, str] = tomllib.loads(Path(__file__).with_name(file).read_text("utf-8"))
    check_listed(file, found, {one.name: one.mark for one in mutants()})
    return found


def check_listed(file: str, found: Mapping[str, str], marks: Mapping[str, str]) -> None:
    stale = [name for name, text in found.items() if text.partition(" ")[0] != marks.get(name)]
    if stale:
        raise ValueError(f"{file}: no such mutant: {', '.join(sorted(stale))}")


def learn(
    results: Results,
    wanted: Sequence[Pair],
    jobs: int,
    say: Say,
    stop: Stop = never,
    executions: int = 0,
) -> list[Known]:
    """Return the pairs that show no violation with KVM's code as it is.

    executions: of each pair; 0: as many as its longest look has.
    """
    missing = [pair for pair in wanted if pair not in results.known]
    batches = [missing[i : i + _BATCH] for i in range(0, len(missing), _BATCH)]

    def do(batch: Sequence[Pair], heard: Say) -> list[Known]:
        return _learn(batch, heard, executions)

    for batch, found in each(batches, do, jobs, stop):
        if isinstance(found, Lost):
            raise RuntimeError(f"{found.during}: {found.how} with KVM's code as it is ({batch[0]})")
        for one in found:
            results.add_known(one)
        say(f"{len(results.known)} of {len(wanted)} pairs of the suite")
    found = [results.known[pair] for pair in wanted if pair in results.known]
    return [one for one in found if one.shown.verdict not in (VIOLATIONS, FAILED)]


def _learn(batch: Sequence[Pair], say: Say, executions: int) -> list[Known]:
    cover = Cover()
    found = []
    for pair in batch:
        say(str(pair))
        found.append(known(pair, cover, executions))
    return found


def judge_all(
    results: Results,
    chosen: Sequence[Mutant],
    all_known: Sequence[Known],
    jobs: int,
    say: Say,
    stop: Stop = never,
    depth: Depth = THOROUGH,
    argued: Mapping[str, str] | None = None,
) -> list[tuple[Mutant, Judgement]]:
    """Judge the mutants that the results do not have yet; return all that are judged, in the given order.

    argued: arguments that settle mutants without a look, by name; None: those of equivalent.toml.
    """
    argued = equivalent() if argued is None else argued
    todo = [one for one in chosen if one.name not in argued and not results.stands(one, all_known, depth)]

    def do(mutant: Mutant, heard: Say) -> Judgement:
        before = results.judged.get(mutant.digest)
        telling, counts_tell = results.telling(mutant), results.counts_tell(mutant)
        return judge(mutant, all_known, heard, depth, before, telling, counts_tell)

    for number, (mutant, found) in enumerate(each(todo, do, jobs, stop), 1):
        judgement = of_lost(mutant, found) if isinstance(found, Lost) else found
        results.add(mutant, judgement)
        say(f"{number} of {len(todo)} mutants; {mutant.name}: {judgement.verdict} {judgement.pair}")
    return [
        (one, _argued(one, results, argued))
        for one in chosen
        if one.digest in results.judged or one.name in argued
    ]


def _argued(mutant: Mutant, results: Results, argued: Mapping[str, str]) -> Judgement:
    if mutant.name in argued:
        return Judgement(mutant.name, EQUIVALENT, why=argued[mutant.name])
    return replace(results.judged[mutant.digest])


def of_lost(mutant: Mutant, lost: Lost) -> Judgement:
    """A child that hangs or dies has caught its mutant, if it had begun with a pair."""
    by = "stress" if lost.during.endswith(ON_REAL_THREADS) else "explore"
    verdict = CAUGHT if lost.during else BROKEN
    return Judgement(
        mutant.name, verdict, by, lost.during, "hang" if lost.how == "hang" else "crash", 0, lost.how
    )


def prepare() -> None:
    """Load everything before the first fork."""
    patched.load()
    for pair in pairs():
        pair.litmus  # noqa: B018
