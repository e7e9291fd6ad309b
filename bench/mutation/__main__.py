"""python -m bench.mutation: the mutants of emulator/kvm, listed, shown, or judged."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.mutation.catching import catching, record
from bench.mutation.generate import PARTS, Mutant, mutants, part_of, sample
from bench.mutation.judge import EQUIVALENT, THOROUGH, Judgement
from bench.mutation.report import table
from bench.mutation.results import Results
from bench.mutation.run import Say, Stop, equivalent, judge_all, learn, prepare
from bench.mutation.suite import FIRST, Known, Pair, fingerprint, pairs, quick_pairs
from bench.mutation.units import DEPTHS, Unit, judged, judgement_of
from emulator.errors import BadInput
from emulator.policy import DEFAULT
from emulator.sweep.grid import shard
from emulator.sweep.store import Store, merged, write_store


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = _parse(arguments)
        chosen = _chosen(options)
        if options.list:
            for one in chosen:
                print(f"{one.name:<60} {one.mark}  {one.path}:{one.line}")
            return 0
        if options.show:
            for one in chosen:
                print(f"# {one.name}\n{one.diff}")
            return 0
        return _merge(options) if options.merge else _judge(chosen, options)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0


def _judge(chosen: Sequence[Mutant], options: argparse.Namespace) -> int:
    started = time.monotonic()

    def stop() -> bool:
        return bool(options.seconds) and time.monotonic() - started > options.seconds

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", file=sys.stderr, flush=True)

    prepare()
    depth = DEPTHS[_depth(options)]
    results = Results(Path(options.keep) if options.keep else None, fingerprint(), _others(options))
    wanted = _wanted(chosen, options)
    executions = 0 if depth is THOROUGH else FIRST
    all_known = learn(results, wanted, options.jobs, say, stop, executions)
    found = []
    if len(results.known) < len(wanted):
        pass  # the time was over before
    elif options.store or options.cluster:
        found = _judge_units(chosen, options, all_known, say, stop)
    else:
        argued: dict[str, str] | None = {} if options.doubt else None
        found = judge_all(results, chosen, all_known, options.jobs, say, stop, depth, argued)
        if options.record:
            record(found)
    generated = [one for one in mutants() if options.part in (None, part_of(one))]
    print(table(found, len(chosen), len(generated)))
    return 0


def _merge(options: argparse.Namespace) -> int:
    """Join stores of shards, and print the table of all their mutants."""
    records = merged(map(Path, options.merge))
    by_name = {one.name: one for one in mutants()}
    if not all("judgement" in one and one["scenario"] in by_name for one in records):
        raise BadInput("--merge", "found a unit that is no mutant of these sources", "stores of --store")
    if options.store:
        write_store("--store", Path(options.store), records)
    found = [(by_name[one["scenario"]], judgement_of(one)) for one in records]
    print(table(found, len(found), len(by_name)))
    return 0


def _depth(options: argparse.Namespace) -> str:
    return next((name for name in DEPTHS if getattr(options, name, False)), "thorough")


def _judge_units(
    chosen: Sequence[Mutant], options: argparse.Namespace, known: Sequence[Known], say: Say, stop: Stop
) -> list[tuple[Mutant, Judgement]]:
    """Judge the mutants as units of a sweep's store, in processes or on a cluster."""
    place = {one.name: number for number, one in enumerate(_asked(options))}
    argued = {} if options.doubt else equivalent()
    sources, depth = fingerprint(), _depth(options)
    units = [
        Unit(mutant=one, depth=depth, sources=sources, number=place[one.name])
        for one in chosen
        if one.name not in argued
    ]
    found = {name: Judgement(name, EQUIVALENT, why=why) for name, why in argued.items()}
    with Store(Path(options.store) if options.store else None) as store:
        for record_ in judged(units, store, known, options.jobs, cluster=options.cluster, stop=stop):
            judgement = judgement_of(record_)
            found[judgement.name] = judgement
            say(f"{judgement.name}: {judgement.verdict} {judgement.pair}")
    return [(one, found[one.name]) for one in chosen if one.name in found]


def _wanted(chosen: Sequence[Mutant], options: argparse.Namespace) -> list[Pair]:
    """Return the pairs to judge by; of other presets, those that caught one of the mutants before."""
    if not options.quick and not options.brief:
        return list(pairs())
    caught = {catching()[one.name].pair for one in chosen if one.name in catching()}
    return quick_pairs() + [one for one in pairs() if one.preset != DEFAULT and str(one) in caught]


def _others(options: argparse.Namespace) -> list[Path]:
    found = [Path(name) for name in options.also or ()]
    for path in found:
        if not path.is_file():
            raise BadInput("--also", f"no file {path}", "a file of --keep")
    return found


def _chosen(options: argparse.Namespace) -> list[Mutant]:
    """Return the mutants that the options ask for, and of these the shard."""
    return shard(_asked(options), options.shard)


def _asked(options: argparse.Namespace) -> list[Mutant]:
    found = list(mutants())
    if options.names:
        by_name = {one.name: one for one in found}
        unknown = [name for name in options.names if name not in by_name]
        if unknown:
            raise BadInput("bench.mutation", f"no mutant {unknown[0]!r}", "names that --list prints")
        return [by_name[name] for name in options.names]
    found = [one for one in found if not options.rule or one.rule in options.rule]
    found = [one for one in found if options.part in (None, part_of(one))]
    if options.listed:
        found = [one for one in found if one.name in catching()]
    if options.doubt:
        found = [one for one in found if one.name in equivalent()]
    return sample(found, options.sample, options.seed) if options.sample else found


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.mutation", description="Mutants of emulator/kvm.")
    parser.add_argument("names", nargs="*", metavar="RULE@FUNCTION#N", help="only these mutants")
    parser.add_argument("--rule", action="append", help="only mutants of this rule; repeatable")
    parser.add_argument("--part", choices=PARTS, help="only mutants of one MMU: of code with or without EPT")
    parser.add_argument(
        "--doubt", action="store_true", help="judge the mutants of equivalent.toml as if nothing were argued"
    )
    parser.add_argument("--listed", action="store_true", help="only mutants that catching.toml lists")
    parser.add_argument("--sample", type=int, metavar="N", help="a sample of N mutants")
    parser.add_argument("--seed", type=int, default=1, help="of the sample")
    parser.add_argument("--list", action="store_true", help="print names and places")
    parser.add_argument("--show", action="store_true", help="print the diffs")
    parser.add_argument(
        "--quick", action="store_true", help="explored under the default preset only, with fewer executions"
    )
    parser.add_argument("--brief", action="store_true", help="as --quick, without long looks: a lower bound")
    parser.add_argument(
        "--fair", action="store_true", help="long looks at fewer tests than a thorough judgement has"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes")
    parser.add_argument("--keep", metavar="FILE", help="read and append results, one JSON line each")
    parser.add_argument("--store", metavar="FILE", help="judge each mutant as a unit of a sweep's store")
    parser.add_argument("--merge", metavar="FILE", nargs="+", help="join stores, into --store if it is given")
    parser.add_argument("--cluster", metavar="ADDRESS", help="of a scheduler of dask.distributed; or local")
    parser.add_argument("--shard", metavar="I/N", help="judge the I-th of N parts only")
    parser.add_argument(
        "--also", action="append", metavar="FILE", help="read what another shard kept, too; repeatable"
    )
    parser.add_argument("--record", action="store_true", help="note in catching.toml which pairs caught")
    parser.add_argument("--seconds", type=float, default=0.0, help="begin no mutant after so long")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
