"""Ageing in every interleaving with the end of a root, under the lock that its kernel holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.litmus.loader import load_tests
from emulator.litmus.policies import named_policy

# The vCPU drops its only root, which before 6.6 zaps the tree, while the host asks whether its page was used,
# and takes the page away.  An ager with the last reference would zap the root, and without mmu_lock do so
# after the host freed the page.
ROOT_IS_PUT = """
doc = "A vCPU drops the last reference to a root in whose tables the host looks for used pages."
source = "kvm_age_gfn()"
init = ["v0: write 0x10"]
[threads.v0]
vcpu = 0
ops = ["cr4 smep 1"]
[threads.a]
ops = ["host-age 0x10"]
[threads.mm]
ops = ["host-unmap 0x10"]
[expect]
needs = "nothing"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", ["linux-5.14", "linux-5.14+zap_yield=flush-then-unlock", "linux-5.14+age_lock=rcu"]
)
def test_an_ager_never_holds_the_last_reference(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "root-is-put.toml"
    path.write_text(ROOT_IS_PUT)
    (test,) = load_tests([str(path)])
    verdict = explore_verdict(test, named_policy(policy), Plan(executions=200))
    assert not verdict.failure
    assert not verdict.kinds
    assert verdict.executions >= 200 or verdict.complete
