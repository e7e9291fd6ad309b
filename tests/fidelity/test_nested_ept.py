"""Each step of nested_ept.toml, with the counts of a real KVM, under each preset that must agree."""

from __future__ import annotations

import pytest

from tests.emulator.kvm.rig import running_rig

from .lines import PRESETS
from .nested import Run, differences, load
from .nested_ept import FIXTURE, NestedEptBench
from .probes import Probes

pytestmark = pytest.mark.slow

RUNS = load(FIXTURE)
TWO_VCPUS = [run for run in RUNS if run.two_vcpus]


@pytest.mark.parametrize("policy", PRESETS)
@pytest.mark.parametrize("run", RUNS, ids=[run.id for run in RUNS])
def test_counts_of_a_real_kvm(run: Run, policy: str) -> None:
    check(run, policy, 1)


@pytest.mark.parametrize("policy", PRESETS)
@pytest.mark.parametrize("run", TWO_VCPUS, ids=[run.id for run in TWO_VCPUS])
def test_counts_of_two_vcpus(run: Run, policy: str) -> None:
    check(run, policy, 2)


def check(run: Run, policy: str, vcpus: int) -> None:
    with Probes() as probes, running_rig(root_frames=16) as rig:
        bench = NestedEptBench(rig, run, policy, vcpus)
        assert differences(run, bench, probes) == []
        assert rig.violations() == {}
