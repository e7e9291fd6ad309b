"""Plain attributes that methods of a class share without an order are named, and nothing is proved."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.explore.machine.policy_attributes import remembers
from emulator.explore.results.verdict import Plan, Verdict, explore_verdict
from emulator.litmus.loader import parse_test
from emulator.litmus.model import SAFE
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import SEARCHED
from emulator.policy.source import read_source

pytestmark = pytest.mark.slow

# Each method flushes, whatever it remembers.
REMEMBERS = """
from emulator.policy import Policy
{imports}

class Mine(Policy):
    {state}

    def __init__(self):
        super().__init__()
        self.last = 0
        self.seen = {{0: 0}}
        self.log = []

    def migration(self, cpu, vcpu):
        {body}
        return "all-contexts"
"""
# Two vCPUs move at a time, and have nothing else in common.
MOVES = """
doc = "Two vCPUs move at the same time."
source = "this test"
init = ["v0: read 0x10", "v1: read 0x11"]
machine.pcpus = 4
vm = [{ vcpus = 2 }]
expect.needs = "nothing"

[threads]
v0 = { vcpu = 0, ops = ["migrate 1"] }
v1 = { vcpu = 1, pcpu = 2, ops = ["migrate 3"] }
"""
ALONE = MOVES.replace('ops = ["migrate 3"]', "ops = []")


def written(directory: Path, body: str, state: str = "base = 'linux-7.3'", imports: str = "") -> str:
    path = directory / "mine.py"
    path.write_text(REMEMBERS.format(body=body, state=state, imports=imports))
    return str(path)


def explored(test: str, policy: str) -> Verdict:
    return explore_verdict(parse_test(test, "moves", None), named_policy(policy), Plan(executions=300))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("self.last = vcpu.id", "Mine.last: written in Mine.migration, written in Mine.migration"),
        ("self.last += 1", "Mine.last: read in Mine.migration, written in Mine.migration"),
        ("self.seen[0] = vcpu.id", "Mine.seen[]: written in Mine.migration, written in Mine.migration"),
        ("self.log.append(vcpu.id)", "Mine.log[]: written in Mine.migration, written in Mine.migration"),
        ("CALLS.append(vcpu.id)", "mine.py: Mine: memory that no attribute of its object holds"),
        ("type(self).calls += 1", "mine.py: Mine: memory that no attribute of its object holds"),
        ("vars(self)['last'] += 1", "mine.py: Mine: memory that no attribute of its object holds"),
    ],
    ids=["attribute", "count", "dict", "list", "module", "class", "behind"],
)
def test_what_two_threads_share_is_told_by_name(tmp_path: Path, body: str, told: str) -> None:
    found = explored(MOVES, written(tmp_path, body, "calls = 0", "CALLS = []"))
    assert (found.verdict, found.complete, found.bound) == (SEARCHED, False, None)
    assert told in found.unordered
    assert f"not all, no ordering point orders {found.unordered[0]}" in found.summary()


@pytest.mark.parametrize(
    ("test", "body"),
    [
        (MOVES, "pass"),
        (MOVES, "self.seen[vcpu.id] = self.seen.get(vcpu.id, 0) + 1"),
        (MOVES, "self.gen(vcpu.kvm).inc_return(cpu)"),
        (ALONE, "self.last += 1; self.log.append(cpu.id); CALLS.append(1)"),
    ],
    ids=["nothing", "an element each", "state", "one thread"],
)
def test_what_is_not_shared_is_proved(tmp_path: Path, test: str, body: str) -> None:
    imports = "from emulator.policy.state import Generation, per_vm\nCALLS = []"
    found = explored(test, written(tmp_path, body, "gen = per_vm(Generation)", imports))
    assert (found.verdict, found.complete, found.unordered) == (SAFE, True, ())


@pytest.mark.parametrize(
    ("body", "remembered"),
    [
        ("self.last = 1", True),
        ("self.seen[0] = 1", True),
        ("global CALLS; CALLS = 1", True),
        ("[self.log.append(one) for one in (1, 2)]", True),
        ("setattr(self, 'last', 1)", True),
        ("pass", False),
        ("self.gen(vcpu.kvm).inc_return(cpu)", False),
    ],
)
def test_only_a_class_that_may_remember_is_watched(tmp_path: Path, body: str, remembered: bool) -> None:
    assert remembers(read_source(Path(written(tmp_path, body)))) == remembered
