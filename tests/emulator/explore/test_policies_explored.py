"""Policies that users write, explored: all callers share their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emulator.explore.machine.policy_memory import Memory
from emulator.explore.results.verdict import Plan, Verdict, explore_verdict
from emulator.litmus.loader import load_test, load_tests
from emulator.litmus.policies import named_policy

# Leaves out the flush if it was another vCPU that moved last.
HASTY = """
from emulator.policy import Policy

class Hasty(Policy):
    def __init__(self):
        super().__init__()
        self.last = 0

    def migration(self, cpu, vcpu):
        before, self.last = self.last, vcpu.id
        return super().migration(cpu, vcpu) if before == vcpu.id else "none"
"""

# v1's move comes in between or it does not; the two have nothing in common but the policy.
TWO_MOVES = """
doc = "Two vCPUs move at the same time; everything else happens before."
source = "this test"
init = [
    "v1: read 0x11", "v0: read 0x10", "v0: migrate 1", "v0: read 0x11",
    "mm: host-unmap 0x10", "v0: read 0x11", "v1: read 0x11",
]
machine.pcpus = 4
vm = [{ vcpus = 2 }]

[threads]
v0 = { vcpu = 0, ops = ["migrate 0", "read 0x10"] }
v1 = { vcpu = 1, pcpu = 2, ops = ["migrate 3"] }
mm.ops = ["linger"]
"""


def written(directory: Path, name: str, text: str) -> str:
    path = directory / name
    path.write_text(text)
    return str(path)


def explored(directory: Path, test: str, policy: str, name: str = "mine.py") -> Verdict:
    (found,) = load_tests([written(directory, "test.toml", test)])
    return explore_verdict(found, named_policy(written(directory, name, policy)), Plan())


@pytest.mark.slow
def test_who_asks_first_is_part_of_the_order(tmp_path: Path) -> None:
    verdict = explored(tmp_path, TWO_MOVES, HASTY)
    assert "stale-after-revoke" in verdict.kinds
    slow = explored(tmp_path, TWO_MOVES, HASTY.replace('else "none"', 'else "all-contexts"'), "slow.py")
    assert slow.rounds[-1]["complete"]
    assert not slow.kinds


@pytest.mark.slow
def test_a_counterexample_names_the_answer(tmp_path: Path) -> None:
    """Where it was given in this execution, not somewhere before."""
    verdict = explored(tmp_path, TWO_MOVES, HASTY)
    assert verdict.counterexample is not None
    violation = verdict.counterexample.document()["violation"]
    assert violation["unsafe_answers"] == ["migration=none (mine.py:9)"]


@pytest.mark.slow
def test_a_search_does_not_change_the_next_one(tmp_path: Path) -> None:
    policy, test = written(tmp_path, "counts.py", COUNTS), load_test("return-zap-other-vcpu")
    one, other = (explore_verdict(test, named_policy(policy), Plan()) for _ in range(2))
    assert one.rounds[-1]["complete"]
    assert (one.rounds, one.kinds) == (other.rounds, other.kinds)


# Careless if any method was called before it was made.
COUNTS = """
from emulator.policy import Policy

CALLS = []

class Counts(Policy):
    def __init__(self):
        super().__init__()
        self.careless = bool(CALLS)

    def migration(self, cpu, vcpu):
        CALLS.append(vcpu.id)
        return "none" if self.careless else super().migration(cpu, vcpu)
"""


# Gives up waiting for the end of an invalidation.
PATIENT = """
from emulator.policy import Policy

class Patient(Policy):
    def __init__(self):
        super().__init__()
        self.asked = 0

    def fault_retry(self, cpu, kvm, gfn):
        {count}
        return "none" if self.asked > 4 else super().fault_retry(cpu, kvm, gfn)
"""
LONG_INVALIDATION = """
doc = "A fault is retried until the invalidation ends."
source = "this test"
init = ["v0: write 0x200", "mm: host-touch 0x10"]

[threads]
v0 = { vcpu = 0, ops = ["wait mm 1", "read 0x10", "wait mm 3", "read 0x10"] }
mm.ops = ["notifier-start 0x10", "linger", "notifier-free 0x10", "notifier-end 0x10"]
"""


@pytest.mark.slow
def test_a_loop_that_asks_again_may_be_answered_otherwise(tmp_path: Path) -> None:
    """Turns of a loop are the same only if the policy has not counted them."""
    counting = explored(tmp_path, LONG_INVALIDATION, PATIENT.format(count="self.asked += 1"))
    assert "use-after-free" in counting.kinds
    idle = explored(tmp_path, LONG_INVALIDATION, PATIENT.format(count="pass"), "idle.py")
    assert idle.complete
    assert not idle.kinds


@pytest.mark.slow
def test_memory_that_nobody_knows_may_have_changed(tmp_path: Path) -> None:
    count = "self.random = __import__('random').Random(1); self.asked += 1"
    assert "use-after-free" in explored(tmp_path, LONG_INVALIDATION, PATIENT.format(count=count)).kinds


def test_a_change_counts_though_another_task_asked_meanwhile(tmp_path: Path) -> None:
    """A method that reads other tasks' writes is interrupted there, and its task's loop iteration has changed
    the policy's memory all the same."""
    memory = Memory()
    policy = memory.policy = named_policy(written(tmp_path, "mine.py", HASTY))
    mine: Any = policy
    memory.asking(0)
    mine._mine.last = 7
    memory.asking(1)
    assert not memory.changed(1)
    assert memory.changed(0)
