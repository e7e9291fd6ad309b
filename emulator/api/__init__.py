"""The commands as functions, for programs and notebooks: `import flushlab`.

`emulator/importable` has the package of that name, which exports the names below and nothing else.
"""

from __future__ import annotations

from emulator.api.calls import compare, explore, litmus, run
from emulator.api.results import CompareResult, ExploreResult, LitmusResult, RunResult
from emulator.errors import BadInput
from emulator.policy import Policy

__all__ = [
    "BadInput",
    "CompareResult",
    "ExploreResult",
    "LitmusResult",
    "Policy",
    "RunResult",
    "compare",
    "explore",
    "litmus",
    "run",
]
