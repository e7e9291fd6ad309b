"""The real machine on which a run was measured, and the configuration of emulated ones."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.toolchain import Toolchain

CPUINFO = Path("/proc/cpuinfo")


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def load() -> float:
    """Return the number of runnable threads, averaged over the last minute."""
    return os.getloadavg()[0]


def facts(toolchain: Toolchain) -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cpu_family": cpu_family(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "compiler": toolchain.version,
        "python": platform.python_version(),
        "pykka": version("pykka"),
        "load_at_start": round(load(), 2),
    }


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    return _cpuinfo(cpuinfo).get("model name", "unknown")


def cpu_family(cpuinfo: Path = CPUINFO) -> str:
    """Return family and model, which distinguish processors to which a hypervisor gives one name."""
    fields = _cpuinfo(cpuinfo)
    return f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"


def _cpuinfo(cpuinfo: Path) -> dict[str, str]:
    """Return the first processor's fields; none if there is no such file."""
    try:
        first, _, _ = cpuinfo.read_text().partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def machine_fields(**fields: int) -> dict[str, int]:
    """Return `fields` of struct machine_config, and TLBs of the default geometry."""
    geometry = {"l1_ways": 4, "l2_entries": 1536, "l2_ways": 12, "psc_entries": 32}
    return {"guest_blocks": 1, **geometry, "seed": 1, **fields}
