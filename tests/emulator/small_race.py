"""A race that a search is through with in a moment, for tests of traces."""

from __future__ import annotations

IN_ORDER = """
doc = "The host takes a page away between two reads of it."
source = "here"
[threads.v0]
vcpu = 0
ops = ["read 0x10", "read 0x10", "wait mm 2", "read 0x10"]
[threads.mm]
ops = ["wait v0 2", "host-unmap 0x10"]
"""
# The vCPU goes on while the host is at work, so the order differs between executions.
RACE = IN_ORDER.replace("wait mm 2", "wait mm 1")
