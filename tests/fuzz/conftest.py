"""Print how many inputs the parsers were given, and how many they refused."""

from __future__ import annotations

import pytest

from tests.fuzz.inputs import COUNTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    total = sum(sum(counts.values()) for counts in COUNTS.values())
    if not total:
        return
    parsers = ", ".join(
        f"{name} {counts['loaded']:,} + {counts['refused']:,}" for name, counts in sorted(COUNTS.items())
    )
    terminalreporter.write_line(f"fuzz: {total:,} inputs (loaded + refused): {parsers}")
