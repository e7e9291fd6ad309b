"""Shared fixtures.  No test sleeps to get an order; waits have deadlines and end the test when they pass."""

from __future__ import annotations

import faulthandler
import gc
import os
import shutil
import sys
from collections.abc import Iterator
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


# On an idle machine no quick test comes near.
_NO_LONGER_QUICK_SECONDS = 2.0


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name quick tests that took long.  Nothing fails for it: the machine may have been busy."""
    if terminalreporter.config.option.markexpr != "quick":
        return
    for report in terminalreporter.getreports("passed"):
        if report.when == "call" and report.duration > _NO_LONGER_QUICK_SECONDS:
            terminalreporter.write_line(f"{report.duration:.1f} s: {report.nodeid}: mark it slow?")


@pytest.fixture
def bare_machine() -> Iterator[BareMachine]:
    machine = BareMachine()
    try:
        yield machine
    finally:
        machine.close()
