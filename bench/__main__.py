"""python -m bench.  bench/__init__.py describes the measurements and how to read them."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from bench import programs
from bench.benchmark import FULL, QUICK, Benchmark, Context
from bench.errors import BenchFailed
from bench.exploring import exploring, exploring_jobs
from bench.history import keep, last_of
from bench.idle import idle
from bench.job import job
from bench.machine import facts, load, usable_cores
from bench.mutation.benchmark import mutation
from bench.patched import patched
from bench.proofs import proofs
from bench.reduction import reduction
from bench.report import Report
from bench.toolchain import Toolchain
from bench.zap import zap_flushes
from emulator.errors import BadInput

BENCHMARKS = (
    Benchmark("guest", "guest accesses of the embedded traces", programs.guest),
    Benchmark("walk", "a working set beyond the TLB", programs.walk),
    Benchmark("shadow", "guest accesses without EPT", programs.shadow),
    Benchmark("ipi", "on_each_cpu to a pCPU that runs a guest", programs.ipi, cores=2),
    Benchmark("job", "kvm_flush_remote_tlbs in the main job", job, cores=2),
    Benchmark("idle", "broadcast to idle pCPUs, their boot and stop", idle),
    Benchmark("spte", "map and zap per SPTE", programs.spte),
    Benchmark("zap_flushes", "1 GiB of 4K mappings goes: flushes by policy", zap_flushes),
    Benchmark("explore", "executions of flushlab explore", exploring),
    Benchmark("explore_jobs", "one search by several processes", exploring_jobs, cores=2),
    Benchmark("reduction", "explore with and without partial-order reduction", reduction),
    Benchmark("flush", "flushes as the TLB grows", programs.flush),
    Benchmark("lookup", "the first-level look-up and its rivals", programs.lookup),
    Benchmark("rcu", "read sections and callbacks", programs.rcu),
    Benchmark("proofs", "litmus tests proved in five seconds each", proofs, on_request=True),
    Benchmark("patched", "a run with a patch of KVM's code", patched, cores=2, on_request=True),
    Benchmark("mutation", "mutants of KVM's code: does the suite catch them?", mutation, on_request=True),
)


_PIPE_COLUMNS = 140


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report bad usage in one line, as flushlab's commands do."""
        raise BadInput("bench", message)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = _parse(arguments)
        with tempfile.TemporaryDirectory(prefix="flushlab-bench-") as directory:
            report = run(options.benchmarks, Path(directory), quick=options.quick)
        before = last_of(Path(options.against), report.machine) if options.against else None
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    console = Console(stderr=options.json == "-")
    # In a file or a pipe the table gets its full width instead of 80 columns.
    wide = console if console.is_terminal else Console(stderr=console.stderr, width=_PIPE_COLUMNS)
    report.print(wide, before)
    if options.keep:
        keep(Path(options.keep), report.machine, report.figures)
    if options.json == "-":
        print(json.dumps(report.document()))
    elif options.json:
        Path(options.json).write_text(json.dumps(report.document(), indent=1) + "\n")
    return 1 if report.failures or (options.check and report.unmet) else 0


def run(benchmarks: Sequence[Benchmark], directory: Path, *, quick: bool) -> Report:
    """Run all benchmarks, one after the other.  If one fails, the rest still runs."""
    toolchain = Toolchain(directory)
    report = Report(quick, facts(toolchain))
    sizes = QUICK if quick else FULL
    with Console(stderr=True).status("compiling") as status:
        context = Context(toolchain, directory, sizes, status.update, status.console.print)
        for benchmark in benchmarks:
            _run_one(benchmark, context, report)
    report.machine["load_at_end"] = round(load(), 2)
    return report


def _run_one(benchmark: Benchmark, context: Context, report: Report) -> None:
    if usable_cores() < benchmark.cores:
        report.skipped.append((benchmark.name, f"needs {benchmark.cores} cores"))
        return
    context.say(benchmark.title)
    try:
        for figure in benchmark.figures(context):
            report.figures.append((benchmark.name, figure))
    except BenchFailed as error:
        report.failures.append((benchmark.name, str(error)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m bench",
        description="Measurements, each beside a reference taken in the same run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="benchmarks:\n" + "\n".join(f"  {one.name:<11} {one.title}" for one in BENCHMARKS),
    )
    parser.add_argument("--json", metavar="FILE|-", help="write a JSON document as well")
    parser.add_argument("--only", metavar="NAME", nargs="+", action="extend", help="only these benchmarks")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only whether everything works")
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure is not as wanted")
    parser.add_argument("--keep", metavar="FILE", help="append the figures to FILE, one line a run")
    parser.add_argument(
        "--against",
        metavar="FILE",
        help="say what has changed since the last run that FILE has of such a CPU",
    )
    options = parser.parse_args(arguments)
    options.benchmarks = _chosen(options.only)
    if options.keep and options.quick:
        raise BadInput("--keep", "--quick", "figures that mean something")
    if options.json != "-":
        _check_writable("--json", options.json)
    _check_writable("--keep", options.keep)
    if options.against:
        last_of(Path(options.against), {"cpu": "", "cpu_family": ""})
    return options


def _chosen(names: Sequence[str] | None) -> list[Benchmark]:
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    for name in names or ():
        if name not in known:
            raise BadInput("--only", f"found {name!r}", f"names among {', '.join(known)}")
    if names is None:
        return [benchmark for benchmark in BENCHMARKS if not benchmark.on_request]
    return [benchmark for benchmark in BENCHMARKS if benchmark.name in names]


def _check_writable(option: str, name: str | None) -> None:
    """Raise BadInput before minutes of measuring, not after."""
    if name is None:
        return
    try:
        Path(name).open("a").close()
    except OSError as error:
        raise BadInput(option, f"{name}: {error.strerror}", "a file that can be written") from None


if __name__ == "__main__":
    # Handle SIGTERM like Ctrl-C: it ends the current benchmark, and the compiled programs are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
