"""A vCPU that comes back to a pCPU with a stale entry, and a policy that looks at another pCPU meanwhile."""

from __future__ import annotations

from pathlib import Path

from emulator.explore.results.verdict import Plan, Verdict, explore_verdict
from emulator.litmus.loader import load_tests
from emulator.litmus.policies import named_policy

# The vCPU comes back to a pCPU with a stale entry.  Only while a vCPU of another VM is
# loaded on the third pCPU, which nothing else in this program depends on, is the flush left out.
RETURNS = """
doc = "v0 returns to pcpu0 after its page was zapped; w runs on pcpu2 for a while."
source = "this test"
init = ["v0: read 0x10", "w: read 0x20"]
vm = [{}, {}]
machine.pcpus = 3
expect.needs = "nothing"

[threads]
v0 = { vcpu = 0, ops = ["migrate 1", "read 0x11", "wait mm 2", "migrate 0", "read 0x10"] }
w = { vm = 1, vcpu = 0, pcpu = 2, ops = ["read 0x20"] }
mm.ops = ["wait v0 2", "host-unmap 0x10"]
"""

LOOKS = """
from emulator.policy import Policy

class Looks(Policy):
    def migration(self, cpu, vcpu):
        if {condition}:
            return "{answer}"
        return super().migration(cpu, vcpu)
"""
LOADED = "cpu.machine.cpus[2].vcpu is not None"


def written(directory: Path, name: str, text: str) -> str:
    path = directory / name
    path.write_text(text)
    return str(path)


def explored(directory: Path, policy: str, plan: Plan | None = None, jobs: int = 1) -> Verdict:
    (test,) = load_tests([written(directory, "returns.toml", RETURNS)])
    return explore_verdict(test, named_policy(written(directory, "mine.py", policy)), plan, jobs=jobs)
