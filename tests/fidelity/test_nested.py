"""Each step of nested.toml, with the counts of a real KVM, under each preset that must agree."""

from __future__ import annotations

import pytest

from tests.emulator.kvm.rig import running_rig

from .lines import PRESETS
from .nested import NestedBench, NestedProbes, Run, load
from .probes import Probes

pytestmark = pytest.mark.slow

RUNS = load()


@pytest.mark.parametrize("policy", PRESETS)
@pytest.mark.parametrize("run", RUNS, ids=[run.id for run in RUNS])
def test_counts_of_a_real_kvm(run: Run, policy: str) -> None:
    differ = []
    with Probes() as probes, running_rig(root_frames=16) as rig:
        bench = NestedBench(rig, run, policy)
        counting = NestedProbes(probes, rig)
        for number, step in enumerate(run.steps):
            before = counting.counts()
            n = bench.step(step.do)
            counts = counting.counts() - before
            if step.counts is None:
                continue
            expected = {name: count * n for name, count in step.counts.items() if count}
            if counts != expected:
                differ.append((number, step.do, step.operation, dict(counts), expected))
        assert rig.violations() == {}
    assert differ == []
