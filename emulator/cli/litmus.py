"""`flushlab litmus`: small programs with known verdicts, on real threads."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from emulator import interrupts
from emulator.cli.completion import policies
from emulator.cli.kernel import OnTree, heading
from emulator.cli.options import FilesArgument, JobsOption, JunitOption, KernelOption, KtapOption, refuse
from emulator.cli.progress import SearchProgress
from emulator.output import check_file, make_directory, saying, write_file
from emulator.report.cases import junit as junit_of
from emulator.report.cases import ktap
from emulator.report.console import output_console

if TYPE_CHECKING:
    from emulator.litmus.model import LitmusTest
    from emulator.litmus.table import Results
    from emulator.litmus.verdict import Outcome
    from emulator.sweep.store import Record

VIOLATIONS_OR_SURPRISES = 1
EXECUTIONS = 40
INTERLEAVINGS = 2000

LITMUS_HELP = (
    "Run litmus tests on real threads and compare the verdicts with those expected.\n\n"
    "A litmus test is a TOML file: a machine, a few vCPU, KVM and host threads with a handful of operations "
    "each, and the verdict that each policy deserves. `flushlab list litmus` names the shipped tests and "
    "where they come from; `flushlab list litmus --ops` explains the file and its operations.\n\n"
    "Verdicts: safe (no violation, although the danger occurred), violations (by kind), inconclusive (no "
    "violation, but no danger either). The exit status is 1 if a verdict differs from the one that the test "
    "expects of a preset or of a policy that it names. Under other policies, such as your own, it is 1 if "
    "there are violations. Ctrl-C, SIGTERM and SIGHUP end the run; the verdicts reached so far are printed, "
    "with the number of missing ones."
)
EXAMPLES = """\
\b
All tests under all presets, in some minutes:
    flushlab litmus

\b
One test under one proposal, and all tests under a policy of your own:
    flushlab litmus return-zap --policy lkml-2025-cpu-flushed-mask
    flushlab litmus --policy my_policy.py --iterations 1000

\b
A test of your own, under a preset with another answer at one point:
    flushlab litmus my.toml --policy root-tlb-gen+migration_vpid=none

\b
All tests on the TDP MMU of a kernel's source, patched or not:
    flushlab litmus --kernel ~/linux

\b
Proofs, with at most a minute for each test and policy (takes hours):
    flushlab litmus --explore --iterations 1000000 --seconds 60 \\
        --store proofs.jsonl
