"""Errors of benchmarks."""

from __future__ import annotations


class BenchFailed(Exception):
    """A benchmark did not run to its end, or one of its invariants does not hold."""
