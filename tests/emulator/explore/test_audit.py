"""Explored code touches shared state only where it says so, and what it calls is described."""

from __future__ import annotations

from collections import Counter

import pytest

from emulator.explore.audit import Audit
from emulator.explore.controlled import ControlledLib, installed
from emulator.explore.footprints import FOOTPRINTS, LOCAL
from emulator.explore.sampling import RandomWalk
from emulator.explore.search import Limits, search
from emulator.explore.world import LitmusProgram
from emulator.kvm import requests
from emulator.litmus.loader import load_test, shipped_texts
from emulator.litmus.policies import named_policy
from native import lib


def audited(test: str, policy: str) -> Audit:
    program = LitmusProgram(load_test(test), named_policy(policy))
    audit = program.control.audit = Audit()
    try:
        with installed(program.control):
            search(program, program.objects, RandomWalk(1, 1), Limits(), lambda outcome: False)
    finally:
        program.close()
    return audit


@pytest.mark.parametrize("policy", ["linux-7.3", "linux-5.14", "root-tlb-gen"])
def test_no_shared_state_is_touched_without_a_point(policy: str) -> None:
    places: Counter[str] = Counter()
    for test in shipped_texts():
        audit = audited(test, policy)
        places += audit.unannounced
        assert not audit.unknown, test
    assert not places


def test_the_audit_sees_a_missing_point(monkeypatch: pytest.MonkeyPatch) -> None:
    from emulator.runtime import Cpu

    point = Cpu.point

    def without_mode(cpu: Cpu, kind: str, obj: object, mode: str) -> None:
        if kind != "mode":
            point(cpu, kind, obj, mode)

    monkeypatch.setattr(Cpu, "point", without_mode)
    assert any(place.endswith("vcpu_set_mode") for place in audited("return-zap", "linux-7.3").unannounced)


def test_what_is_described_exists() -> None:
    assert {name for name in (*FOOTPRINTS, *LOCAL) if not hasattr(lib, name)} == set()
    assert not set(FOOTPRINTS) & LOCAL


def test_everything_is_as_before_afterwards() -> None:
    program = LitmusProgram(load_test("return-zap"), named_policy("linux-7.3"))
    with installed(program.control):
        assert isinstance(vars(requests)["lib"], ControlledLib)
    assert vars(requests)["lib"] is lib
    assert all(cpu.hook is None for cpu in program.machine.cpus)
    program.close()
