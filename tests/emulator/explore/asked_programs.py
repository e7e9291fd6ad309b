"""Programs with a policy's reads as their outcome, for tests of explore's knowledge of such reads."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emulator.explore.engine.scheduler import Execution
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.policy_reads import NOTHING, Grown, Known
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.sampling import Sampler
from emulator.explore.strategies.search import Found, Limits, search
from emulator.litmus.loader import parse_test
from emulator.litmus.policies import named_policy
from emulator.policy import Policy

# A vCPU moves to pCPU 1 while another thread does something else.
MOVE = """
doc = "A vCPU moves while another thread does something."
source = "this test"
init = ["v0: read 0x10", "w: read 0x20"]
vm = [{{}}, {{}}]
machine.pcpus = 4

[threads]
v0 = {{ vcpu = 0, ops = [{v0}] }}
w = {{ vm = 1, vcpu = 0, pcpu = 2, ops = [{w}] }}
mm.ops = [{mm}]
"""

LOGGING = """
from emulator.policy import Policy
{imports}

class Looks(Policy):
    def __init__(self):
        super().__init__()
        self.log = []
        self.kept = None

    def {point}(self, cpu, {given}):
{body}
        return super().{point}(cpu, {given})
{helpers}
"""


def moving(w: str = "", mm: str = "", v0: str = '"migrate 1"') -> str:
    return MOVE.format(w=w, mm=mm, v0=v0)


def looking(
    *lines: str, point: str = "migration", given: str = "vcpu", imports: str = "", helpers: str = ""
) -> str:
    """A policy's file with this method; `self.log` is the outcome."""
    body = "\n".join(f"        {line}" for line in lines)
    return LOGGING.format(point=point, given=given, body=body, imports=imports, helpers=helpers)


class Logged(LitmusProgram):
    """The outcome: violations, and the log of the policy."""

    def finish(self, execution: Execution) -> str:
        outcome = super().finish(execution)
        policy: Any = self.harness.policy
        return f"{outcome} {policy._mine.log}"


Strategy = Callable[[LitmusProgram], Exhaustive | Sampler]


def outcomes(
    directory: Path,
    test: str,
    policy: str,
    strategy: Strategy,
    known: Known = NOTHING,
    *,
    frozen: bool = False,
    most: int = 3000,
) -> tuple[Found, Known]:
    """Return all outcomes of the strategy's executions, and the reads that it had to know."""
    path = directory / f"looks_{zlib.crc32(policy.encode()):x}.py"  # policies are loaded once
    path.write_text(policy)
    loaded = named_policy(str(path))
    with loaded.confined():
        return _outcomes(test, loaded, strategy, known, frozen, most)


def _outcomes(
    test: str, policy: Policy, strategy: Strategy, known: Known, frozen: bool, most: int
) -> tuple[Found, Known]:
    while True:
        program = Logged(parse_test(test, "moving", None), policy, known=known, frozen=frozen)
        assert program.reads is not None
        try:
            with instrument(program.control):
                limits = Limits(executions=most, first_only=False)
                found = search(program, program.objects, strategy(program), limits, lambda outcome: False)
            program.reads.check()
            return found, known
        except Grown:
            known = program.reads.next()
        finally:
            program.close()


def exhaustive(program: LitmusProgram) -> Exhaustive:
    return Exhaustive(program.objects)
