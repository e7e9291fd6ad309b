"""On what was measured: the real machine, and emulated ones."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.toolchain import Toolchain


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def load() -> float:
    """Runnable threads, averaged over the last minute."""
    return os.getloadavg()[0]


def facts(toolchain: Toolchain) -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "compiler": toolchain.version,
        "python": platform.python_version(),
        "pykka": version("pykka"),
        "load_at_start": round(load(), 2),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return "unknown"


def machine_fields(**fields: int) -> dict[str, int]:
    """Fields of struct machine_config: these, and TLBs of the default geometry."""
    geometry = {"l1_ways": 4, "l2_entries": 1536, "l2_ways": 12, "psc_entries": 32}
    return {"guest_blocks": 1, **geometry, "seed": 1, **fields}
