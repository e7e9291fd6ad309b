"""Each step of nested.toml, with the counts of a real KVM, under each preset that must agree."""

from __future__ import annotations

import pytest

from tests.emulator.kvm.rig import running_rig

from .lines import PRESETS
from .nested import NestedBench, Run, differences, load
from .probes import Probes

pytestmark = pytest.mark.slow

RUNS = load()


@pytest.mark.parametrize("policy", PRESETS)
@pytest.mark.parametrize("run", RUNS, ids=[run.id for run in RUNS])
def test_counts_of_a_real_kvm(run: Run, policy: str) -> None:
    with Probes() as probes, running_rig(root_frames=16) as rig:
        bench = NestedBench(rig, run, policy)
        assert differences(run, bench, probes) == []
        assert rig.violations() == {}
