"""Explored code touches shared state only in declared steps, and its calls are described."""

from __future__ import annotations

import os
from dataclasses import is_dataclass
from importlib import import_module
from pkgutil import walk_packages

import pytest

import emulator.kvm
from emulator.explore.audit.run import AuditResult, run_audit
from emulator.explore.machine.lib import ControlledLib, instrument
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.machine.watching import CLASSES
from emulator.kvm.virt import requests
from emulator.litmus.loader import load_test, shipped_tests
from emulator.litmus.policies import named_policy, suits
from emulator.machine.runtime import Mode
from emulator.points import PointKind
from native import lib

# Shares of the shipped tests, each audited in a few seconds of processor time: all of them under linux-7.3,
# and by turns under one other policy, which takes other paths.  FLUSHLAB_PRESETS=all takes all under each.
PARTS = 8
EVERY = 1 if os.environ.get("FLUSHLAB_PRESETS") == "all" else 4
SHARES = {
    "linux-7.3": range(PARTS),
    "linux-5.14": range(0, PARTS, EVERY),
    "root-tlb-gen": range(EVERY // 2, PARTS, EVERY),
}


def audit_of(test: str, policy: str, executions: int = 3) -> AuditResult:
    return run_audit(load_test(test), named_policy(policy), executions)


def without_points(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """KVM's code has forgotten them."""
    from emulator.machine.runtime import Cpu

    point = Cpu.point

    def others(cpu: Cpu, what: PointKind, obj: object, mode: Mode) -> None:
        if what != kind:
            point(cpu, what, obj, mode)

    monkeypatch.setattr(Cpu, "point", others)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "part"), [(name, part) for name in SHARES for part in SHARES[name]])
def test_no_shared_state_is_touched_without_a_point(policy: str, part: int) -> None:
    tests = [test for test in shipped_tests() if suits(test, policy)][part::PARTS]
    assert tests
    found = [audit_of(test.name, policy) for test in tests]
    assert [one for one in found if not one.clean] == []


def test_who_is_unwound_announces_nothing() -> None:
    """The execution ends at the violation; actions of tasks that unwind are not explored."""
    assert audit_of("return-protect", "lkml-2025-cpu-flushed-mask", 10).clean


def test_the_audit_sees_a_missing_point(monkeypatch: pytest.MonkeyPatch) -> None:
    without_points(monkeypatch, "mode")
    unannounced = audit_of("return-zap", "linux-7.3").unannounced
    assert any(place.endswith("vcpu_set_mode") for place in unannounced)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "test", "policy", "expected"),
    [
        ("dirty_bitmap", "log-races-write", "linux-7.3", "KvmMemorySlot.dirty_bitmap[]: "),
        ("memslots", "slot-delete-fault", "linux-7.3", "Kvm.memslots[]: "),
    ],
)
def test_the_audit_sees_python_state_without_one(
    monkeypatch: pytest.MonkeyPatch, kind: str, test: str, policy: str, expected: str
) -> None:
    without_points(monkeypatch, kind)
    shared = audit_of(test, policy, 20).shared
    assert any(sentence.startswith(expected) for sentence in shared), shared


def test_everything_is_as_before_afterwards() -> None:
    program = LitmusProgram(load_test("return-zap"), named_policy("linux-7.3"))
    with instrument(program.control):
        assert isinstance(vars(requests)["lib"], ControlledLib)
    assert vars(requests)["lib"] is lib
    assert all(cpu.hook is None for cpu in program.machine.cpus)
    program.close()


# Structures that one task makes and no other meets.
OF_ONE_TASK = {
    "Entry",
    "GuestWalker",
    "KvmPageFault",
    "PfnAndRights",
    "TdpIter",
    "walk_shadow_page_lockless",
}


def changes(cls: type) -> bool:
    """Return whether objects of the class can change."""
    frozen = is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    stateless = not cls.__dictoffset__ and not getattr(cls, "__slots__", ())
    return not (frozen or stateless or issubclass(cls, tuple) or getattr(cls, "_is_protocol", False))


def test_the_audit_watches_each_structure_of_kvm() -> None:
    names = [one.name for one in walk_packages(emulator.kvm.__path__, "emulator.kvm.")]
    found = {
        cls
        for name in names
        for cls in vars(import_module(name)).values()
        if isinstance(cls, type) and cls.__module__ == name and changes(cls)
    }
    assert {cls.__name__ for cls in found - set(CLASSES)} == OF_ONE_TASK
