"""`flushlab explore`: small programs with every interleaving, proved or refuted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emulator import interrupts
from emulator.cli.completion import policies
from emulator.cli.explored import Lines, Verdicts
from emulator.cli.kernel import OnTree
from emulator.cli.options import FilesArgument, JobsOption, JunitOption, KernelOption, KtapOption, refuse
from emulator.cli.progress import SearchProgress
from emulator.errors import BadInput
from emulator.output import check_file, make_directory

if TYPE_CHECKING:
    from emulator.explore.machine.options import ExploreOptions
    from emulator.litmus.model import LitmusTest

# Options in which a tree's code has no part, and why.
_WITHOUT_TREE = {
    "store_buffers": "sequentially consistent executions, because no store of the tree's code is held back",
    "stateful": "a search without states, because the tree's memory is no part of a state",
    "state": "a search that is not kept, because a tree's findings are those of one process",
}
# Options about a list of verdicts.
_CASES = ("as_ktap", "junit")

EXPLORE_HELP = (
    "Run litmus tests in every interleaving, under a controlled scheduler, and prove or refute each policy."
    "\n\n"
    "The code is KVM's, as `run` and `litmus` use it; the scheduler replaces only threads and waits. Of "
    "interleavings that differ in the order of independent steps, one is run. The exhaustive strategy tries "
    "interleavings with few preemptions first, and ends when all are covered or after --executions; the "
    "verdict says which interleavings it covers. The other strategies sample. Verdicts are about "
    "sequentially consistent interleavings. With --store-buffers they are about x86-TSO: the scheduler "
    "chooses when a plain store of KVM's code reaches memory, and only locked instructions and barriers "
    "wait for it.\n\n"
    "--adversary makes liberties of the processor choices of the scheduler, too: a TLB may drop any cached "
    "mapping at any time (evict), and in guest mode it may fetch translations of the guests' pages that no "
    "access needs (speculate). Verdicts then say how many of these an execution has at most.\n\n"
    "Counterexamples are minimized; --output keeps them for --replay and for `flushlab explain`. If no "
    "interleaving met a test's precondition (`needs`), nothing was tested, and the verdict is inconclusive. "
    "The exit status is 1 if there is a violation, a deadlock, or an execution that fails.\n\n"
    "Ctrl-C, SIGTERM and SIGHUP end the search. The verdicts reached so far are printed with what they "
    "cover, and the number of missing ones; the exit status is then 130, 143 or 129. With --state the same "
    "command goes on from there."
)
EXPLORE_EXAMPLES = """\
\b
Is the proposal sound, and if not, how does it fail?
    flushlab explore return-zap --policy lkml-2025-cpu-flushed-mask \\
        --output hole
    flushlab explain hole/*.json

\b
Violations by a speculative TLB fill, and by a missing barrier:
    flushlab explore speculative-fill --policy migration=none \\
        --adversary speculate
    flushlab explore entry-races-request --store-buffers \\
        --policy mutant:entry-without-barrier

\b
The TDP MMU of a kernel's source, patched or not, in every interleaving:
    flushlab explore return-zap --kernel ~/linux

\b
Repeat an execution step by step; a step that differs is an error:
    flushlab explore --replay \\
        hole/return-zap-lkml-2025-cpu-flushed-mask.json

\b
Follow a test: its first execution, the first one that meets its
precondition, and the state before a step:
    flushlab explore return-zap --trace
    flushlab explore fault-races-unmap --trace --reach needs --output seen
    flushlab explore --replay seen/*.json --stop-at 40
"""


def explore(
    context: typer.Context,
    files: FilesArgument = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="P",
            help="The policy: a preset, mutant:NAME, FILE.py or IDEA.patch, with +point=alternative to "
            "answer single points differently. May be repeated. Default: linux-7.3.",
            autocompletion=policies,
        ),
    ] = None,
    strategy: Annotated[
        str, typer.Option(metavar="S", help="The search strategy: exhaustive, pct, pos, surw or random.")
    ] = "exhaustive",
    bound: Annotated[
        int | None,
        typer.Option(min=0, max=100, metavar="N", help="Explore interleavings with at most N preemptions."),
    ] = None,
    executions: Annotated[
        int, typer.Option(min=1, max=10**9, metavar="N", help="The most executions of a test under a policy.")
    ] = 2000,
    depth: Annotated[
        int, typer.Option(min=1, max=20, metavar="D", help="For pct: the depth of the bugs to look for.")
    ] = 3,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**62, envvar="FLUSHLAB_SEED", help="Seed of the strategies that sample."),
    ] = 0,
    seconds: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="S",
            help="Give up on a test after S seconds, 0: never. Results then depend on the machine.",
        ),
    ] = 0.0,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep each search in a file of this directory, and go on with those that are there: after a "
            "signal, a crash, or --seconds. The result is that of one search without interruption.",
        ),
    ] = None,
    kernel: KernelOption = None,
    jobs: JobsOption = None,
    adversary: Annotated[
        list[str] | None,
        typer.Option(metavar="A", help="A liberty that TLBs take: evict or speculate. May be repeated."),
    ] = None,
    adversary_budget: Annotated[
        int,
        typer.Option(
            min=1,
            max=100,
            metavar="N",
            help="How often TLBs may take each liberty of --adversary in an execution.",
        ),
    ] = 1,
    store_buffers: Annotated[
        bool,
        typer.Option(
            "--store-buffers", help="Let plain stores reach memory late (x86-TSO), to find missing barriers."
        ),
    ] = False,
    stateful: Annotated[
        bool,
        typer.Option(
            "--stateful",
            help="Search the continuations of each state only once, in one process: needs fewer executions "
            "where threads retry. For presets without code of their own.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write each counterexample, or with --trace the execution, into a file in this directory.",
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Repeat the execution of a counterexample or a trace instead of a search."
        ),
    ] = None,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="Draw one execution instead of a verdict, whether or not it violates: its operations with "
            "their results, and KVM's events. Default: the first execution, or with --replay the recorded "
            "one.",
        ),
    ] = False,
    number: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --trace: draw the N-th execution of the search."),
    ] = None,
    reach: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="With --trace: draw the first execution that completes the operation WHAT ('v0: read 0x10', "
            "or 'v0 3' for the third of v0), meets the danger WHAT (retries, averted, ...), or meets the "
            "precondition ('needs'). Exit status 1 if none does.",
        ),
    ] = None,
    steps: Annotated[
        bool,
        typer.Option("--steps", help="With --trace: draw every step, also steps that only read or lock."),
    ] = False,
    stop_at: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="STEP",
            help="With --replay: stop before this step, and print tasks, requests, TLBs and custody.",
        ),
    ] = None,
    audit: Annotated[
        bool,
        typer.Option(
            "--audit",
            help="Check the search itself instead: look for shared state that is touched without a declared "
            "step, for steps that are declared independent and do not commute, and for states that "
            "--stateful takes for one and that go on differently. Runs --executions random executions for "
            "each check, 20 by default.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document, without times, instead of the table.")
    ] = False,
    as_ktap: KtapOption = False,
    junit: JunitOption = None,
) -> None:
    """Prove or refute policies on litmus tests, in every interleaving."""
    # Imported late: help and bad usage need no engine.
    from emulator.explore.machine.options import ExploreOptions
    from emulator.explore.results.suite import Work, explore_one, explore_suite
    from emulator.explore.results.verdict import STRATEGIES, Plan
    from emulator.litmus.loader import load_tests
    from emulator.litmus.policies import pairs_of
    from emulator.policy import DEFAULT, canonical

    _refuse_what_has_no_effect(context, strategy, bool(adversary), audit, kernel is not None)
    _refuse_beside_one_execution(context, replay is not None, trace, stop_at is not None, reach is not None)
    if replay is not None:
        from emulator.cli.explore_trace import replay_file

        status = replay_file(
            replay, trace=trace, steps=steps, stop_at=stop_at, as_json=as_json, kernel=kernel
        )
        raise typer.Exit(status)
    if strategy not in STRATEGIES:
        raise BadInput("--strategy", repr(strategy), " or ".join(STRATEGIES))
    tests = load_tests(files or [])
    chosen = list(dict.fromkeys(map(canonical, policy or [])))
    on_tree = None if kernel is None else OnTree.built(kernel, tests, chosen, named=bool(files), logged=audit)
    tests, names = (tests, chosen or [DEFAULT]) if on_tree is None else (on_tree.tests, on_tree.policies)
    pairs = pairs_of(tests, names, named=bool(files))
    options = ExploreOptions.given(adversary or [], adversary_budget, store_buffers)
    if audit:
        source = context.get_parameter_source("executions")
        given = executions if source is not None and source.name != "DEFAULT" else None
        raise typer.Exit(_audit(tests, names, given, seed, options, as_json, on_tree))
    plan = Plan(strategy, executions, bound, seed=seed, depth=depth, options=options, stateful=stateful)
    work = [Work(test, name, plan, seconds, state, explains=True) for test, name in pairs]
    if trace:
        from emulator.cli.explore_trace import trace as draw

        how = {"steps": steps, "as_json": as_json}
        status = draw(tests, names, work[0], number, reach, output=output, tree=on_tree, **how)
        raise typer.Exit(status)
    if output is not None:
        make_directory("--output", output)
    if state is not None:
        make_directory("--state", state)
        for one_search in work:
            one_search.file()
    if as_ktap:
        refuse(context, {"as_json"}, "with --ktap", "one of them")
    if junit is not None:
        check_file("--junit", junit)
    lines = None if as_json or as_ktap else Lines(tests, names)
    verdicts = Verdicts(work, lines, output, as_ktap=as_ktap, junit=junit)
    one = explore_one if on_tree is None else verdicts.about(on_tree, chosen)
    interrupts.only_note()
    progress = SearchProgress(len(work))
    for verdict in explore_suite(work, jobs or len(os.sched_getaffinity(0)), progress.told, one):
        progress.reached()
        verdicts.take(verdict)
    progress.erase()
    raise typer.Exit(verdicts.end())


def _refuse_what_has_no_effect(
    context: typer.Context, strategy: str, adversary: bool, audit: bool, kernel: bool
) -> None:
    if kernel:
        for name, expected in _WITHOUT_TREE.items():
            refuse(context, {name}, "with --kernel", expected)
    if audit:
        search = {"strategy", "bound", "depth", "seconds", "jobs", "output", "trace", "stateful", "state"}
        refuse(context, {*search, *_CASES}, "with --audit", "a search without --audit")
    if strategy != "exhaustive":
        refuse(context, {"bound", "stateful"}, f"with --strategy {strategy}", "--strategy exhaustive")
    if strategy != "pct":
        refuse(context, {"depth"}, f"with --strategy {strategy}", "--strategy pct")
    if not adversary:
        refuse(context, {"adversary_budget"}, "without --adversary", "both")


def _refuse_beside_one_execution(
    context: typer.Context, replay: bool, trace: bool, stop: bool, reach: bool
) -> None:
    if replay:
        every = {parameter.name or "" for parameter in context.command.params}
        beside = {"replay", "as_json", "trace", "steps", "stop_at", "kernel"}
        expected = "no option but --kernel, --json, --trace, --steps and --stop-at beside it"
        refuse(context, every - beside, "with --replay", expected)
    elif stop:
        refuse(context, {"stop_at"}, "without --replay", "both")
    if stop:
        refuse(context, {"trace", "steps"}, "with --stop-at", "one of them")
    if reach:
        refuse(context, {"number"}, "with --reach", "one of them")
    if trace:
        refuse(context, {"stateful", "state"}, "with --trace", "a search without --trace")
        refuse(context, {"jobs"}, "with --trace", "a search without --trace, which one process does")
        refuse(context, _CASES, "with --trace", "a search without --trace, which has verdicts")
    else:
        refuse(context, {"number", "reach", "steps"}, "without --trace", "both")


def _audit(
    tests: list[LitmusTest],
    policies: list[str],
    executions: int | None,
    seed: int,
    options: ExploreOptions,
    as_json: bool,
    tree: OnTree | None,
) -> int:
    from emulator.cli.audit import audit
    from emulator.explore.audit.run import EXECUTIONS

    return audit(tests, policies, executions or EXECUTIONS, seed, options, as_json, tree)
