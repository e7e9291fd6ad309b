"""Prometheus metrics of a running machine: a collector over the native counters, and the scrape endpoint."""

from __future__ import annotations

from metrics.collector import MachineCollector
from metrics.endpoint import Endpoint, parse_address

__all__ = ["Endpoint", "MachineCollector", "parse_address"]
