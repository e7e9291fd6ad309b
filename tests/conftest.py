"""Shared fixtures.  No test sleeps to get an order; waits have deadlines and end the test when they pass."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from loguru import logger

from tests.support import BareMachine


@pytest.fixture(autouse=True)
def _quiet_log() -> Iterator[None]:
    """What tests log is not printed; tests of logging add their own sinks."""
    logger.remove()
    yield
    logger.remove()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the endpoint against a real Prometheus need it; where it is missing they say so."""
    if shutil.which("prometheus") and shutil.which("promtool"):
        return
    skip = pytest.mark.skip(reason="prometheus and promtool are not installed (apt-get install prometheus)")
    for item in items:
        if "prometheus" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def bare_machine() -> Iterator[BareMachine]:
    machine = BareMachine()
    try:
        yield machine
    finally:
        machine.close()
