"""flushlab for programs and notebooks: emulate KVM's TLB flushing, judge a policy, and count its costs.

    import flushlab

    class Lazy(flushlab.Policy):
        def migration(self, cpu, vcpu):
            return "none"

    print(flushlab.explore("return-zap", policies=["linux-7.3", Lazy]).to_pandas())

`flushlab guide package` has more.
"""

from __future__ import annotations

from emulator import __version__
from emulator.api import (
    BadInput,
    CompareResult,
    ExploreResult,
    LitmusResult,
    Policy,
    RunResult,
    compare,
    explore,
    litmus,
    run,
)

__all__ = [
    "BadInput",
    "CompareResult",
    "ExploreResult",
    "LitmusResult",
    "Policy",
    "RunResult",
    "__version__",
    "compare",
    "explore",
    "litmus",
    "run",
]
