"""`flushlab run` and `serve`: check the input, run the scenario, print the result."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from emulator import __version__
from emulator.cli.session import Session
from emulator.cli.systemd import ServiceManager
from emulator.errors import BadInput
from emulator.log import LogFormat, Logging
from emulator.output import LogFile, make_directory, saying
from emulator.policy import DEFAULT, Policy, check_answer, parse_setting, spelled_policy
from emulator.policy.suitable import check_suits
from emulator.report.console import output_console
from emulator.report.findings import Findings
from emulator.report.result import Result
from emulator.report.summary import document, exit_status, summary
from emulator.scenario import limits
from emulator.scenario.config import Scenario, load_scaled
from emulator.scenario.costs import Costs, modelled_cycles
from metrics import Endpoint, MachineCollector, parse_address
from native.reader import CounterReader

if TYPE_CHECKING:
    from emulator.cli.kernel import TreeReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The user's options.  A `duration` of None is the scenario's own, unless `endless`."""

    scenario: str
    pcpus: int | None = None
    ept: bool | None = None
    policy: str | None
    settings: tuple[str, ...]
    duration: float | None
    endless: bool = False
    seed: int
    chaos: int
    unbounded: bool
    costs: Path | None = None
    metrics: str | None
    metrics_per_cpu: bool
    as_json: bool
    log_level: str
    log_format: LogFormat
    log_file: Path | None = None
    report_dir: Path | None


def run_request(request: Request, tree: TreeReport | None = None) -> int:
    """Check all input before any thread starts; then run, print the result and return the exit status."""
    scenario = load_scaled(request.scenario, request.pcpus, request.ept, request.costs)
    policy = load_policy(request.policy or DEFAULT, request.settings)
    address = _metrics_address(request.metrics)
    limits.check(scenario)
    check_suits(policy, scenario.name, **scenario.kind_of_host)
    if request.report_dir is not None:
        make_directory("--report-dir", request.report_dir)
    findings = Findings(request.report_dir, _head(request, scenario, policy))
    with ExitStack() as stack:
        log = None
        if request.log_file is not None:
            log = stack.enter_context(closing(LogFile("--log-file", request.log_file)))
        stack.enter_context(Logging(request.log_level, request.log_format, to=log))
        collector = MachineCollector(
            {"policy": policy.name, "scenario": scenario.name},
            per_cpu=request.metrics_per_cpu,
            cycles=partial(_cycles, scenario.cost_table),
        )
        if address is not None:
            build = {"version": __version__, **_asked(request, scenario, policy)}
            if tree is not None:
                build["kernel"] = tree.built.version
            endpoint = stack.enter_context(_endpoint(collector, *address, build))
            logger.info("serving metrics", url=endpoint.url)
        result = _run(request, scenario, policy, collector, findings)
        _log_end(result)
    return _write(request, result, findings, tree)


def _cycles(costs: Costs, counters: CounterReader) -> Iterator[tuple[str, str, float]]:
    """Yield the modelled cycles of all that the machine has done, for the metrics."""
    for line in modelled_cycles(costs, counters.sums(), counters.vm_stats(), counters.flushes()):
        yield line.group, line.item, line.cycles


def _asked(request: Request, scenario: Scenario, policy: Policy) -> dict[str, str]:
    """Return the labels of flushlab_build_info besides the version."""
    return {"policy": policy.name, "scenario": scenario.name, "seed": str(request.seed)}


def _head(request: Request, scenario: Scenario, policy: Policy) -> dict[str, Any]:
    """Return the fields that identify this run in each file of --report-dir."""
    return {"scenario": scenario.name, "policy": policy.name, "seed": request.seed}


def load_policy(name: str, settings: tuple[str, ...]) -> Policy:
    """Load a preset, a mutant or a user's policy, with the answers of --set."""
    answers = dict(parse_setting(setting, "--set") for setting in settings)
    for point, alternative in answers.items():
        check_answer(point, alternative, "--set")
    policy = spelled_policy(name)
    return policy.with_settings(answers) if answers else policy


def _run(
    request: Request, scenario: Scenario, policy: Policy, collector: MachineCollector, findings: Findings
) -> Result:
    # Imported late: `flushlab list` and bad input need no engine.
    from emulator.actors.crew import stop_seconds
    from emulator.job.job import Job

    duration = None if request.endless else request.duration or scenario.duration
    job = Job(
        scenario,
        policy,
        seed=request.seed,
        duration=duration,
        chaos=request.chaos,
        unbounded=request.unbounded,
    )
    job.observers.append(collector)
    if request.endless:
        job.observers.append(ServiceManager())
    job.finder = findings
    logger.info("starting", scenario=scenario.name, policy=policy.name, seed=request.seed)
    return Session(job, duration, stopping=stop_seconds(scenario.threads)).execute()


def _log_end(result: Result) -> None:
    log = logger.bind(verdict=result.verdict, elapsed=f"{result.snapshot.elapsed:.1f}s")
    if result.failure:
        log.error("stopped: the run failed")
    elif result.snapshot.violated:
        log.error("stopped: violations", violations=result.snapshot.violated)
    else:
        log.info("stopped")


def _metrics_address(text: str | None) -> tuple[str, int] | None:
    if text is None:
        return None
    try:
        return parse_address(text)
    except ValueError as error:
        raise BadInput("--metrics", f"found {text!r}", str(error)) from None


@contextmanager
def _endpoint(
    collector: MachineCollector, host: str, port: int, build: Mapping[str, str]
) -> Iterator[Endpoint]:
    endpoint = Endpoint(collector, host, port, ready=collector.is_up, build=build)
    try:
        endpoint.__enter__()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise BadInput("--metrics", f"port {port} on {host} is in use", "a free port") from error
        found = f"{host}:{port}: {error.strerror or error}"
        raise BadInput("--metrics", found, "a local address, and a port that may be opened") from error
    try:
        yield endpoint
    finally:
        endpoint.__exit__(None, None, None)


def _write(request: Request, result: Result, findings: Findings, tree: TreeReport | None) -> int:
    """Write the files, then standard output, which may have a slow reader; return the exit status."""
    status = exit_status(result) or (0 if tree is None else tree.status())
    lost = findings.finish(result)
    with saying(status):
        if request.as_json:
            about_tree = {} if tree is None else {"exit_status": status, "kernel": tree.document()}
            print(json.dumps(document(result) | about_tree, allow_nan=False))
        else:
            output_console(120, highlight=False).print(summary(result))
            if tree is not None:
                print(tree.text())
    if lost is not None:
        print(f"flushlab: {lost}", file=sys.stderr)
    return status