"""

PolicyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="P",
        help="The policy: a preset, mutant:NAME, FILE.py or IDEA.patch, with +point=alternative to answer "
        "single points differently, or point=alternative,... May be repeated. Default: all presets, the "
        "policies that the tests name, and the mutants that cause no violation.",
        autocompletion=policies,
    ),
]


def litmus(
    context: typer.Context,
    files: FilesArgument = None,
    policy: PolicyOption = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10**9,
            metavar="N",
            help="Executions of a test under a policy; with --explore the most executions. "
            f"Default: {EXECUTIONS}, with --explore {INTERLEAVINGS}.",
        ),
    ] = None,
    explore: Annotated[
        bool,
        typer.Option(
            "--explore",
            help="Explore every interleaving, as `flushlab explore` does, instead of running on threads.",
        ),
    ] = False,
    limit: Annotated[
        float,
        typer.Option(
            "--seconds",
            min=0,
            metavar="S",
            help="With --explore: give up on a test under a policy after S seconds, and say how far the "
            "search came. 0: never.",
        ),
    ] = 10.0,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**62,
            envvar="FLUSHLAB_SEED",
            help="Seed of the first execution. Default: a random one.",
        ),
    ] = None,
    mutants: Annotated[
        bool, typer.Option("--mutants", help="Also run every test under every mutant.")
    ] = False,
    kernel: KernelOption = None,
    jobs: JobsOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of the tables.")
    ] = False,
    as_ktap: KtapOption = False,
    junit: JunitOption = None,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="With --explore: keep each search in a file of this directory, and go on with those that "
            "are there, as `flushlab explore` does.",
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --explore: keep each proof in this file as soon as it is there; do not repeat those "
            "that it has.",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="With --explore: prove the I-th of N parts. `flushlab merge` joins stores."
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="With --explore: hand the proofs to the dask.distributed scheduler at this address; local: "
            "to a cluster of --jobs processes on loopback.",
        ),
    ] = None,
) -> None:
    """Run litmus tests under policies and compare the verdicts with those expected."""
    # Imported late: help and bad usage need no engine.
    from emulator.explore.results.rounds import silent
    from emulator.explore.results.suite import explore_all
    from emulator.litmus.loader import load_tests
    from emulator.litmus.policies import named_policy, policies_for
    from emulator.litmus.table import Results

    stored = store is not None or shard is not None or cluster is not None
    given = {"policy": bool(policy), "ktap": as_ktap, "kernel": kernel is not None, "store": stored}
    _check_together(context, explore=explore, **given)
    if junit is not None:
        check_file("--junit", junit)
    if state is not None:
        make_directory("--state", state)
    tests = load_tests(files or [])
    chosen = policy or []
    for name in chosen:
        named_policy(name)
    on_tree = None
    if kernel is not None:
        on_tree = OnTree.built(kernel, tests, chosen, named=bool(files))
        tests, chosen = on_tree.tests, on_tree.policies
    iterations = iterations or (INTERLEAVINGS if explore else EXECUTIONS)
    seed = (0 if explore else secrets.randbits(31)) if seed is None else seed
    jobs = jobs or len(os.sched_getaffinity(0))
    plan = [(test, tuple(policies_for(test, chosen, mutants))) for test in tests]
    if store is not None or shard is not None or cluster is not None:
        elsewhere = None if cluster is None else _on_cluster(cluster)
        prove = partial(_prove, plan, iterations, limit, seed, jobs, elsewhere)
        status = prove(store, shard, as_json, as_ktap, junit)
        raise typer.Exit(status)
    planned = sum(len(policies) for _, policies in plan)
    searched = SearchProgress(planned)
    # On a terminal the progress bar shows the runs.
    told = silent if sys.stderr.isatty() else searched.told
    run = partial(explore_all, seconds=limit, told=told, state=state) if explore else _run_suite(on_tree)
    results = Results(tests, seed, (iterations, limit) if explore else None)
    results.kernel = None if on_tree is None else on_tree.document()
    started = time.monotonic()
    interrupts.only_note()
    with _progress(as_json or as_ktap) as progress:
        bar = progress.add_task("litmus", total=iterations * planned)
        for outcome in run(plan, iterations, seed, jobs, lambda n: progress.advance(bar, n)):
            searched.reached()
            results.add(outcome)
    seconds = time.monotonic() - started
    missing = planned - len(results.outcomes)
    results.interrupted = interrupts.came() is not None
    rate = f"{results.executions / max(seconds, 1e-9):,.0f} executions/s"
    status = _print(
        results,
        as_json=as_json,
        as_ktap=as_ktap,
        junit=junit,
        before="" if on_tree is None else heading(on_tree.object, policy or []),
        after=f"seed {seed}, {seconds:.0f} s, {rate}",
    )
    raise typer.Exit(interrupts.ended(status, missing, planned, cut=results.cut_short(iterations)))


def _prove(
    plan: list[tuple[LitmusTest, tuple[str, ...]]],
    executions: int,
    seconds: float,
    seed: int,
    jobs: int,
    cluster: Callable[..., Iterator[Record]] | None,
    path: Path | None,
    part: str | None,
    as_json: bool,
    as_ktap: bool,
    junit: Path | None,
) -> int:
    """Prove what the store lacks, print all of the shard's verdicts, and return the exit status."""
    from emulator.explore.results.rounds import silent
    from emulator.litmus.table import Results
    from emulator.sweep.grid import shard
    from emulator.sweep.proofs import Proof, proved
    from emulator.sweep.store import Store

    pairs = [(test, name) for test, names in plan for name in names]
    units = [
        Proof(test=test, policy=name, executions=executions, seconds=seconds, seed=seed, number=number)
        for number, (test, name) in enumerate(pairs)
    ]
    units = shard(units, part)
    results = Results([test for test, _ in plan], seed, (executions, seconds))
    interrupts.only_note()
    with Store(path) as store:
        there = 0
        for outcome, stored in proved(units, store, jobs, silent, cluster):
            results.add(outcome)
            there += stored
            if not stored:
                _say_proved(len(results.outcomes), len(units), outcome)
            elif there == 1:
                known = sum(unit.key in store.records for unit in units)
                print(f"{known} of {len(units)} proofs are in the store", file=sys.stderr)
    # Proofs from a store or a cluster come in any order.
    place = {(unit.test.name, unit.policy): unit.number for unit in units}
    results.outcomes = dict(sorted(results.outcomes.items(), key=lambda one: place[one[0]]))
    results.interrupted = interrupts.came() is not None
    status = _print(results, as_json=as_json, as_ktap=as_ktap, junit=junit)
    return interrupts.ended(status, len(units) - len(results.outcomes), len(units))


def _on_cluster(address: str) -> Callable[..., Iterator[Record]]:
    from emulator.sweep.proofs import prove
    from emulator.sweep.work import on_cluster

    return on_cluster(address, prove)


def _say_proved(number: int, units: int, outcome: Outcome) -> None:
    verdict = "failed" if outcome.failure else ", ".join(outcome.kinds) or outcome.proof
    print(f"proof {number} of {units}: {outcome.test} under {outcome.policy}: {verdict}", file=sys.stderr)


def _print(
    results: Results,
    *,
    as_json: bool,
    as_ktap: bool,
    junit: Path | None,
    before: str = "",
    after: str = "",
) -> int:
    """Print the verdicts, with lines around the table, and return the exit status."""
    from emulator.litmus.table import print_results

    status = VIOLATIONS_OR_SURPRISES if results.differing() or results.unforeseen() else 0
    if junit is not None:
        write_file("--junit", junit, junit_of("flushlab litmus", results.cases()))
    with saying(status):
        if as_ktap:
            sys.stdout.write(ktap(results.cases()))
        elif as_json:
            print(json.dumps(results.document(), indent=1))
        elif results.outcomes:
            if before:
                print(before)
            print_results(results, output_console(200))
            if after:
                print(after)
    return status


def _check_together(
    context: typer.Context, *, explore: bool, policy: bool, ktap: bool, kernel: bool, store: bool
) -> None:
    """Raise BadInput for options that do not go together."""
    if not explore:
        refuse(context, {"limit", "store", "shard", "cluster", "state"}, "without --explore", "both")
    if store:
        refuse(context, {"state"}, "with --store, --shard or --cluster", "one of them")
    if policy:
        refuse(context, {"mutants"}, "with --policy", "--mutants alone, or --policy mutant:NAME")
    if ktap:
        refuse(context, {"as_json"}, "with --ktap", "one of them")
    if kernel:
        refuse(context, {"explore", "mutants"}, "with --kernel", "real threads, and a policy")


def _run_suite(on_tree: OnTree | None) -> Callable[..., Iterator[Outcome]]:
    from emulator.litmus.suite import run_suite

    return run_suite if on_tree is None else partial(run_suite, work=on_tree.work())


def _progress(quiet: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
