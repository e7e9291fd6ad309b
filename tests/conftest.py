"""Shared fixtures.  No test sleeps to get an order; waits have deadlines and end the test when they pass."""

from __future__ import annotations

import faulthandler
import gc
import os
import resource
import shutil
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from loguru import logger

from tests.support import BareMachine

# Where no bytecode may be written beside the sources, keep it elsewhere: pytest rewrites the assertions of
# all tests, which takes 6 s in each process that does not find them rewritten.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / "build" / "pycache")

# Hypothesis measures how long examples take by the clock on the wall, which proves nothing on a busy machine.
# pytest-timeout ends a test that is stuck.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(autouse=True)
def _quiet_log() -> Iterator[None]:
    """Print no log of the tests; tests of logging add their own sinks."""
    logger.remove()
    yield
    logger.remove()


# Of CPU time, which a busy machine lengthens by a half, and the clock on the wall by any factor.
_MOST_SECONDS_OF_A_QUICK_TEST = 0.3
# A run of fewer tests says little: the first test of a process pays for the imports.
_LEAST_TESTS_TO_JUDGE = 1000


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the quick tests, and skip those against a real Prometheus, with the reason, where it is missing.

    First of all hooks, because `-m quick` selects afterwards.
    """
    for item in items:
        if not {"slow", "stress"} & {marker.name for marker in item.iter_markers()}:
            item.add_marker(pytest.mark.quick)
    if shutil.which("prometheus") and shutil.which("promtool"):
        return
    skip = pytest.mark.skip(reason="prometheus and promtool are not installed (apt-get install prometheus)")
    for item in items:
        if "prometheus" in item.keywords:
            item.add_marker(skip)


# A storm has as many threads as a host has pCPUs, so more processes only make the tests wait for each other.
_MOST_PROCESSES = 4


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of processes for `-n auto`."""
    return min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)


_REAL_STDERR = pytest.StashKey[int]()
_CPU_BEFORE = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep standard error, which is not captured yet."""
    config.stash[_REAL_STDERR] = os.dup(2)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Print all threads' stacks right before a test's time is up, in a process of pytest-xdist.

    There pytest-timeout prints them to a standard output that leads nowhere.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        own = item.get_closest_marker("timeout")
        seconds = float(own.args[0] if own is not None and own.args else item.config.getini("timeout"))
        faulthandler.dump_traceback_later(0.98 * seconds, file=item.config.stash[_REAL_STDERR])


def pytest_collection_finish() -> None:
    """Take the thousands of collected tests out of the garbage collector's sight.

    Otherwise each of its full rounds visits their objects, which takes a quarter of a second.
    """
    gc.collect()
    gc.freeze()


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of the processes that it has waited for."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Note the CPU time before a test and its fixtures begin."""
    item.stash[_CPU_BEFORE] = _cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record a test's CPU time, its fixtures' included, where pytest-xdist hands it on."""
    report = yield
    if report.when == "call":
        report.user_properties.append(("cpu", _cpu_seconds() - item.stash[_CPU_BEFORE]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the CPU time of all quick tests, and name those that took much.

    Nothing fails for it: a busy machine makes each test take more.
    """
    quick = {
        report.nodeid: dict(report.user_properties)["cpu"]
        for report in terminalreporter.getreports("passed")
        if report.when == "call" and "quick" in report.keywords
    }
    if len(quick) < _LEAST_TESTS_TO_JUDGE:
        return
    terminalreporter.write_line(f"{len(quick):,} quick tests took {sum(quick.values()):.1f} s of CPU")
    for name, seconds in sorted(quick.items(), key=lambda one: -one[1]):
        if seconds > _MOST_SECONDS_OF_A_QUICK_TEST:
            terminalreporter.write_line(f"{seconds:.2f} s of CPU: {name}: mark it slow?")


@pytest.fixture
def bare_machine() -> Iterator[BareMachine]:
    machine = BareMachine()
    try:
        yield machine
    finally:
        machine.close()
